"""The policy loss over hidden states: the head's matrix products and the loss, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import LOG_PROB_DTYPES, values_are_free
from .functional import _choose
from .logits import (
    PolicyLossOutputs,
    check_and_flatten,
    check_first_backward,
    check_logits,
    half_scale,
    implementation,
    row_settings,
    scale_grad,
    with_outputs,
)
from .logits_closed_form import RowOutputs, RowSettings
from .options import PolicyLossOptions
from .token_rows import TokenRows

# Tokens in a chunk. Adding a chunk to the float32 head gradient moves 8 V D bytes, on a GPU
# 1053 / chunk of the time of that chunk's matrix product (H100): never below 4096 there. A CPU
# multiplies so slowly that a chunk may be small, and with it the memory.
GPU_CHUNK = 4096
CPU_CHUNK = 512


# torch.compile breaks its graph here and calls the function as it is.
@torch.compiler.disable
def linear_policy_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int | None = None,
    fp32_logits: bool = False,
    max_tokens: int | None = None,
    compact: bool = False,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    ref_log_probs: Tensor | None = None,
    beta: float = 0.0,
    rollout_weights: Tensor | None = None,
    impl: str | None = None,
    entropy: bool = False,
    return_log_probs: bool = False,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, PolicyLossOutputs]:
    r""":func:`dl_norm.logits_policy_loss` of logits = hidden @ lm_head_weight.T + bias.

    The logits exist for one chunk of tokens at a time. As their gradient is known in the forward
    pass, so are those of ``hidden`` and of the head: three matrix products in all, and the backward
    pass only scales what is stored. The head's gradient is summed over chunks in float32.

    Tokens that count for nothing (mask 0, or advantage 0 where neither a KL term nor an output is
    asked for) can be left out of the matrix products. How many are left has to be known on the
    host, so on a GPU there are three ways: by default every token goes through (no host sync);
    ``max_tokens`` says an upper bound (no host sync); ``compact=True`` counts them (one host
    sync). On a CPU they are always left out.

    Args:
        hidden: (B, T, D), or (N, D) with ``cu_seqlens``; float32, bfloat16 or float16. Row t
            predicts ``token_ids[t]``.
        lm_head_weight: (V, D), of the dtype of ``hidden``; under autocast both are cast. Frozen
            (requires_grad False): its matrix product is skipped.
        bias: (V,), or None.
        temperature, entropy, return_log_probs, return_metrics, and the tensors and options of the
            loss: as for :func:`dl_norm.logits_policy_loss`.
        logit_softcap: c > 0: logits become c tanh(logits / c), before the temperature. Or None.
        chunk_size: the least number of tokens in a chunk, unless there are fewer; a chunk has less
            than twice as many. Memory is one chunk's logits, at most 2 chunk_size * V elements.
            None: 4096 on a GPU, 512 on a CPU.
        fp32_logits: keep the logits of half-precision matrix products in float32. A bfloat16 logit
            between 16 and 32 is rounded to 0.125, up to 6 % of a ratio. Costs 3 times the memory
            of a chunk.
        max_tokens: an upper bound of the number of tokens with mask != 0, if the host knows one.
            If there are more, ValueError on a CPU; on a GPU the loss is NaN.
        compact: see above.

    Returns:
        A 0-dim float32 loss, or (loss, PolicyLossOutputs). Deterministic: no atomics.

    Raises:
        TypeError, ValueError: for what cannot be honoured, saying what was expected.
        RuntimeError: on a second backward through one call (the stored gradients are scaled in
            place), and on a second derivative.

    Source: as :func:`dl_norm.logits_policy_loss`.
    """
    options = PolicyLossOptions(eps_low, eps_high, dual_clip, delta, log_ratio_clamp, beta)
    settings = row_settings(temperature, logit_softcap, options, return_metrics, entropy)
    check_head(hidden, lm_head_weight, bias)
    returns = entropy or return_log_probs or return_metrics
    rows = check_and_flatten(
        hidden, token_ids, old_log_probs, advantages, mask, weights, cu_seqlens, ref_log_probs,
        rollout_weights, lm_head_weight.shape[0], options, returns, return_metrics,
    )  # fmt: skip
    impl = _choose(impl, hidden)
    plan = make_plan(rows, chunk_size, fp32_logits, max_tokens, compact)
    hidden, lm_head_weight, bias = autocast_head(hidden, lm_head_weight, bias)
    grads = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, lm_head_weight, bias)
    ]
    outputs = LinearPolicyLossFunction.apply(
        hidden, lm_head_weight, bias, rows, settings, plan, impl, tuple(grads)
    )
    return with_outputs(outputs, token_ids.shape, weights, settings, returns)


@dataclass(frozen=True)
class ChunkPlan:
    """Which rows go through the head, and how many at a time.

    order: row numbers to take, or None for all; some of them may be inactive.
    overflow: 0-dim bool, True if ``order`` leaves an active row out; or None.
    """

    tokens: int
    chunk: int
    order: Tensor | None
    overflow: Tensor | None
    fp32_logits: bool


def make_plan(
    rows: TokenRows,
    chunk_size: int | None,
    fp32_logits: bool,
    max_tokens: int | None,
    compact: bool,
) -> ChunkPlan:
    for name, value in (("chunk_size", chunk_size), ("max_tokens", max_tokens)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int or None, got {type(value).__name__}")
        if value < (name == "chunk_size"):
            raise ValueError(f"{name} must be positive, got {value}")
    order = overflow = None
    tokens = rows.count
    if values_are_free(rows.active) or compact:
        order = rows.active.nonzero()[:, 0]
        if max_tokens is not None and order.shape[0] > max_tokens:
            raise ValueError(
                f"max_tokens = {max_tokens}, but {order.shape[0]} tokens count: pass an upper bound"
            )
    elif max_tokens is not None and max_tokens < tokens:
        # The active rows first, in their order.
        order = torch.argsort((~rows.active).to(torch.uint8), stable=True)[:max_tokens]
        overflow = rows.active.sum() > max_tokens
    if order is not None:
        tokens = order.shape[0]
        if tokens == rows.count:
            order = None
    if chunk_size is None:
        chunk_size = CPU_CHUNK if rows.active.device.type == "cpu" else GPU_CHUNK
    chunks = max(1, tokens // chunk_size)
    return ChunkPlan(tokens, -(-tokens // chunks), order, overflow, fp32_logits)


def check_head(hidden: Tensor, lm_head_weight: Tensor, bias: Tensor | None) -> None:
    check_logits("hidden", hidden, "D")
    named: list[tuple[str, Tensor, tuple[int, ...], str]] = [
        ("lm_head_weight", lm_head_weight, (-1, hidden.shape[-1]), "(V, D)")
    ]
    if bias is not None:
        named.append(("bias", bias, (lm_head_weight.shape[0],), "(V,)"))
    for name, tensor, shape, names in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in LOG_PROB_DTYPES or (
            tensor.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type)
        ):
            raise TypeError(
                f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}: "
                "convert one of them, or call under torch.autocast"
            )
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}: move it")
        if tensor.ndim != len(shape) or tensor.shape[-1] != shape[-1] or tensor.numel() == 0:
            raise ValueError(
                f"{name} must be {names} and not empty, with hidden (..., D) = "
                f"{tuple(hidden.shape)}; got {tuple(tensor.shape)}"
            )


def autocast_head(
    hidden: Tensor, lm_head_weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What torch.nn.functional.linear does under autocast; autograd casts the gradients back."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, lm_head_weight = hidden.to(dtype), lm_head_weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return hidden, lm_head_weight, bias


def linear_pass(
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    rows: TokenRows,
    settings: RowSettings,
    plan: ChunkPlan,
    impl: str,
    grads: tuple[bool, bool, bool],
) -> tuple[RowOutputs, list[Tensor | None]]:
    """Returns the outputs of the N rows, and the gradients of hidden, lm_head_weight and bias.

    hidden: (N, D). The head's gradient is float32 if it was summed over several chunks or if the
    dtype is float16, else it has the dtype of the weight.
    """
    module = implementation(impl)
    vocabulary = lm_head_weight.shape[0]
    dtype, device = hidden.dtype, hidden.device
    taken = rows if plan.order is None else rows[plan.order]
    outputs = RowOutputs.zeros(plan.tokens, settings, device)
    write_grad = any(grads)
    several = plan.tokens > plan.chunk
    sum_dtype = torch.float32 if several or dtype == torch.float16 else dtype
    hidden_grad = head_grad = bias_grad = None
    if grads[0]:
        # Rows that are not taken keep the 0.
        allocate = torch.empty if plan.order is None else torch.zeros
        hidden_grad = allocate(hidden.shape, dtype=dtype, device=device)

    logits_dtype = torch.float32 if plan.fp32_logits else dtype
    buffer = torch.empty((plan.chunk, vocabulary), dtype=logits_dtype, device=device)
    grad_buffer = buffer
    if write_grad and logits_dtype != dtype:
        grad_buffer = torch.empty_like(buffer, dtype=dtype)  # a matrix product takes one dtype
    # At least one chunk, if of no token: it makes the zeros.
    for start in range(0, max(1, plan.tokens), max(1, plan.chunk)):
        stop = min(start + plan.chunk, plan.tokens)
        if plan.order is None:
            chunk = hidden[start:stop]
        else:
            chunk = hidden.index_select(0, plan.order[start:stop])
        if plan.order is None or plan.overflow is not None:
            # What an inactive row holds, NaN say, must not reach the head's gradient.
            chunk = chunk.masked_fill(~taken.active[start:stop, None], 0.0)
        logits = _logits(chunk, lm_head_weight, bias, buffer[: stop - start])
        grad = grad_buffer[: stop - start]
        module.logits_pass(logits, grad if write_grad else None, taken, start, settings, outputs)
        if hidden_grad is not None:
            if plan.order is None:
                torch.mm(grad, lm_head_weight, out=hidden_grad[start:stop])
            else:
                hidden_grad.index_copy_(0, plan.order[start:stop], torch.mm(grad, lm_head_weight))
        if grads[1]:
            head_grad = _add_product(head_grad, grad.t(), chunk, sum_dtype)
        if grads[2]:
            chunk_sum = grad.sum(0, dtype=torch.float32)
            bias_grad = chunk_sum if bias_grad is None else bias_grad.add_(chunk_sum)
    if plan.order is not None:
        outputs = _scatter(outputs, plan.order, rows.count)
    return outputs, [hidden_grad, head_grad, bias_grad]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if out.dtype == hidden.dtype:
        if bias is None:
            return torch.mm(hidden, weight.t(), out=out)
        return torch.addmm(bias, hidden, weight.t(), out=out)
    if hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        torch.mm(hidden.float(), weight.float().t(), out=out)
    return out if bias is None else out.add_(bias)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b in ``dtype``, in place; total None: a @ b."""
    if a.dtype != dtype and not a.is_cuda:
        a, b = a.to(dtype), b.to(dtype)
    if total is None:
        return torch.mm(a, b) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype)
    if a.dtype == dtype:
        return total.addmm_(a, b)
    return torch.addmm(total, a, b, out_dtype=dtype, out=total)


