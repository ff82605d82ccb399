"""The contestants from logits and from hidden states, by suite.

Every one gets the same ΔL policy loss to compute: where a peer knows no sequence weights they ride
on the advantages, as in `bench.peers`. Peers that only make log-probs are followed by the eager
loss of their own trainer, or the reference's where they have none.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import dl_norm
import dl_norm.reference
from bench import peers
from bench.cases import EPS_HIGH, EPS_LOW, Inputs
from bench.contest import OURS, Contestant, Loss, NotHere, Prepared, our_impl, runs_kernels
from bench.heads import HeadInputs
from bench.lift import EXTRA_PATHS, lift, load_module
from dl_norm import linear_policy_loss, logits_policy_loss, token_log_probs

CLIP = {"eps_low": EPS_LOW, "eps_high": EPS_HIGH}


# ours


def _logits_in_place(inputs: HeadInputs) -> Prepared:
    (saved,) = inputs.leaves
    leaf = saved.detach().clone().requires_grad_()
    options = {**CLIP, "impl": our_impl(leaf)}
    return Prepared(
        # A view, as the logits of a model are no leaf; its gradient is the leaf's.
        lambda: logits_policy_loss(
            leaf.view_as(leaf), *inputs.loss_tensors, **options, in_place=True
        ),
        (leaf,),
        restore=lambda: leaf.detach().copy_(saved.detach()),
    )


def _logits(inputs: HeadInputs) -> Loss:
    options = {**CLIP, "impl": our_impl(inputs.mask)}
    return lambda: logits_policy_loss(*inputs.leaves, *inputs.loss_tensors, **options)


def _linear(inputs: HeadInputs, **options: Any) -> Loss:
    options = {**CLIP, "impl": our_impl(inputs.mask), **options}
    return lambda: linear_policy_loss(*inputs.leaves, *inputs.loss_tensors, **options)


def _linear_known_length(inputs: HeadInputs) -> Loss:
    return _linear(inputs, max_tokens=inputs.tokens)


def _linear_cross_entropy(inputs: HeadInputs) -> Loss:
    ones, impl = torch.ones_like(inputs.weights), our_impl(inputs.mask)
    return lambda: linear_policy_loss(
        *inputs.leaves, inputs.token_ids, None, ones, inputs.mask, inputs.weights, impl=impl
    )


def _token_log_probs(inputs: HeadInputs) -> Loss:
    options = {"mask": inputs.mask, "impl": our_impl(inputs.mask)}
    return lambda: token_log_probs(*inputs.leaves, inputs.token_ids, **options)


# plain PyTorch


def _plain_log_probs(*tensors: Tensor) -> Tensor:
    """(B, T) log-probs as they are usually written; the logits of a trainer's model are float32."""
    *leaves, token_ids = tensors
    logits = leaves[0] if len(leaves) == 1 else F.linear(*leaves)
    return logits.float().log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]


def _plain_loss(*tensors: Tensor) -> Tensor:
    *leaves, token_ids, old_log_probs, advantages, mask, weights = tensors
    log_probs = _plain_log_probs(*leaves, token_ids)
    return dl_norm.reference.policy_loss(
        log_probs, old_log_probs, advantages, mask, weights, **CLIP
    )


@functools.cache  # one compiled function for all buffer sets of a case
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)


def _plain(inputs: HeadInputs) -> Loss:
    return lambda: _plain_loss(*inputs.leaves, *inputs.loss_tensors)


def _torch_compile(inputs: HeadInputs) -> Loss:
    return lambda: _compiled(_plain_loss)(*inputs.leaves, *inputs.loss_tensors)


def _plain_no_loss(inputs: HeadInputs) -> Loss:
    mask = ~inputs.mask
    return lambda: _plain_log_probs(*inputs.leaves, inputs.token_ids).masked_fill(mask, 0.0)


def _plain_cross_entropy(hidden: Tensor, head: Tensor, token_ids: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).float().flatten(0, 1), token_ids.flatten())


def _dense_only(inputs: HeadInputs) -> None:
    if inputs.tokens != inputs.mask.numel():
        raise NotHere("compared on full batches only")


# TRL


