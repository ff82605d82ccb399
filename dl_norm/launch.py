"""Launches the kernels of ``kernels/policy_loss.py``: block sizes, grids, outputs."""

# A launch takes options of Triton (num_warps) that the kernel's own signature has not.
# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .batch import Batch
from .device import target
from .kernels.policy_loss import (
    policy_loss_bwd_kernel,
    policy_loss_fwd_kernel,
    policy_loss_fwd_strided_kernel,
    policy_loss_reduce_kernel,
    policy_loss_sequence_kernel,
)
from .metrics import NUM_METRIC_SUMS
from .options import TokenLoss


class Old:
    def __init__(self, terms):
        self.surrogate = terms.surrogate
        self.ratio_level = terms.ratio_level
        self.beta = terms.beta
        self.bias_corrected_kl = terms.bias_corrected_kl
        self.log_ratio_bound = terms.log_ratio_clamp
        self.positive_high = self.negative_high = 1e38
        self.negative_low = 0.0
        self.sapo_temperature_pos = self.sapo_temperature_neg = 1.0
        st = terms.settings
        if terms.surrogate == "clip":
            self.positive_high, self.negative_low, self.negative_high = st
        elif terms.surrogate == "cispo":
            self.negative_low, self.positive_high = st
            self.negative_high = self.positive_high
        else:
            self.sapo_temperature_pos, self.sapo_temperature_neg = st


@dataclass(frozen=True)
class TileConfig:
    """How a flat stream of tokens is cut. Depends on sizes alone, never on the device, so the
    order of summation and with it the bits of the result are the same on every GPU."""

    block: int
    num_warps: int