def _scatter(outputs: RowOutputs, order: Tensor, rows: int) -> RowOutputs:
    def scatter(values: Tensor) -> Tensor:
        return values.new_zeros(rows).index_copy_(0, order, values)

    entropy = None if outputs.entropy is None else scatter(outputs.entropy)
    return RowOutputs(scatter(outputs.log_probs), entropy, outputs.partials)


class LinearPolicyLossFunction(torch.autograd.Function):
    """Differentiable with respect to the hidden states, the head and its bias."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        hidden: Tensor,
        lm_head_weight: Tensor,
        bias: Tensor | None,
        rows: TokenRows,
        settings: RowSettings,
        plan: ChunkPlan,
        impl: str,
        needed: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, half = half_scale(rows, hidden.dtype if any(needed) else torch.float32)
        outputs, grads = linear_pass(
            hidden.reshape(-1, hidden.shape[-1]), lm_head_weight, bias, rows, settings, plan, impl,
            needed,
        )  # fmt: skip
        loss, sums = implementation(impl).reduce_partials(outputs.partials)
        if half is not None:
            loss = loss / half
        if plan.overflow is not None:
            loss = torch.where(plan.overflow, torch.nan, loss)
        if hidden.dtype != torch.float16:
            # Final but for the upstream gradient: nothing is gained by keeping float32.
            grads = [None if grad is None else grad.to(hidden.dtype) for grad in grads]
        if grads[0] is not None:
            grads[0] = grads[0].view(hidden.shape)
        ctx.save_for_backward(half, *grads)
        ctx.dtype = hidden.dtype
        ctx.impl = impl
        ctx.scaled = False
        entropy = loss.new_empty(0) if outputs.entropy is None else outputs.entropy
        ctx.mark_non_differentiable(outputs.log_probs, entropy, sums)
        ctx.set_materialize_grads(False)
        return loss, outputs.log_probs, entropy, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_loss = grad_outputs[0]  # the other outputs have no gradient
        if grad_loss is None:
            return (None,) * 8
        check_first_backward(ctx, "linear_policy_loss")
        half, *grads = ctx.saved_tensors
        scaled = [
            None if grad is None else scale_grad(grad, grad_loss, half, ctx.dtype, ctx.impl)
            for grad in grads
        ]
        return *scaled, None, None, None, None, None