@functools.cache
def _trl_chunked(kernels: bool) -> Any:
    utilities = {"maybe_gather_lm_head_ctx": lambda *_: contextlib.nullcontext()}
    module: Any = load_module("trl.kernels.chunked_logprob", {"trl.trainer.utils": utilities})
    module._use_triton = lambda device: kernels
    return module.ChunkedLogProbFunction


@functools.cache
def _trl_log_probs(on_gpu: bool) -> Callable[..., Tensor]:
    """TRL's selective_log_softmax: its Triton kernel on a GPU, else its eager code."""
    if on_gpu:
        kernel = load_module("trl.kernels.logprob_entropy", {}).selective_log_softmax_and_entropy
        return lambda logits, token_ids, row_mask: kernel(logits, token_ids, 1.0, row_mask)[0]
    tools = {"torch": torch, "F": F, "is_triton_available": lambda: False}
    return lift("trl.trainer.utils", "selective_log_softmax", tools)


def _trl_loss(inputs: HeadInputs, log_probs: Callable[[], Tensor]) -> Loss:
    """The lines of GRPOTrainer._compute_loss behind the log-probs."""
    stand_in = Inputs(
        torch.empty_like(inputs.old_log_probs), *inputs.loss_tensors[1:], lengths=inputs.weights,
        cu_seqlens=None, max_length=inputs.mask.shape[1],
    )  # fmt: skip
    return peers.trl_loss(stand_in, log_probs, metrics=False)


def _trl_logits(inputs: HeadInputs) -> Loss:
    function = _trl_log_probs(runs_kernels(inputs.mask))
    mask = inputs.mask.long()
    return _trl_loss(inputs, lambda: function(*inputs.leaves, inputs.token_ids, row_mask=mask))


def _trl_only_log_probs(inputs: HeadInputs) -> Loss:
    function = _trl_log_probs(runs_kernels(inputs.mask))
    mask = inputs.mask.long()
    return lambda: function(*inputs.leaves, inputs.token_ids, row_mask=mask)


def _trl_linear(inputs: HeadInputs) -> Loss:
    function = _trl_chunked(runs_kernels(inputs.mask))
    hidden, head = inputs.leaves
    mask, token_ids = inputs.mask, inputs.token_ids
    compact = runs_kernels(mask)  # as `add_fused_lm_head` of TRL does, with its host sync

    def log_probs() -> Tensor:
        rows = hidden[mask] if compact else hidden.flatten(0, 1)
        targets = token_ids[mask] if compact else token_ids.flatten()
        found = function.apply(rows, head, None, targets, 1.0, 32_768, None, 1.0, ())[0]
        if compact:
            return found.new_zeros(mask.shape).masked_scatter(mask, found)
        return found.view(mask.shape)

    return _trl_loss(inputs, log_probs)


# verl


@functools.cache
def _verl_kernel() -> Any:
    device = ModuleType("verl.utils.device")
    vars(device).update(
        get_device_capability=torch.cuda.get_device_capability,
        get_device_name=lambda: "cuda",
        is_cuda_available=torch.cuda.is_available(),
        get_torch_device=lambda: torch.cuda,
    )
    packages = {name: ModuleType(name) for name in ("verl", "verl.utils")}
    with mock.patch.dict(sys.modules, {**packages, "verl.utils.device": device}):
        load_module("verl.utils.kernel.kernels", {})
    return load_module("verl.utils.kernel.linear_cross_entropy", {}).linear_cross_entropy


def _verl_linear(inputs: HeadInputs) -> Loss:
    if not inputs.mask.is_cuda:
        raise NotHere("verl's kernel runs on a GPU only")
    kernel = _verl_kernel()
    hidden, head = inputs.leaves
    advantages = (inputs.advantages * inputs.weights)[:, None].expand_as(inputs.mask).contiguous()

    def loss() -> Tensor:
        log_probs, _ = kernel(hidden, head, inputs.token_ids, 1.0, "none")
        return peers.verl_loss(
            inputs.old_log_probs, log_probs.view_as(inputs.mask), advantages, inputs.mask
        )

    return loss


# Liger-Kernel, Apple CCE, QuACK