def tile_config(itemsize: int, warp_size: int) -> TileConfig:
    """One 16-byte load a thread and tensor (4 tokens in 32 bits, 8 in 16 bits): more tokens a
    thread cost registers and with them occupancy."""
    threads = 256
    return TileConfig(threads * 16 // itemsize, threads // warp_size)


def _tile_config(itemsize: int) -> TileConfig:
    return tile_config(itemsize, target().warp_size)


def policy_loss_fwd(
    batch: Batch, terms: TokenLoss, write_grad: bool, metrics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches: the loss and gradient of every tile, then the sum of their partial results.
    A ratio of the whole sequence takes a launch before them, one program a sequence.

    Returns what :func:`dl_norm.closed_form.policy_loss_fwd` returns, except that the gradient of
    float16 log-probs is kept in float32 until it is scaled: DeltaL weights underflow in float16.
    """
    (
        log_probs,
        old_log_probs,
        ref_log_probs,
        advantages,
        mask,
        rollout_weights,
        weights,
        cu_seqlens,
    ) = batch
    entropy_mask = sequence_mask = None
    if not batch.is_per_token(advantages):
        advantages = advantages[:, 0]
    if rollout_weights is not None:
        rollout_weights = rollout_weights.float()
        if not batch.is_per_token(rollout_weights):
            rollout_weights = rollout_weights[:, 0]
    options = Old(terms)
    device = log_probs.device
    tokens = log_probs.numel()
    sequences = weights.shape[0]
    grad_dtype = torch.float32 if log_probs.dtype == torch.float16 else log_probs.dtype
    loss = torch.empty((), dtype=torch.float32, device=device)
    sums = torch.empty(NUM_METRIC_SUMS if metrics else 0, dtype=torch.float32, device=device)
    grad = torch.empty(log_probs.shape if write_grad else 0, dtype=grad_dtype, device=device)
    if tokens == 0 or sequences == 0:
        return loss.zero_(), grad.zero_(), sums.zero_()

    packed = cu_seqlens is not None
    per_sequence = (sequences,)
    token_advantages = advantages.ndim == log_probs.ndim and batch.is_per_token(batch.advantages)
    token_rollout = rollout_weights is not None and batch.is_per_token(batch.policy_weights)
    streams = (
        log_probs,
        old_log_probs,
        ref_log_probs,
        advantages if token_advantages else None,
        mask,
        rollout_weights if token_rollout else None,
        entropy_mask,
    )
    strided = not all(stream is None or _is_vectorisable(stream) for stream in streams)
    strides = [stride for stream in streams for stride in _strides(stream)]
    variant = (
        options.surrogate != "clip"
        or options.ratio_level != "token"
        or options.bias_corrected_kl
        or entropy_mask is not None
        or sequence_mask is not None
    )
    # 8 tokens a thread of a variant are more than fit in registers.
    config = _tile_config(4 if variant else log_probs.element_size())
    programs = -(-tokens // config.block)
    num_sums = 1 + sums.numel()
    partials = torch.empty((num_sums, programs), dtype=torch.float32, device=device)
    # Kernels take a pointer for every tensor; what a flag leaves unread may point anywhere, but
    # aligned like the rest, as alignment is part of what a kernel is compiled for.
    unread = partials

    def given(tensor: Tensor | None) -> Tensor:
        return unread if tensor is None else tensor

    bias_corrected_kl = options.bias_corrected_kl and ref_log_probs is not None
    sequence_ratio = options.ratio_level != "token" and old_log_probs is not None
    # Where the terms of a sequence's tokens differ, the derivative through its ratio is their mean;
    # elsewhere that mean is every token's own.
    corrected = bias_corrected_kl and options.beta > 0
    uneven = token_advantages or token_rollout or entropy_mask is not None
    mean_grad = (
        write_grad
        and options.ratio_level == "sequence"
        and (corrected or (uneven and options.surrogate != "cispo"))
    )
    flags = dict(
        PACKED=packed,
        HAS_OLD=old_log_probs is not None,
        HAS_MASK=mask is not None,
        TOKEN_ADVANTAGES=token_advantages,
        HAS_ROLLOUT=rollout_weights is not None,
        TOKEN_ROLLOUT=token_rollout,
        HAS_ENTROPY_MASK=entropy_mask is not None,
        HAS_SEQUENCE_MASK=sequence_mask is not None,
        MEAN_GRAD=mean_grad,
        CISPO=options.surrogate == "cispo",
        SAPO=options.surrogate == "sapo",
    )
    settings = (
        options.positive_high, options.negative_low, options.negative_high,
        options.sapo_temperature_pos, options.sapo_temperature_neg, options.log_ratio_bound,
        options.beta,
    )  # fmt: skip
    tensors = (
        log_probs,
        given(old_log_probs),
        given(ref_log_probs),
        advantages if token_advantages else _aligned(advantages),
        given(mask),
        unread
        if rollout_weights is None
        else (rollout_weights if token_rollout else _aligned(rollout_weights)),
        given(entropy_mask),
        unread if sequence_mask is None else sequence_mask.contiguous(),
        unread if cu_seqlens is None else cu_seqlens.contiguous(),
    )
    length = tokens if packed else log_probs.shape[1]
    means = ratio_grads = unread
    with torch.accelerator.device_index(device.index):
        if sequence_ratio or mean_grad:
            means, ratio_grads = torch.empty((2, sequences), dtype=torch.float32, device=device)
            policy_loss_sequence_kernel[(sequences,)](
                *tensors,
                means,
                ratio_grads,
                tokens,
                length,
                *strides,
                *settings,
                **flags,
                BIAS_CORRECTED_KL=corrected,
                BLOCK=config.block,
                num_warps=config.num_warps,
            )
        kernel = policy_loss_fwd_strided_kernel if strided else policy_loss_fwd_kernel
        kernel[(programs,)](
            *tensors,
            means,
            ratio_grads,
            weights.contiguous(),
            grad,
            partials,
            tokens,
            length,
            sequences,
            *strides,
            *settings,
            **flags,
            STRIDED=strided,
            HAS_REF=ref_log_probs is not None,
            SEQUENCE_RATIO=sequence_ratio,
            BIAS_CORRECTED_KL=bias_corrected_kl,
            WRITE_GRAD=write_grad,
            METRICS=metrics,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
        policy_loss_reduce_kernel[(num_sums,)](
            partials, loss, sums, programs, NUM_SUMS=num_sums, BLOCK=4096, num_warps=8
        )
    return loss, grad, sums


def policy_loss_bwd(grad: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * grad_output in ``dtype``; in place when that is the dtype of ``grad``."""
    in_place = grad.dtype == dtype
    out = grad if in_place else torch.empty_like(grad, dtype=dtype)
    if grad.numel() == 0:
        return out
    config = _tile_config(min(grad.element_size(), out.element_size()))
    with torch.accelerator.device_index(grad.device.index):
        policy_loss_bwd_kernel[(triton.cdiv(grad.numel(), config.block),)](
            grad,
            grad_output,
            out,
            grad.numel(),
            IN_PLACE=in_place,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return out


def _is_vectorisable(stream: Tensor) -> bool:
    return stream.is_contiguous() and stream.data_ptr() % 16 == 0


def _aligned(per_sequence: Tensor) -> Tensor:
    return per_sequence if _is_vectorisable(per_sequence) else per_sequence.clone()


def _strides(stream: Tensor | None) -> tuple[int, int]:
    if stream is None:
        return 0, 0
    if stream.ndim == 1:
        return 0, stream.stride(0)
    return stream.stride(0), stream.stride(1)
