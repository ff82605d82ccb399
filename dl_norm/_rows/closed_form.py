"""The policy loss over logits and its gradient in closed form, in plain PyTorch operations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._log_probs import closed_form
from .._metrics import NUM_METRIC_SUMS
from .records import RowOutputs, RowSettings, TokenRows, with_entropy

# Logits that are worked on together, 4 MB: the passes over them run in a CPU's cache.
_BLOCK_ELEMENTS = 1 << 20
_LOG2_E, _LN_2 = math.log2(math.e), math.log(2.0)
_LOWEST = torch.finfo(torch.float32).min


def logits_pass(
    logits: Tensor,
    grad: Tensor | None,
    rows: TokenRows,
    first_row: int,
    settings: RowSettings,
    outputs: RowOutputs,
    sums: Tensor | None = None,
) -> None:
    """Writes ``outputs`` from ``first_row`` on, and d loss / d logits into ``grad``.

    logits: (R, V) or (B, T, V) for the R rows from ``first_row`` on. grad: like ``logits``, maybe
    ``logits`` itself, or None. sums: of ``row_sums``, over all the processes that have a part of
    the rows; None where they are whole.
    """
    if grad is not None:
        grad = grad.view(logits.shape[:-1].numel(), logits.shape[-1])
        _zero(grad, (~_active(logits, rows, first_row)).nonzero()[:, 0])
    for source, where, probs, work in _row_blocks(logits, rows, first_row, settings):
        target = None
        if grad is not None:
            wide = grad.dtype == torch.float32 and isinstance(where, slice)
            target = grad[where] if wide else probs
        _block_pass(
            source, target, rows, _shift(where, first_row), settings, outputs, sums, probs, work
        )
        if grad is not None and target is probs:
            grad[where] = probs.to(grad.dtype)


def row_sums(
    logits: Tensor, rows: TokenRows, first_row: int, settings: RowSettings, sums: Tensor
) -> None:
    """Writes into ``sums``, (3 to 5, N), from ``first_row`` on, of what is here of the vocabulary:
    reference, exponent of the token's own logit (0 where it is not here), sum of exp2 of the
    exponents, for the entropy that of exponents times exp2, and for sum_sq_probs that of squares.

    Exponents are (logit - reference) :func:`reference_scale`.
    """
    for source, where, probs, work in _row_blocks(logits, rows, first_row, settings):
        where = _shift(where, first_row)
        vocabulary = source.shape[-1]
        if vocabulary == 0:
            sums[0, where] = _LOWEST
            continue
        block, _ = _capped(source, settings, work, False)
        reference = block.amax(1).clamp_(min=_LOWEST)
        exponents = torch.sub(block, reference[:, None], out=work[: block.shape[0]])
        torch.exp2(exponents.mul_(reference_scale(settings)), out=probs)
        token_ids, is_here = _own_logits(rows.token_ids[where], settings, vocabulary)
        own = exponents.gather(1, token_ids[:, None])[:, 0]
        found = [reference, torch.where(is_here, own, 0.0), probs.sum(1)]
        if with_entropy(rows, settings):
            found.append(exponents.clamp_(min=-1500.0).mul_(probs).sum(1))
        if settings.sum_sq_probs:
            found.append(probs.square().sum(1))
        sums[:, where] = torch.stack(found)


def reference_scale(settings: RowSettings) -> float:
    """What the reference of ``row_sums`` is to be multiplied by, to be an exponent of 2."""
    return _LOG2_E / settings.temperature


def _active(logits: Tensor, rows: TokenRows, first_row: int) -> Tensor:
    return rows.active[first_row : first_row + logits.shape[:-1].numel()]


def _row_blocks(
    logits: Tensor, rows: TokenRows, first_row: int, settings: RowSettings
) -> Iterator[tuple[Tensor, slice | Tensor, Tensor, Tensor]]:
    """A few active rows at a time: their logits, where they are, and two float32 tensors of their
    shape to work in. The second may be the first where the logits are left as they are."""
    vocabulary = logits.shape[-1]
    row_length = logits.shape[-2]
    indices = _active(logits, rows, first_row).nonzero()[:, 0]
    if logits.is_contiguous():
        logits = logits.view(logits.shape[:-1].numel(), vocabulary)  # which may be 0 of a part
    size = max(1, _BLOCK_ELEMENTS // max(1, vocabulary))
    # Of every block in turn: memory that is new each time costs as much as a pass over it.
    shape = (min(size, indices.shape[0]), vocabulary)
    probs = torch.empty(shape, dtype=torch.float32, device=logits.device)
    changed = settings.softcap is not None or settings.temperature != 1.0
    changed = changed or settings.shard.spread or with_entropy(rows, settings)
    work = torch.empty_like(probs) if changed or logits.dtype != torch.float32 else probs
    for index in _blocks(indices, size):
        where = _slice_or_index(index)
        if logits.ndim == 2:
            source = logits[where]
        else:
            # Not flattened: that would copy logits whose rows are not evenly spaced.
            source = logits[index // row_length, index % row_length]
        yield source, where, probs[: index.shape[0]], work


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


@dataclass(frozen=True)
class _Softmax:
    """Of a few rows: ``probs`` / ``total`` is the softmax of what is here of them, and ``shifted``,
    where the entropy is asked for, its log + log(total). (R,) but for these."""

    probs: Tensor
    total: Tensor
    minus_log_total: Tensor
    log_probs: Tensor
    shifted: Tensor | None
    entropy: Tensor | None
    sum_sq_probs: Tensor | None


def _block_pass(
    logits: Tensor,
    grad: Tensor | None,
    all_rows: TokenRows,
    where: slice | Tensor,
    settings: RowSettings,
    outputs: RowOutputs,
    sums: Tensor | None,
    probs: Tensor,
    work: Tensor,
) -> None:
    """As ``logits_pass`` for a few rows, all active. ``grad`` is float32, and may be ``logits`` or
    ``probs``; what ``probs`` and ``work`` hold is overwritten."""
    rows = all_rows[where]
    work = work[: logits.shape[0]]
    logits, cap_slope = _capped(logits, settings, work, grad is not None)
    if sums is None:
        found = _softmax(logits, rows, settings, probs, work)
    else:
        # Of an id outside the vocabulary the loss is NaN, if it depends on the log-prob or not.
        known = (rows.token_ids >= 0) & (rows.token_ids < settings.shard.vocabulary)
        if rows.weights is not None:
            rows = replace(rows, weights=torch.where(known, rows.weights, torch.nan))
        found = _shared_softmax(logits, rows, settings, sums[:, where], probs, work)
        found.log_probs.masked_fill_(~known, torch.nan)
    if outputs.entropy is not None and found.entropy is not None:
        outputs.entropy[where] = found.entropy
    if outputs.sum_sq_probs is not None and found.sum_sq_probs is not None:
        outputs.sum_sq_probs[where] = found.sum_sq_probs
    outputs.log_probs[where] = found.log_probs
    if settings.terms is None:
        return  # log-probs alone
    loss, token_grad, metrics = closed_form.policy_loss_fwd(
        rows.as_batch(found.log_probs), settings.terms, grad is not None, settings.metrics
    )
    first = where.start if isinstance(where, slice) else where[0]
    if rows.entropy_weights is not None and found.entropy is not None:
        loss = loss - (rows.entropy_weights * found.entropy).sum()
    outputs.partials[0, first] = loss
    if settings.metrics:
        outputs.partials[1:, first] = metrics
    if grad is None:
        return
    token_grad = token_grad[:, 0] / settings.temperature
    if rows.entropy_weights is None or found.shifted is None or found.entropy is None:
        torch.mul(probs, (-token_grad / found.total)[:, None], out=grad)
    else:
        # d -H / d z = softmax * (log softmax + H)
        slope = rows.entropy_weights / settings.temperature
        factor = slope * (found.minus_log_total + found.entropy) - token_grad
        factors = found.shifted.mul_((slope / found.total)[:, None])
        torch.mul(probs, factors.add_((factor / found.total)[:, None]), out=grad)
    if grad.shape[1]:
        token_ids, is_here = _own_logits(rows.token_ids, settings, grad.shape[1])
        own_grad = torch.where(is_here, token_grad, 0.0) if settings.shard.spread else token_grad
        grad.scatter_add_(1, token_ids[:, None], own_grad[:, None])
    if cap_slope is not None:
        grad.mul_(cap_slope)


def _capped(
    logits: Tensor, settings: RowSettings, work: Tensor, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """float32 logits after the soft cap, and its derivative; in ``work``, or as they are."""
    work = work[: logits.shape[0]]
    if logits.dtype != torch.float32:
        logits = work.copy_(logits)
    if settings.softcap is None:
        return logits, None
    logits = torch.div(logits, settings.softcap, out=work).tanh_()
    slope = 1.0 - logits.square() if with_slope else None
    return logits.mul_(settings.softcap), slope


def _own_logits(token_ids: Tensor, settings: RowSettings, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Which of the logits that are here is the token's own, and whether it is here at all."""
    own = token_ids.long() - settings.shard.first
    if not settings.shard.spread:
        return own, torch.ones_like(own, dtype=torch.bool)
    return own.clamp(0, vocabulary - 1), (own >= 0) & (own < vocabulary)