def _installed(module: str, package: str) -> Any:
    for path in EXTRA_PATHS:
        if path not in sys.path:
            sys.path.append(path)
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise NotHere(f"{package} cannot be imported: {problem}") from problem


def _liger_logits(inputs: HeadInputs) -> Prepared:
    ops = _installed("liger_kernel.transformers.grpo_loss", "liger-kernel")
    if not (runs_kernels(inputs.mask) or os.environ.get("TRITON_INTERPRET") == "1"):
        raise NotHere("Liger's Triton kernels run on a GPU only")
    (leaf,) = inputs.leaves
    batch, length, vocabulary = leaf.shape
    # It wants one position more than tokens, and overwrites the logits with their gradient.
    logits = leaf.new_zeros(batch, length + 1, vocabulary)
    saved = leaf.detach()
    logits.requires_grad_()
    mask = inputs.mask.int()
    # Its loss is divided by B * max_completion_length.
    advantages = inputs.advantages * inputs.weights * (batch * length)

    def loss() -> Tensor:
        return ops.triton_grpo_loss(
            logits.view_as(logits), inputs.old_log_probs, None, inputs.token_ids, advantages, mask,
            temperature=1.0, beta=0.0, eps_low=EPS_LOW, eps_high=EPS_HIGH, loss_type="dr_grpo",
            max_completion_length=length, reduce=True,
        )[0]  # fmt: skip

    return Prepared(
        loss,
        (logits,),
        gradients=lambda gradients: (gradients[0][:, :-1].contiguous(),),
        restore=lambda: logits.detach()[:, :-1].copy_(saved),
    )


def _liger_log_probs(inputs: HeadInputs) -> Loss:
    ops = _installed("liger_kernel.ops.grpo_loss", "liger-kernel")
    if not runs_kernels(inputs.mask):
        raise NotHere("Liger's Triton kernels run on a GPU only")
    (leaf,) = inputs.leaves
    logits = F.pad(leaf.detach(), (0, 0, 0, 1))
    mask = inputs.mask.int()
    return lambda: ops.fused_selective_log_softmax(logits, inputs.token_ids, 1.0, mask)


def _liger_chunked(inputs: HeadInputs) -> Loss:
    chunked = _installed("liger_kernel.chunked_loss", "liger-kernel")
    batch, length = inputs.mask.shape
    function = chunked.LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=EPS_LOW, epsilon_high=EPS_HIGH,
        loss_type="dr_grpo", max_completion_length=length,
    )  # fmt: skip
    mask = inputs.mask.int()
    advantages = inputs.advantages * inputs.weights * (batch * length)
    hidden, head = inputs.leaves
    return lambda: function(
        hidden, head, inputs.token_ids, mask, advantages,
        old_per_token_logps=inputs.old_log_probs,
    )[0]  # fmt: skip


def _reference_loss(inputs: HeadInputs, log_probs: Tensor) -> Tensor:
    _, old_log_probs, advantages, mask, weights = inputs.loss_tensors
    return dl_norm.reference.policy_loss(
        log_probs.view_as(mask), old_log_probs, advantages, mask, weights, **CLIP
    )


def _liger_scaled(inputs: HeadInputs) -> Loss:
    ops = _installed("liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger-kernel")
    function = ops.LigerFusedLinearScaledCrossEntropyFunction
    hidden, head = inputs.leaves
    targets = inputs.token_ids.masked_fill(~inputs.mask, -100).flatten()
    return lambda: _reference_loss(inputs, -function.apply(hidden.flatten(0, 1), head, targets))


def _liger_cross_entropy(inputs: HeadInputs) -> Loss:
    _dense_only(inputs)
    ops = _installed("liger_kernel.ops.fused_linear_cross_entropy", "liger-kernel")
    if not inputs.mask.is_cuda:
        raise NotHere("Liger's Triton kernels run on a GPU only")
    hidden, head = inputs.leaves
    function = ops.LigerFusedLinearCrossEntropyFunction
    targets = inputs.token_ids.flatten()
    return lambda: function.apply(hidden.flatten(0, 1), head, targets)[0]


def _cce(inputs: HeadInputs) -> Callable[..., Tensor]:
    cce = _installed("cut_cross_entropy", "cut-cross-entropy")
    if not inputs.mask.is_cuda:
        raise NotHere("Apple's kernels run on a GPU only")
    return cce.linear_cross_entropy


