"""Launches the kernels of ``kernels/policy_loss.py``: block sizes, grids, outputs."""

# A launch takes options of Triton (num_warps) that the kernel's own signature has not.
# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .._batch import Batch
from .._device import target
from .._options import TokenLoss, kind_of, num_sums
from .._rollout import Rollout, needs_sequences, needs_tokens
from ..kernels import rollout as rollout_kernels
from ..kernels import surrogates
from ..kernels.policy_loss import (
    TOKENS_PER_THREAD,
    TokenStreams,
    policy_loss_bwd_kernel,
    policy_loss_fwd_kernel,
    policy_loss_reduce_kernel,
)
from ..kernels.policy_loss_sequence import policy_loss_sequence_kernel
from ..kernels.rollout import RolloutTerms
from ..kernels.surrogates import KLTerms, TokenTerms

KL_FUNCTIONS = {
    "k1": surrogates.k1, "abs": surrogates.absolute, "k2": surrogates.k2, "k3": surrogates.k3,
}  # fmt: skip


@dataclass(frozen=True)
class TileConfig:
    """How a flat stream of tokens is cut: ``groups`` vectors of ``vector`` tokens. Depends on sizes
    alone, never on the device, so the order of summation and with it the bits of the result are
    the same on every GPU."""

    groups: int
    vector: int
    num_warps: int

    @property
    def block(self) -> int:
        return self.groups * self.vector