def _softmax(
    logits: Tensor, rows: TokenRows, settings: RowSettings, probs: Tensor, work: Tensor
) -> _Softmax:
    """Of rows that are whole."""
    if settings.temperature != 1.0:
        # The largest off first: the rounding is then that of a difference.
        logits = torch.sub(logits, logits.amax(1, keepdim=True), out=work)
        logits.mul_(1.0 / settings.temperature)
    # softmax is one fused pass, but adds up in a row what torch.sum adds up in pairs: over 150,000
    # logits its rounding shows, so its sum is summed again. The largest probability is 1 / sum.
    torch.softmax(logits, 1, out=probs)
    total = probs.sum(1)
    minus_log_total = probs.amax(1).div_(total).log_()
    largest = logits.amax(1, keepdim=True)
    own = logits.gather(1, rows.token_ids.long()[:, None])
    log_probs = (own - largest)[:, 0] + minus_log_total
    shifted = entropy = sum_sq_probs = None
    if with_entropy(rows, settings):
        # A probability is 0 where the logit is -inf, and so it is at -1000: not 0 * -inf.
        shifted = torch.sub(logits, largest, out=work).clamp_(min=-1000.0)
        entropy = -minus_log_total - torch.mul(shifted, probs).sum(1) / total
    if settings.sum_sq_probs:
        sum_sq_probs = probs.square().sum(1) / total.square()
    return _Softmax(probs, total, minus_log_total, log_probs, shifted, entropy, sum_sq_probs)