def _cce_linear(inputs: HeadInputs) -> Loss:
    function = _cce(inputs)
    hidden, head = inputs.leaves
    targets = inputs.token_ids.masked_fill(~inputs.mask, -100)
    return lambda: _reference_loss(inputs, -function(hidden, head, targets, reduction="none"))


def _cce_cross_entropy(inputs: HeadInputs) -> Loss:
    _dense_only(inputs)
    function = _cce(inputs)
    return lambda: function(*inputs.leaves, inputs.token_ids)


def _quack_cross_entropy(inputs: HeadInputs) -> Loss:
    _dense_only(inputs)
    quack = _installed("quack.linear_cross_entropy", "quack-kernels")
    if not inputs.mask.is_cuda:
        raise NotHere("QuACK's kernels run on a GPU only")
    hidden, head = inputs.leaves
    targets = inputs.token_ids.flatten()
    return lambda: quack.chunked_linear_cross_entropy(hidden.flatten(0, 1), head, targets)


def _cross_entropy(inputs: HeadInputs, function: Callable[..., Tensor]) -> Loss:
    _dense_only(inputs)
    return lambda: function(*inputs.leaves, inputs.token_ids)


_PLAIN = Contestant("plain", "float32 log_softmax, gather, the reference's loss", _plain)
_COMPILED = Contestant("torch.compile", "the plain code compiled for this shape", _torch_compile)

CONTESTANTS: dict[str, tuple[Contestant, ...]] = {
    "logits": (
        Contestant(OURS, "logits_policy_loss with in_place=True", _logits_in_place),
        Contestant("dl_norm copy", "logits_policy_loss, the gradient in a new buffer", _logits),
        _PLAIN,
        _COMPILED,
        Contestant("TRL", "selective_log_softmax (kernel on a GPU), TRL's eager loss", _trl_logits),
        Contestant("Liger", "triton_grpo_loss, in place as is its default", _liger_logits),
    ),
    "token_log_probs": (
        Contestant(OURS, "token_log_probs", _token_log_probs),
        Contestant("plain", "float32 log_softmax and gather", _plain_no_loss),
        Contestant("TRL", "selective_log_softmax (kernel on a GPU)", _trl_only_log_probs),
        Contestant("Liger", "fused_selective_log_softmax", _liger_log_probs),
    ),
    "linear": (
        Contestant(OURS, "linear_policy_loss", _linear),
        Contestant(
            "dl_norm max_tokens",
            "linear_policy_loss, the number of counted tokens told by the host",
            _linear_known_length,
        ),
        _PLAIN,
        _COMPILED,
        Contestant("TRL", "ChunkedLogProbFunction as TRL calls it, TRL's eager loss", _trl_linear),
        Contestant("Liger chunked", "LigerFusedLinearGRPOLoss, compiled", _liger_chunked),
        Contestant(
            "Liger scaled CE",
            "fused linear scaled cross-entropy (CuTe on Hopper, else chunked PyTorch), the "
            "reference's loss",
            _liger_scaled,
        ),
        Contestant("verl", "verl's linear_cross_entropy kernel, verl's eager loss", _verl_linear),
        Contestant("CCE", "cut_cross_entropy with its filter, the reference's loss", _cce_linear),
    ),
    "cross_entropy": (
        Contestant(OURS, "linear_policy_loss with ratio 1 and advantage 1", _linear_cross_entropy),
        Contestant(
            "plain",
            "F.linear and F.cross_entropy of float32 logits",
            lambda inputs: _cross_entropy(inputs, _plain_cross_entropy),
        ),
        Contestant(
            "torch.compile",
            "the plain code compiled for this shape",
            lambda inputs: _cross_entropy(inputs, _compiled(_plain_cross_entropy)),
        ),
        Contestant("Liger FLCE", "LigerFusedLinearCrossEntropyFunction", _liger_cross_entropy),
        Contestant("CCE", "cut_cross_entropy with its filter", _cce_cross_entropy),
        Contestant("QuACK", "chunked_linear_cross_entropy", _quack_cross_entropy),
    ),
}
