"""The autograd Functions of the losses over logits and hidden states, and their operators.

As in autograd.py the gradient is final in the forward pass and backward scales it, and under
torch.compile the forward pass is one opaque operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_first_derivative, has_no_values, one_gradient
from .._kept.head_grad import dense
from .._kept.passes import kept_forward, kept_log_probs_forward
from .._kept.sets import KeptSets
from .._operators import operator
from .._options import num_sums
from .chunks import ChunkOptions
from .passes import Forward, linear_forward, log_probs_forward, logits_forward, scale_grad
from .records import RowSettings, TokenRows, VocabShard

_CONTIGUOUS = torch.contiguous_format


def _fake_forward(rows: TokenRows, settings: RowSettings, half: bool) -> Forward:
    assert settings.terms is not None

    def empty(*shape) -> Tensor:
        return rows.token_ids.new_empty(shape, dtype=torch.float32)

    return (
        empty(), empty(rows.count), empty(rows.count if settings.entropy else 0),
        empty(rows.count if settings.sum_sq_probs else 0),
        empty(num_sums(settings.terms) if settings.metrics else 0), empty() if half else empty(0),
    )  # fmt: skip


@operator("logits_policy_loss_fwd", outputs=7)
def logits_op(
    logits: Tensor, rows: TokenRows, settings: RowSettings, impl: str, write_grad: bool
) -> tuple[Tensor, ...]:
    grad = None
    if write_grad:
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    outputs = logits_forward(logits, grad, rows, settings, impl)
    return *outputs, logits.new_empty(0) if grad is None else grad


@logits_op.fake
def _(
    logits: Tensor, rows: TokenRows, settings: RowSettings, impl: str, write_grad: bool
) -> tuple[Tensor, ...]:
    grad = logits.new_empty(logits.shape if write_grad else (0,))
    return *_fake_forward(rows, settings, write_grad and logits.dtype == torch.float16), grad


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: TokenRows,
    settings: RowSettings,
    chunks: ChunkOptions,
    kept: KeptSets | None,
    impl: str,
    needed: tuple[bool, ...],
) -> tuple[Forward, list[Tensor]]:
    if kept is None:
        return linear_forward(hidden, weight, bias, rows, settings, chunks, impl, needed)
    return kept_forward(hidden, weight, bias, rows, settings, kept, impl, needed)


@operator("linear_policy_loss_fwd", outputs=9)
def linear_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: TokenRows,
    settings: RowSettings,
    chunks: ChunkOptions,
    kept: KeptSets | None,
    impl: str,
    needed: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    outputs, grads = _forward(hidden, weight, bias, rows, settings, chunks, kept, impl, needed)
    return *outputs, *map(dense, grads)


@linear_op.fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: TokenRows,
    settings: RowSettings,
    *others: Any,
) -> tuple[Tensor, ...]:
    *_, needed = others
    half = any(needed) and hidden.dtype == torch.float16
    grads = [
        hidden.new_empty(
            tensor.shape if need and tensor is not None else (0,),
            dtype=torch.float32 if half and need and tensor is not hidden else hidden.dtype,
        )
        for tensor, need in zip((hidden, weight, bias), needed, strict=True)
    ]
    return *_fake_forward(rows, settings, half), *grads


@operator("token_log_probs", outputs=3)
def log_probs_op(
    hidden_or_logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    token_ids: Tensor,
    active: Tensor,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    sum_sq_probs: bool,
    shard: VocabShard,
    chunks: ChunkOptions,
    kept: KeptSets | None,
    impl: str,
) -> tuple[Tensor, ...]:
    settings = RowSettings(
        temperature, softcap, entropy=entropy, sum_sq_probs=sum_sq_probs, shard=shard
    )
    rows = TokenRows(token_ids, active)
    return token_log_probs_forward(
        hidden_or_logits, weight, bias, rows, settings, chunks, kept, impl
    )


@log_probs_op.fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _, _, _, token_ids, _, _, _, entropy, sum_sq_probs, *_ = arguments
    count = token_ids.shape[0]
    sizes = count, count if entropy else 0, count if sum_sq_probs else 0
    return tuple(token_ids.new_empty(size, dtype=torch.float32) for size in sizes)


def token_log_probs_forward(
    hidden_or_logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: TokenRows,
    settings: RowSettings,
    chunks: ChunkOptions,
    kept: KeptSets | None,
    impl: str,
) -> tuple[Tensor, ...]:
    """Log-probs, entropy and sum_sq_probs of the N rows, without loss and gradient."""
    tensors = hidden_or_logits, weight, bias
    if has_no_values(rows.token_ids):
        return log_probs_op(
            *tensors, rows.token_ids, rows.active, settings.temperature, settings.softcap,
            settings.entropy, settings.sum_sq_probs, settings.shard, chunks, kept, impl,
        )  # fmt: skip
    if kept is None:
        return log_probs_forward(*tensors, rows, settings, chunks, impl)
    assert weight is not None
    return kept_log_probs_forward(hidden_or_logits, weight, bias, rows, settings, kept, impl)


def _check_backward(ctx, name: str) -> None:
    check_first_derivative(name)
    if torch.compiler.is_compiling():
        return  # there nothing is scaled in place
    if ctx.scaled:
        raise RuntimeError(
            f"{name}: backward ran a second time, but the first run scaled the stored gradient in "
            f"place. Call {name} again, or add the losses before one backward."
        )
    ctx.scaled = True


def _save(ctx, outputs: Forward, grads: tuple[Tensor, ...], impl: str):
    """What both Functions do at the end of forward; returns the outputs of the Function."""
    loss, *rest, half = outputs
    ctx.save_for_backward(half, *grads)
    ctx.impl = impl
    ctx.scaled = False
    ctx.mark_non_differentiable(*rest)
    return loss, *rest


class LogitsPolicyLossFunction(torch.autograd.Function):
    """Differentiable with respect to the logits alone."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        logits: Tensor,
        rows: TokenRows,
        settings: RowSettings,
        impl: str,
        in_place: bool,
        write_grad: bool,
    ) -> tuple[Tensor, ...]:
        if has_no_values(logits):
            *outputs, grad = logits_op(logits, rows, settings, impl, write_grad)
            return _save(ctx, tuple(outputs), (grad,), impl)
        grad = None
        logits = logits.detach()
        if write_grad:
            grad = logits if in_place else torch.empty_like(logits, memory_format=_CONTIGUOUS)
        outputs = logits_forward(logits, grad, rows, settings, impl)
        if grad is not None and in_place:
            # So that autograd refuses a backward elsewhere that needs the logits as they were.
            torch.autograd.graph.increment_version(logits)
        return _save(ctx, outputs, () if grad is None else (grad,), impl)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        _check_backward(ctx, "logits_policy_loss")
        half, grad = ctx.saved_tensors
        # The other outputs have no gradient.

        def scale(grad_output: Tensor) -> Tensor:
            return scale_grad(grad, grad_output, half, grad.dtype, ctx.impl)

        return one_gradient("logits_policy_loss", grad_outputs[0], scale), *(None,) * 5