def tile_config(itemsize: int, warp_size: int) -> TileConfig:
    """Eight tokens a thread, in vectors of 16 bytes: what a program does once, such as finding the
    sequence of a tile and adding up over its threads, costs as much as the loss of three tokens."""
    threads = 128
    vector = 16 // itemsize
    return TileConfig(TOKENS_PER_THREAD.value * threads // vector, vector, threads // warp_size)


def policy_loss_fwd(
    batch: Batch, terms: TokenLoss, write_grad: bool, metrics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches: the loss and gradient of every tile, then the sum of their partial results.
    A ratio of the whole sequence takes a launch before them, one program a sequence.

    Returns what ``policy_loss_fwd`` of closed_form.py returns, except that the gradient of float16
    log-probs is kept in float32 until it is scaled: DeltaL weights underflow in float16.
    """
    log_probs = batch.log_probs
    device = log_probs.device
    tokens = log_probs.numel()
    sequences = batch.weights.shape[0]
    num_extras = len(kind_of(terms).extra_names) if metrics else 0
    grad_dtype = torch.float32 if log_probs.dtype == torch.float16 else log_probs.dtype
    loss = torch.empty((), dtype=torch.float32, device=device)
    sums = torch.empty(num_sums(terms) if metrics else 0, dtype=torch.float32, device=device)
    grad = torch.empty(log_probs.shape if write_grad else 0, dtype=grad_dtype, device=device)
    if tokens == 0 or sequences == 0:
        return loss.zero_(), grad.zero_(), sums.zero_()

    of_tokens = _of_tokens(batch, tokens)
    # What has one value a sequence may be a slice at any address.
    advantages = _of_sequences(batch.advantages, of_tokens.advantages, sequences)
    policy_weights = _of_sequences(batch.policy_weights, of_tokens.policy_weights, sequences)
    cu_seqlens = contiguous(batch.cu_seqlens, sequences + 1)
    length = tokens if cu_seqlens is not None else log_probs.shape[1]
    of_token = (
        device_terms(terms),
        kl_terms(terms, batch.ref_log_probs),
        rollout_terms(terms.rollout, batch.rollout_log_probs),
    )
    config = tile_config(log_probs.element_size(), target().warp_size)
    programs = -(-tokens // config.block)
    partials = torch.empty((1 + len(sums), programs), dtype=torch.float32, device=device)
    means, ratio_grads, rollouts = _outputs_of_sequences(batch, of_tokens, terms, write_grad)
    with torch.accelerator.device_index(device.index):
        if means is not None or ratio_grads is not None or rollouts is not None:
            # Of the KL term only a correction has a part in the derivative through the ratio.
            through_ratio = of_tokens
            if not _corrected(batch, terms):
                through_ratio = of_tokens._replace(ref_log_probs=None)
            policy_loss_sequence_kernel[(sequences,)](
                through_ratio, advantages, policy_weights, cu_seqlens, means, ratio_grads,
                rollouts, tokens, length, *of_token,
                MEAN=terms.ratio_level != "sequence_sum", BLOCK=512, num_warps=2 * config.num_warps,
            )  # fmt: skip
        policy_loss_fwd_kernel[(programs,)](
            of_tokens, contiguous(batch.weights, sequences), advantages, policy_weights,
            cu_seqlens, means, ratio_grads, rollouts, grad if write_grad else None, partials,
            tokens, length, sequences, *of_token, METRICS=metrics,
            NUM_EXTRAS=num_extras,
            GROUPS=config.groups, VECTOR=config.vector, num_warps=config.num_warps,
        )  # fmt: skip
        reduce_partials(partials, loss, sums, rollout=batch.rollout_log_probs is not None)
    return loss, grad, sums


def policy_loss_bwd(grad: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * grad_output in ``dtype``; in place when that is the dtype of ``grad``."""
    in_place = grad.dtype == dtype
    out = grad if in_place else torch.empty_like(grad, dtype=dtype)
    if grad.numel() == 0:
        return out
    block = 2048
    with torch.accelerator.device_index(grad.device.index):
        policy_loss_bwd_kernel[(triton.cdiv(grad.numel(), 2 * block),)](
            grad, grad_output, out, grad.numel(), IN_PLACE=in_place, BLOCK=block,
            num_warps=256 // target().warp_size,
        )  # fmt: skip
    return out


def device_terms(terms: TokenLoss) -> TokenTerms:
    """``terms`` as kernels take them, but for the KL term and the rollout correction: within one
    record Triton 3.6 takes another for a third."""
    surrogate = kind_of(terms).device(), terms.settings
    return TokenTerms(surrogate, terms.log_ratio_clamp, terms.token_clip or None)


def kl_terms(terms: TokenLoss, ref_log_probs: Tensor | None) -> KLTerms | None:
    if ref_log_probs is None:
        return None
    return KLTerms(
        terms.beta,
        KL_FUNCTIONS[terms.kl.estimator],
        terms.kl.clamps,
        None if terms.kl.gradient == "own" else surrogates.k2,
        1 if terms.kl.gradient == "unbiased" else None,
        1 if terms.bias_corrected_kl else None,
    )


def rollout_terms(rollout: Rollout, log_probs: Tensor | None) -> RolloutTerms | None:
    if log_probs is None:
        return None
    bound = rollout_kernels.truncate if rollout.mode == "truncate" else rollout_kernels.mask
    log_weights = {"sequence": rollout_kernels.total, "geometric": rollout_kernels.mean}
    unscored = rollout.unscored
    if unscored is not None:  # as the log-probs hold it
        unscored = float(torch.tensor(unscored).to(log_probs.dtype))
    return RolloutTerms(
        (bound, rollout.bounds),
        1 if rollout.level == "token" else None,
        log_weights.get(rollout.level),
        rollout.token_bounds or None,
        rollout.sequence_bounds or None,
        unscored,
    )


def reduce_partials(partials: Tensor, loss: Tensor, sums: Tensor, rollout: bool = False) -> None:
    """Combines the columns of ``partials``, (1 + sums, programs); the last row is a maximum if it
    is of a ``rollout`` correction."""
    second_maximum = len(sums) if rollout else 0
    policy_loss_reduce_kernel[(partials.shape[0],)](
        partials, loss, sums, partials.shape[1], second_maximum, BLOCK=512, num_warps=4
    )


def contiguous(values: Tensor | None, count: int) -> Tensor | None:
    """``values`` as kernels read them, ``count`` numbers one after the other: a copy if need be."""
    if values is None:
        return None
    if values.numel() != count:
        raise ValueError(f"a kernel reads {count} values, got {tuple(values.shape)}")
    return values if values.is_contiguous() else values.contiguous()


def aligned(values: Tensor | None, count: int) -> Tensor | None:
    """The same, from a multiple of 16 bytes on, as vector loads need it."""
    values = contiguous(values, count)
    return values if values is None or values.data_ptr() % 16 == 0 else values.clone()


def _of_tokens(batch: Batch, tokens: int) -> TokenStreams:
    def per_token(values: Tensor | None) -> Tensor | None:
        # Where T = 1 a value per sequence is one per token as well, but of another kernel.
        of_sequences = values is None or values.shape == (batch.weights.shape[0], 1)
        return None if of_sequences else values

    return TokenStreams(
        aligned(batch.log_probs, tokens),
        aligned(batch.old_log_probs, tokens),
        aligned(batch.ref_log_probs, tokens),
        aligned(per_token(batch.advantages), tokens),
        aligned(batch.mask, tokens),
        aligned(per_token(batch.policy_weights), tokens),
        aligned(batch.rollout_log_probs, tokens),
    )


def _of_sequences(values: Tensor | None, of_tokens: Tensor | None, sequences: int) -> Tensor | None:
    return None if of_tokens is not None else contiguous(values, sequences)


def _corrected(batch: Batch, terms: TokenLoss) -> bool:
    """Whether there is a KL term that the derivative through the ratio has a part of."""
    return terms.bias_corrected_kl and terms.beta > 0 and batch.ref_log_probs is not None


def _outputs_of_sequences(
    batch: Batch, of_tokens: TokenStreams, terms: TokenLoss, write_grad: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What the sequence kernel writes: the mean log-ratios, the derivatives through them, and what
    a rollout correction makes of sequences.

    Where the terms of a sequence's tokens differ, the derivative through its ratio is their mean;
    elsewhere that mean is every token's own.
    """
    uneven = (
        of_tokens.advantages is not None
        or of_tokens.policy_weights is not None
        or kind_of(terms).uses_log_prob
        or _corrected(batch, terms)
        or (of_tokens.rollout_log_probs is not None and needs_tokens(terms.rollout))
    )
    corrects = of_tokens.rollout_log_probs is not None and needs_sequences(terms.rollout)
    means = terms.ratio_level != "token" and batch.old_log_probs is not None
    ratio_grads = write_grad and terms.ratio_level == "sequence" and uneven
    return (
        torch.empty_like(batch.weights) if means else None,
        torch.empty_like(batch.weights) if ratio_grads else None,
        batch.weights.new_empty(2, batch.sequences) if corrects else None,
    )
