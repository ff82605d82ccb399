"""The autograd Functions of the losses over logits and hidden states, and their operators.

As in autograd.py the gradient is final in the forward pass and backward scales it, and under
torch.compile the forward pass is one opaque operator.
"""

from __future__ import annotations

from dataclasses import astuple, fields
from types import ModuleType

import torch
from torch import Tensor

from . import logits_closed_form
from .checks import values_are_free
from .linear_chunks import ChunkOptions, linear_pass, make_plan
from .logits_closed_form import RowOutputs, RowSettings
from .metrics import NUM_METRIC_SUMS
from .options import PolicyLossOptions
from .token_rows import TokenRows

# loss, log_probs, entropy, sums of the metrics, half (see half_scale); what is not asked for is
# empty, as operators return no None.
Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def implementation(impl: str) -> ModuleType:
    """The module whose ``logits_pass`` and ``reduce_partials`` do the work."""
    if impl == "torch":
        return logits_closed_form
    from . import logits_launch  # needs Triton, which the "torch" implementation does not

    return logits_launch


def logits_forward(
    logits: Tensor, grad: Tensor | None, rows: TokenRows, settings: RowSettings, impl: str
) -> Forward:
    """Writes d loss / d logits into ``grad``, which may be ``logits``, unless it is None."""
    rows, half = half_scale(rows, torch.float32 if grad is None else grad.dtype)
    outputs = RowOutputs.zeros(rows.count, settings, logits.device)
    implementation(impl).logits_pass(logits, grad, rows, 0, settings, outputs)
    return _collect(outputs, half, impl)


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: TokenRows,
    settings: RowSettings,
    chunks: ChunkOptions,
    impl: str,
    needed: tuple[bool, bool, bool],
) -> tuple[Forward, list[Tensor]]:
    """Also returns the gradients of hidden, weight and bias; empty where not needed."""
    rows, half = half_scale(rows, hidden.dtype if any(needed) else torch.float32)
    plan = make_plan(rows, chunks)
    outputs, grads = linear_pass(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, rows, settings, plan,
        implementation(impl).logits_pass, needed,
    )  # fmt: skip
    loss, *rest = _collect(outputs, half, impl)
    if plan.overflow is not None:
        loss = torch.where(plan.overflow, torch.nan, loss)
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
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy of the N rows, without loss and gradient."""
    logits_pass = implementation(impl).logits_pass
    if weight is None:
        outputs = RowOutputs.zeros(rows.count, settings, hidden_or_logits.device)
        logits_pass(hidden_or_logits, None, rows, 0, settings, outputs)
    else:
        plan = make_plan(rows, chunks)
        hidden = hidden_or_logits.reshape(-1, hidden_or_logits.shape[-1])
        outputs, _ = linear_pass(
            hidden, weight, bias, rows, settings, plan, logits_pass, (False, False, False)
        )
        if plan.overflow is not None:
            outputs.log_probs.masked_fill_(plan.overflow, torch.nan)
    entropy = outputs.log_probs.new_empty(0) if outputs.entropy is None else outputs.entropy
    return outputs.log_probs, entropy


def _collect(outputs: RowOutputs, half: Tensor, impl: str) -> Forward:
    loss, sums = implementation(impl).reduce_partials(outputs.partials)
    if half.numel():
        loss = loss / half
    entropy = loss.new_empty(0) if outputs.entropy is None else outputs.entropy
    return loss, outputs.log_probs, entropy, sums, half


def half_scale(rows: TokenRows, dtype: torch.dtype) -> tuple[TokenRows, Tensor]:
    """DeltaL weights underflow in float16: there a power of two brings the largest weight to
    about 1, and backward takes it out again in float32."""
    assert rows.weights is not None
    if dtype != torch.float16:
        return rows, rows.weights.new_empty(0)
    scale = rows.weights.new_ones(())
    if rows.count:
        _, exponent = torch.frexp(rows.weights.nan_to_num(0.0).amax())
        scale = torch.ldexp(scale, -exponent)
    return TokenRows(**{**vars(rows), "weights": rows.weights * scale}), scale


def scale_grad(
    grad: Tensor, grad_output: Tensor, half: Tensor, dtype: torch.dtype, impl: str
) -> Tensor:
    """grad * grad_output in ``dtype``, in place where that is the dtype of ``grad``."""
    if half.numel():
        grad_output = grad_output / half
    if torch.compiler.is_compiling():
        return (grad * grad_output.view(1)).to(dtype)  # as a (1,) tensor not rounded to 16 bits
    if impl == "triton":
        from . import launch

        return launch.policy_loss_bwd(grad, grad_output, dtype)
    if values_are_free(grad_output) and bool(grad_output == 1):
        return grad.to(dtype)
    if grad.dtype == dtype:
        # A 0-dim factor is rounded to 16 bits on a GPU; a (1,) one makes a CPU copy to 32.
        return grad.mul_(grad_output if values_are_free(grad) else grad_output.view(1))
    return (grad * grad_output.view(1)).to(dtype)


def _check_backward(ctx, name: str) -> None:
    # Gradients are enabled in a backward pass exactly when create_graph=True asks for them.
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative: its gradient is computed in the forward pass. Use "
            "dl_norm.reference.policy_loss of the log-probs with create_graph=True"
        )
    if torch.compiler.is_compiling():
        return  # there nothing is scaled in place
    if ctx.scaled:
        raise RuntimeError(
            f"{name}: backward ran a second time, but the first run scaled the stored gradient in "
            f"place. Call {name} again, or add the losses before one backward."
        )
    ctx.scaled = True


# --- Operators -----------------------------------------------------------------------------------

_SCHEMA_TYPES = {
    "Tensor": "Tensor", "Tensor | None": "Tensor?", "float": "float", "float | None": "float?",
    "int | None": "int?", "bool": "bool", "str": "str",
}  # fmt: skip


def _arguments(of: type) -> str:
    """The fields of a dataclass as arguments of an operator, in their order."""
    return ", ".join(f"{_SCHEMA_TYPES[str(field.type)]} {field.name}" for field in fields(of))


_ROWS = _arguments(TokenRows)
_CHUNKS = _arguments(ChunkOptions)
_OPTIONS = _arguments(PolicyLossOptions)
_SETTINGS = f"float temperature, float? softcap, bool metrics, bool entropy, {_OPTIONS}"
_NUM_ROWS = len(fields(TokenRows))
_NUM_CHUNKS = len(fields(ChunkOptions))
_NUM_SETTINGS = 4 + len(fields(PolicyLossOptions))


def _flat(settings: RowSettings) -> tuple:
    assert settings.options is not None
    return (
        settings.temperature, settings.softcap, settings.metrics, settings.entropy,
        *astuple(settings.options),
    )  # fmt: skip


def _settings(flat: tuple) -> RowSettings:
    temperature, softcap, metrics, entropy, *options = flat
    return RowSettings(temperature, softcap, PolicyLossOptions(*options), metrics, entropy)


def _take(arguments: tuple, *counts: int) -> list[tuple]:
    """Consecutive parts of ``arguments``; the last is what remains."""
    parts = []
    for count in counts:
        parts.append(arguments[:count])
        arguments = arguments[count:]
    return [*parts, arguments]


def _fake_forward(token_ids: Tensor, flat: tuple, half: bool) -> Forward:
    _, _, metrics, entropy, *_ = flat

    def empty(*shape) -> Tensor:
        return token_ids.new_empty(shape, dtype=torch.float32)

    count = token_ids.shape[0]
    return (
        empty(), empty(count), empty(count if entropy else 0),
        empty(NUM_METRIC_SUMS if metrics else 0), empty() if half else empty(0),
    )  # fmt: skip


def _logits_op(logits: Tensor, *arguments) -> tuple[Tensor, ...]:
    rows, flat, (impl, write_grad) = _take(arguments, _NUM_ROWS, _NUM_SETTINGS)
    grad = None
    if write_grad:
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    outputs = logits_forward(logits, grad, TokenRows(*rows), _settings(flat), impl)
    return *outputs, logits.new_empty(0) if grad is None else grad


logits_op = torch.library.custom_op(
    "dl_norm::logits_policy_loss_fwd",
    _logits_op,
    mutates_args=(),
    schema=f"(Tensor logits, {_ROWS}, {_SETTINGS}, str impl, bool write_grad) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@logits_op.register_fake
def _(logits, token_ids, *arguments):
    _, flat, (_, write_grad) = _take(arguments, _NUM_ROWS - 1, _NUM_SETTINGS)
    half = write_grad and logits.dtype == torch.float16
    grad = logits.new_empty(logits.shape if write_grad else (0,))
    return *_fake_forward(token_ids, flat, half), grad


def _linear_op(hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments):
    rows, flat, chunks, (impl, *needed) = _take(arguments, _NUM_ROWS, _NUM_SETTINGS, _NUM_CHUNKS)
    outputs, grads = linear_forward(
        hidden, weight, bias, TokenRows(*rows), _settings(flat), ChunkOptions(*chunks), impl,
        tuple(needed),
    )  # fmt: skip
    return *outputs, *grads


linear_op = torch.library.custom_op(
    "dl_norm::linear_policy_loss_fwd",
    _linear_op,
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, {_ROWS}, {_SETTINGS}, {_CHUNKS}, "
    "str impl, bool hidden_grad, bool weight_grad, bool bias_grad) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@linear_op.register_fake
def _(hidden, weight, bias, token_ids, *arguments):
    _, flat, _, (_, *needed) = _take(arguments, _NUM_ROWS - 1, _NUM_SETTINGS, _NUM_CHUNKS)
    half = any(needed) and hidden.dtype == torch.float16
    grads = [
        hidden.new_empty(
            tensor.shape if need else (0,),
            dtype=torch.float32 if half and need and tensor is not hidden else hidden.dtype,
        )
        for tensor, need in zip((hidden, weight, bias), needed, strict=True)
    ]
    return *_fake_forward(token_ids, flat, half), *grads


def _log_probs_op(hidden_or_logits: Tensor, weight: Tensor | None, bias: Tensor | None, *arguments):
    token_ids, active, temperature, softcap, entropy, *chunks, impl = arguments
    return log_probs_forward(
        hidden_or_logits, weight, bias, TokenRows(token_ids, active),
        RowSettings(temperature, softcap, None, False, entropy), ChunkOptions(*chunks), impl,
    )  # fmt: skip


log_probs_op = torch.library.custom_op(
    "dl_norm::token_log_probs",
    _log_probs_op,
    mutates_args=(),
    schema="(Tensor hidden_or_logits, Tensor? weight, Tensor? bias, Tensor token_ids, "
    f"Tensor active, float temperature, float? softcap, bool entropy, {_CHUNKS}, str impl) -> "
    "(Tensor, Tensor)",
)


@log_probs_op.register_fake
def _(hidden_or_logits, weight, bias, token_ids, active, temperature, softcap, entropy, *_):
    count = token_ids.shape[0]
    return tuple(
        token_ids.new_empty(size, dtype=torch.float32) for size in (count, count if entropy else 0)
    )


# --- Functions -----------------------------------------------------------------------------------


def _rows(tensors: tuple[Tensor | None, ...]) -> TokenRows:
    return TokenRows(*tensors)  # pyright: ignore[reportArgumentType]


def _save(ctx, outputs: Forward, grads: tuple[Tensor, ...], impl: str):
    """What both Functions do at the end of forward; returns the outputs of the Function."""
    loss, log_probs, entropy, sums, half = outputs
    ctx.save_for_backward(half, *grads)
    ctx.impl = impl
    ctx.scaled = False
    ctx.mark_non_differentiable(log_probs, entropy, sums)
    return loss, log_probs, entropy, sums


class LogitsPolicyLossFunction(torch.autograd.Function):
    """Differentiable with respect to the logits alone. The rows come as the fields of TokenRows."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        logits: Tensor,
        settings: RowSettings,
        impl: str,
        in_place: bool,
        write_grad: bool,
        *rows: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if torch.compiler.is_compiling():
            *outputs, grad = logits_op(logits, *rows, *_flat(settings), impl, write_grad)
            return _save(ctx, tuple(outputs), (grad,), impl)
        grad = None
        logits = logits.detach()
        if write_grad:
            grad = logits if in_place else torch.empty_like(logits, memory_format=_CONTIGUOUS)
        outputs = logits_forward(logits, grad, _rows(rows), settings, impl)
        if grad is not None and in_place:
            # So that autograd refuses a backward elsewhere that needs the logits as they were.
            torch.autograd.graph.increment_version(logits)
        return _save(ctx, outputs, () if grad is None else (grad,), impl)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        _check_backward(ctx, "logits_policy_loss")
        half, grad = ctx.saved_tensors
        # The other outputs have no gradient.
        grad = scale_grad(grad, grad_outputs[0], half, grad.dtype, ctx.impl)
        return grad, *(None,) * (4 + _NUM_ROWS)


class LinearPolicyLossFunction(torch.autograd.Function):
    """Differentiable with respect to the hidden states, the head and its bias."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        settings: RowSettings,
        chunks: ChunkOptions,
        impl: str,
        needed: tuple[bool, bool, bool],
        *rows: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if torch.compiler.is_compiling():
            results = linear_op(
                hidden, weight, bias, *rows, *_flat(settings), *astuple(chunks), impl, *needed
            )
            outputs, grads = results[:5], results[5:]
        else:
            outputs, grads = linear_forward(
                hidden, weight, bias, _rows(rows), settings, chunks, impl, needed
            )
        ctx.needed = needed
        ctx.dtype = hidden.dtype
        return _save(ctx, outputs, tuple(grads), impl)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        _check_backward(ctx, "linear_policy_loss")
        half, *grads = ctx.saved_tensors
        scaled = [
            scale_grad(grad, grad_outputs[0], half, ctx.dtype, ctx.impl) if needed else None
            for grad, needed in zip(grads, ctx.needed, strict=True)
        ]
        return *scaled, *(None,) * (4 + _NUM_ROWS)


_CONTIGUOUS = torch.contiguous_format
