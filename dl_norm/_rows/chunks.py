"""The head's matrix products and the row pass, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._checks import check_flag, values_are_free
from .records import RowOutputs, RowSettings, TokenRows
from .vocab_parallel import SumOverShards

# Tokens in a chunk. Adding a chunk to the float32 head gradient moves 8 V D bytes whatever its
# size, which many tokens must share on a GPU. A CPU multiplies so slowly that a chunk may be small,
# and with it the memory.
GPU_CHUNK = 4096
CPU_CHUNK = 192


@dataclass(frozen=True)
class ChunkOptions:
    """What :func:`dl_norm.linear_policy_loss` says of them."""

    chunk_size: int | None = None
    fp32_logits: bool = False
    max_tokens: int | None = None
    compact: bool = False

    def __post_init__(self):
        for name, least in (("chunk_size", 1), ("max_tokens", 0)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name} must be an int or None, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
            if isinstance(value, np.integer):
                object.__setattr__(self, name, value.item())
        check_flag(self.fp32_logits, "fp32_logits")
        check_flag(self.compact, "compact")

    def check_unused(self) -> None:
        """Refuses what has no effect over kept sets, whose logits are float32 whatever is said."""
        for name in ("chunk_size", "max_tokens", "compact"):
            if getattr(self, name) not in (None, False):
                raise ValueError(f"{name} has no effect with kept sets: drop it")


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


def make_plan(rows: TokenRows, options: ChunkOptions) -> ChunkPlan:
    order = overflow = None
    tokens = rows.count
    if values_are_free(rows.active) or options.compact:
        order = rows.active.nonzero()[:, 0]
        if options.max_tokens is not None and order.shape[0] > options.max_tokens:
            raise ValueError(
                f"max_tokens = {options.max_tokens}, but {order.shape[0]} tokens count: pass an "
                "upper bound"
            )
    elif options.max_tokens is not None and options.max_tokens < tokens:
        # The active rows first, in their order.
        order = torch.argsort((~rows.active).to(torch.uint8), stable=True)[: options.max_tokens]
        overflow = rows.active.sum() > options.max_tokens
    if order is not None:
        tokens = order.shape[0]
        if tokens == rows.count:
            order = None
    chunk_size = options.chunk_size
    if chunk_size is None:
        chunk_size = CPU_CHUNK if rows.active.device.type == "cpu" else GPU_CHUNK
    chunks = max(1, tokens // chunk_size)
    return ChunkPlan(tokens, -(-tokens // chunks), order, overflow, options.fp32_logits)


def linear_pass(
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    rows: TokenRows,
    settings: RowSettings,
    plan: ChunkPlan,
    logits_pass: Callable[..., None],
    grads: tuple[bool, ...],
) -> tuple[RowOutputs, list[Tensor | None]]:
    """Returns the outputs of the N rows, and the gradients of hidden, lm_head_weight and bias.

    hidden: (N, D). The head's gradient is float32 if it was summed over several chunks or if the
    dtype is float16, else it has the dtype of the weight.
    """
    vocabulary = lm_head_weight.shape[0]
    dtype, device = hidden.dtype, hidden.device
    taken = rows if plan.order is None else rows[plan.order]
    outputs = RowOutputs.zeros(plan.tokens, settings, device)
    write_grad = any(grads)
    shard = settings.shard
    hidden_sums = SumOverShards(shard) if shard.spread and not shard.partial_hidden_grad else None
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
        logits_pass(logits, grad if write_grad else None, taken, start, settings, outputs)
        if hidden_grad is not None:
            _add_hidden_grad(hidden_grad, grad, lm_head_weight, start, plan.order, hidden_sums)
        if grads[1]:
            head_grad = _add_product(head_grad, grad.t(), chunk, sum_dtype)
        if grads[2]:
            chunk_sum = grad.sum(0, dtype=torch.float32)
            bias_grad = chunk_sum if bias_grad is None else bias_grad.add_(chunk_sum)
    if hidden_sums is not None:
        hidden_sums.wait()
    if plan.order is not None:
        outputs = _scatter(outputs, plan.order, rows.count)
    return outputs, [hidden_grad, head_grad, bias_grad]


def _add_hidden_grad(
    hidden_grad: Tensor,
    grad: Tensor,
    weight: Tensor,
    start: int,
    order: Tensor | None,
    sums: SumOverShards | None,
) -> None:
    """Writes the rows of a chunk; what is to be summed over processes is there after a wait."""
    stop = start + grad.shape[0]
    if order is None:
        part = hidden_grad[start:stop]
        torch.mm(grad, weight, out=part)
        if sums is not None:
            sums.start(part)
        return
    part, places = torch.mm(grad, weight), order[start:stop]

    def copy() -> None:
        hidden_grad.index_copy_(0, places, part)

    if sums is None:
        copy()
    else:
        sums.start(part, copy)


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

    entropy, sum_sq_probs = (
        None if values is None else scatter(values)
        for values in (outputs.entropy, outputs.sum_sq_probs)
    )
    return RowOutputs(scatter(outputs.log_probs), entropy, sum_sq_probs, outputs.partials)