class LinearPolicyLossFunction(torch.autograd.Function):
    """Differentiable with respect to the hidden states, the head and its bias."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: TokenRows,
        settings: RowSettings,
        chunks: ChunkOptions,
        kept: KeptSets | None,
        impl: str,
        needed: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        if has_no_values(hidden):
            results = linear_op(hidden, weight, bias, rows, settings, chunks, kept, impl, needed)
            outputs, grads = results[:-3], results[-3:]
        else:
            outputs, grads = _forward(
                hidden, weight, bias, rows, settings, chunks, kept, impl, needed
            )
        ctx.needed = needed
        ctx.dtype = hidden.dtype
        return _save(ctx, outputs, tuple(grads), impl)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        _check_backward(ctx, "linear_policy_loss")
        half, *grads = ctx.saved_tensors

        def scaled(grad: Tensor, grad_output: Tensor) -> Tensor:
            few = not torch.compiler.is_compiling() and grad.is_sparse
            values = grad.values() if few else grad
            values = scale_grad(values, grad_output, half, ctx.dtype, ctx.impl)
            return dense(grad, values) if few else values

        def scale(grad_output: Tensor) -> list[Tensor | None]:
            return [
                scaled(grad, grad_output) if needed else None
                for grad, needed in zip(grads, ctx.needed, strict=True)
            ]

        return *one_gradient("linear_policy_loss", grad_outputs[0], scale), *(None,) * 6
