"""The forward passes over rows, by either implementation, and the scaling of their gradients."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from .._checks import values_are_free
from . import closed_form as logits_closed_form
from .chunks import ChunkOptions, ChunkPlan, linear_pass, make_plan
from .records import RowOutputs, RowSettings, TokenRows
from .vocab_parallel import check_agreement, row_pass

# loss, log_probs, entropy, sum_sq_probs, sums of the metrics, half (see half_scale); what is not
# asked for is empty, as operators return no None.
Forward = tuple[Tensor, ...]


def implementation(impl: str) -> ModuleType:
    """The module whose ``logits_pass`` and ``reduce_partials`` do the work."""
    if impl == "torch":
        return logits_closed_form
    from . import launch as logits_launch  # needs Triton, which the "torch" implementation does not

    return logits_launch


def logits_forward(
    logits: Tensor, grad: Tensor | None, rows: TokenRows, settings: RowSettings, impl: str
) -> Forward:
    """Writes d loss / d logits into ``grad``, which may be ``logits``, unless it is None."""
    rows, half = half_scale(rows, torch.float32 if grad is None else grad.dtype)
    outputs = RowOutputs.zeros(rows.count, settings, logits.device)
    differ = check_agreement(rows, settings.shard)
    row_pass(implementation(impl), settings.shard)(logits, grad, rows, 0, settings, outputs)
    loss, *rest = _collect(outputs, half, settings, impl)
    return nan_where(differ, loss), *rest


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: TokenRows,
    settings: RowSettings,
    chunks: ChunkOptions,
    impl: str,
    needed: tuple[bool, ...],
) -> tuple[Forward, list[Tensor]]:
    """Also returns the gradients of hidden, weight and bias; empty where not needed."""
    rows, half = half_scale(rows, hidden.dtype if any(needed) else torch.float32)
    plan = make_plan(rows, chunks)
    differ = check_agreement(rows, settings.shard, **_sizes(plan, hidden))
    outputs, grads = linear_pass(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, rows, settings, plan,
        row_pass(implementation(impl), settings.shard), needed,
    )  # fmt: skip
    loss, *rest = _collect(outputs, half, settings, impl)
    loss = nan_where(differ, nan_where(plan.overflow, loss))
    # float16 stays in float32 until backward has scaled it; elsewhere nothing is gained by that.
    finals = [hidden.new_empty(0) if grad is None else grad for grad in grads]
    if hidden.dtype != torch.float16:
        finals = [grad.to(hidden.dtype) for grad in finals]
    if needed[0]:
        finals[0] = finals[0].view(hidden.shape)
    return (loss, *rest), finals  # pyright: ignore[reportReturnType]


def log_probs_forward(
    hidden_or_logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: TokenRows,
    settings: RowSettings,
    chunks: ChunkOptions,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropy and sum_sq_probs of the N rows, without loss and gradient."""
    logits_pass = row_pass(implementation(impl), settings.shard)
    if weight is None:
        outputs = RowOutputs.zeros(rows.count, settings, hidden_or_logits.device)
        wrong = check_agreement(rows, settings.shard)
        logits_pass(hidden_or_logits, None, rows, 0, settings, outputs)
    else:
        plan = make_plan(rows, chunks)
        wrong = check_agreement(rows, settings.shard, **_sizes(plan, hidden_or_logits))
        if plan.overflow is not None:
            wrong = plan.overflow if wrong is None else wrong | plan.overflow
        hidden = hidden_or_logits.reshape(-1, hidden_or_logits.shape[-1])
        outputs, _ = linear_pass(
            hidden, weight, bias, rows, settings, plan, logits_pass, (False, False, False)
        )
    if wrong is not None:
        outputs.log_probs.masked_fill_(wrong, torch.nan)
    return outputs.log_probs, *_or_empty(outputs)


def _collect(outputs: RowOutputs, half: Tensor, settings: RowSettings, impl: str) -> Forward:
    reduce_partials = implementation(impl).reduce_partials
    loss, sums = reduce_partials(outputs.partials, settings.with_rollout)
    if half.numel():
        loss = loss / half
    return loss, outputs.log_probs, *_or_empty(outputs), sums, half


def _or_empty(outputs: RowOutputs) -> tuple[Tensor, Tensor]:
    """entropy and sum_sq_probs"""
    entropy, sum_sq_probs = (
        outputs.log_probs.new_empty(0) if values is None else values
        for values in (outputs.entropy, outputs.sum_sq_probs)
    )
    return entropy, sum_sq_probs


def nan_where(wrong: Tensor | None, loss: Tensor) -> Tensor:
    return loss if wrong is None else torch.where(wrong, torch.nan, loss)


def _sizes(plan: ChunkPlan, hidden: Tensor) -> dict[str, int]:
    """What processes that share a head must agree on."""
    sizes = {"tokens that go through the head": plan.tokens, "tokens of a chunk": plan.chunk}
    return {**sizes, "size of a hidden state": hidden.shape[-1]}


def half_scale(rows: TokenRows, dtype: torch.dtype) -> tuple[TokenRows, Tensor]:
    """DeltaL weights underflow in float16: there a power of two brings the largest weight to
    about 1, and backward takes it out again in float32."""
    assert rows.weights is not None
    if dtype != torch.float16:
        return rows, rows.weights.new_empty(0)
    scale = rows.weights.new_ones(())
    if rows.count:
        largest = rows.weights.nan_to_num(0.0).amax()
        if rows.entropy_weights is not None:
            largest = torch.maximum(largest, rows.entropy_weights.nan_to_num(0.0).abs().amax())
        _, exponent = torch.frexp(largest)
        scale = torch.ldexp(scale, -exponent)
    entropy_weights = None if rows.entropy_weights is None else rows.entropy_weights * scale
    return replace(rows, weights=rows.weights * scale, entropy_weights=entropy_weights), scale


def scale_grad(
    grad: Tensor, grad_output: Tensor, half: Tensor, dtype: torch.dtype, impl: str
) -> Tensor:
    """grad * grad_output in ``dtype``, in place where that is the dtype of ``grad``."""
    if half.numel():
        grad_output = grad_output / half
    if torch.compiler.is_compiling():
        return (grad * grad_output.view(1)).to(dtype)  # as a (1,) tensor not rounded to 16 bits
    if impl == "triton":
        from .._log_probs import launch

        return launch.policy_loss_bwd(grad, grad_output, dtype)
    if values_are_free(grad_output) and bool(grad_output == 1):
        return grad.to(dtype)
    if grad.dtype == dtype:
        # A 0-dim factor is rounded to 16 bits on a GPU; a (1,) one makes a CPU copy to 32.
        return grad.mul_(grad_output if values_are_free(grad) else grad_output.view(1))
    return (grad * grad_output.view(1)).to(dtype)