def _shared_softmax(
    logits: Tensor,
    rows: TokenRows,
    settings: RowSettings,
    sums: Tensor,
    probs: Tensor,
    work: Tensor,
) -> _Softmax:
    """Of rows that are spread over processes, whose sums are these."""
    reference, own, total, *more = sums
    exponents = torch.sub(logits, reference[:, None], out=work)
    torch.exp2(exponents.mul_(reference_scale(settings)), out=probs)
    minus_log_total = -total.log()
    log_probs = own * _LN_2 + minus_log_total
    shifted = entropy = sum_sq_probs = None
    if with_entropy(rows, settings):
        shifted = exponents.mul_(_LN_2).clamp_(min=-1000.0)
        entropy = -minus_log_total - more[0] * _LN_2 / total
    if settings.sum_sq_probs:
        sum_sq_probs = more[-1] / total.square()
    return _Softmax(probs, total, minus_log_total, log_probs, shifted, entropy, sum_sq_probs)


def reduce_partials(partials: Tensor, rollout: bool) -> tuple[Tensor, Tensor]:
    """The loss (0-dim) and the sums of PolicyLossMetrics (empty without metrics), among them those
    of a ``rollout`` correction."""
    sums = partials[1:].sum(1)
    if sums.numel() and partials.shape[1]:
        sums[NUM_METRIC_SUMS - 1] = partials[NUM_METRIC_SUMS].amax()  # the largest ratio
        if rollout:
            sums[-1] = partials[-1].amax()  # the largest weight
    return partials[0].sum(), sums
