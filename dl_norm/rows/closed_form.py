"""The policy loss over logits and its gradient in closed form, in plain PyTorch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from ..log_probs import closed_form
from ..metrics import NUM_METRIC_SUMS
from .records import RowOutputs, RowSettings, TokenRows

# Logits that are worked on together, 4 MB: the passes over them run in a CPU's cache.
_BLOCK_ELEMENTS = 1 << 20


def logits_pass(
    logits: Tensor,
    grad: Tensor | None,
    rows: TokenRows,
    first_row: int,
    settings: RowSettings,
    outputs: RowOutputs,
) -> None:
    """Writes ``outputs`` from ``first_row`` on, and d loss / d logits into ``grad``.

    logits: (R, V) or (B, T, V) for the R rows from ``first_row`` on. grad: like ``logits``, maybe
    ``logits`` itself, or None.
    """
    vocabulary = logits.shape[-1]
    row_length = logits.shape[-2]
    active = rows.active[first_row : first_row + logits.shape[:-1].numel()]
    if logits.is_contiguous():
        logits = logits.view(-1, vocabulary)
    if grad is not None:
        grad = grad.view(-1, vocabulary)
        _zero(grad, (~active).nonzero()[:, 0])
    indices = active.nonzero()[:, 0]
    size = max(1, _BLOCK_ELEMENTS // vocabulary)
    # Of every block in turn: memory that is new each time costs as much as a pass over it.
    shape = (min(size, indices.shape[0]), vocabulary)
    probs = torch.empty(shape, dtype=torch.float32, device=logits.device)
    changed = settings.softcap is not None or settings.temperature != 1.0 or settings.entropy
    work = torch.empty_like(probs) if changed or logits.dtype != torch.float32 else probs
    for index in _blocks(indices, size):
        where = _slice_or_index(index)
        if logits.ndim == 2:
            source = logits[where]
        else:
            # Not flattened: that would copy logits whose rows are not evenly spaced.
            source = logits[index // row_length, index % row_length]
        block = probs[: index.shape[0]]
        target = None
        if grad is not None:
            wide = grad.dtype == torch.float32 and isinstance(where, slice)
            target = grad[where] if wide else block
        _block_pass(source, target, rows, _shift(where, first_row), settings, outputs, block, work)
        if grad is not None and target is block:
            grad[where] = block.to(grad.dtype)


def _zero(grad: Tensor, indices: Tensor) -> None:
    """Not by a mask, which is a pass over all rows."""
    for index in _blocks(indices, max(1, indices.shape[0])):
        where = _slice_or_index(index)
        if isinstance(where, slice):
            grad[where].zero_()
        else:
            grad.index_fill_(0, where, 0.0)


def _blocks(indices: Tensor, size: int) -> list[Tensor]:
    """At most ``size`` rows each; of rows without a gap, unless that makes the blocks small."""
    if indices.shape[0] == 0:
        return []
    gaps = (indices.diff() != 1).nonzero()[:, 0] + 1
    if gaps.shape[0] * min(4, size) > indices.shape[0]:
        return list(indices.split(size))
    return [block for run in indices.tensor_split(gaps.cpu()) for block in run.split(size)]


def _slice_or_index(index: Tensor) -> slice | Tensor:
    """Rows without a gap as a slice, whose views cost nothing."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == index.shape[0] else index


def _shift(where: slice | Tensor, by: int) -> slice | Tensor:
    return slice(where.start + by, where.stop + by) if isinstance(where, slice) else where + by


def _block_pass(
    logits: Tensor,
    grad: Tensor | None,
    all_rows: TokenRows,
    where: slice | Tensor,
    settings: RowSettings,
    outputs: RowOutputs,
    probs: Tensor,
    work: Tensor,
) -> None:
    """As ``logits_pass`` for a few rows, all active. ``grad`` is float32, and may be ``logits`` or
    ``probs``; what ``probs`` and ``work`` hold is overwritten."""
    rows = all_rows[where]
    work = work[: logits.shape[0]]
    inverse_temperature = 1.0 / settings.temperature
    slope = None
    if logits.dtype != torch.float32:
        logits = work.copy_(logits)
    if settings.softcap is not None:
        logits = torch.div(logits, settings.softcap, out=work).tanh_()
        if grad is not None:
            slope = 1.0 - logits.square()
        logits.mul_(settings.softcap)
    if inverse_temperature != 1.0:
        # The largest off first: the rounding is then that of a difference.
        logits = torch.sub(logits, logits.amax(1, keepdim=True), out=work)
        logits.mul_(inverse_temperature)
    token_ids = rows.token_ids.long()[:, None]
    # softmax is one fused pass, but adds up in a row what torch.sum adds up in pairs: over 150,000
    # logits its rounding shows, so its sum is summed again. The largest probability is 1 / sum.
    torch.softmax(logits, 1, out=probs)
    total = probs.sum(1)
    minus_log_total = probs.amax(1).div_(total).log_()
    largest = logits.amax(1, keepdim=True)
    log_probs = (logits.gather(1, token_ids) - largest)[:, 0] + minus_log_total
    if outputs.entropy is not None:
        # A probability is 0 where the logit is -inf: 0 * -inf is NaN.
        addends = torch.sub(logits, largest, out=work).mul_(probs)
        mean = torch.where(probs > 0, addends, 0.0).sum(1) / total
        outputs.entropy[where] = -minus_log_total - mean
    outputs.log_probs[where] = log_probs
    if settings.terms is None:
        return  # log-probs alone
    loss, token_grad, sums = closed_form.policy_loss_fwd(
        rows.as_batch(log_probs), settings.terms, grad is not None, settings.metrics
    )
    first = where.start if isinstance(where, slice) else where[0]
    outputs.partials[0, first] = loss
    if settings.metrics:
        outputs.partials[1:, first] = sums
    if grad is None:
        return
    token_grad = token_grad.mul_(inverse_temperature)
    torch.mul(probs, token_grad / -total[:, None], out=grad)
    grad.scatter_add_(1, token_ids, token_grad)
    if slope is not None:
        grad.mul_(slope)


def reduce_partials(partials: Tensor, rollout: bool) -> tuple[Tensor, Tensor]:
    """The loss (0-dim) and the sums of PolicyLossMetrics (empty without metrics), among them those
    of a ``rollout`` correction."""
    sums = partials[1:].sum(1)
    if sums.numel() and partials.shape[1]:
        sums[NUM_METRIC_SUMS - 1] = partials[NUM_METRIC_SUMS].amax()  # the largest ratio
        if rollout:
            sums[-1] = partials[-1].amax()  # the largest weight
    return partials[0].sum(), sums
