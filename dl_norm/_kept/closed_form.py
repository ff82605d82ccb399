"""Log-probs over kept sets and their gradients, in plain PyTorch operations, for any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import values_are_free
from .._log_probs.closed_form import policy_loss_fwd as policy_loss_fwd
from .._rows.records import RowSettings
from .entries import Entries
from .head_grad import few_rows
from .records import KeptLogits

_LOWEST = torch.finfo(torch.float32).min
# Numbers of gathered rows that exist at a time: in a CPU's last cache, or enough for a GPU.
_CPU_BLOCK, _GPU_BLOCK = 1 << 20, 1 << 25


def kept_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    entries: Entries,
    settings: RowSettings,
    entropy: bool,
) -> KeptLogits:
    """Of the (N, D) hidden states over their kept sets; the entropy where ``entropy`` says so."""
    logits, sums = kept_sums(hidden, weight, bias, entries, settings, entropy)
    return logits_of_sums(logits, sums, entries, settings, entropy)


def kept_sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    entries: Entries,
    settings: RowSettings,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """(E,) logits, after the soft cap, and (3 to 5, N) sums over the entries of each token: the
    largest logit, exponent of the token's own (0 where it is not here), sum of exp of the
    exponents, for the entropy that of exponents times exp, for sum_sq_probs that of squares.

    Exponents are (logit - largest) / temperature. All of a token without entries is 0, but its
    largest logit, which is the lowest number.
    """
    logits = _products(hidden, weight, entries)
    if bias is not None:
        logits += bias[entries.ids].float()
    if settings.softcap is not None:
        logits = logits.div_(settings.softcap).tanh_().mul_(settings.softcap)
    references = _segments(logits, "max", entries.offsets).clamp_(min=_LOWEST)
    exponents = _exponents(logits, references, entries, settings)
    exps = exponents.exp()
    # Of all addends of the second only the token's own is not 0: exact.
    addends = [torch.where(entries.hits, exponents, 0.0), exps]
    if entropy:
        addends.append(exps * exponents.clamp(min=-1000.0))  # where exp is 0, not 0 * -inf
    if settings.sum_sq_probs:
        addends.append(exps.square())
    sums = [_segments(addend, "sum", entries.offsets) for addend in addends]
    return logits, torch.stack([references, *sums])


def logits_of_sums(
    logits: Tensor, sums: Tensor, entries: Entries, settings: RowSettings, entropy: bool
) -> KeptLogits:
    """``sums``: of :func:`kept_sums`, over all of the vocabulary."""
    references, own, totals, *more = sums
    log_totals = torch.where(entries.plural, totals.log(), 0.0)
    log_probs = (own - log_totals).clamp_(max=0.0).masked_fill_(entries.bad, torch.nan)
    entropies = squares = None
    if entropy:
        entropies = torch.where(entries.plural, log_totals - more[0] / totals, 0.0)
        entropies.masked_fill_(entries.bad, torch.nan)
    if settings.sum_sq_probs:
        squares = torch.where(entries.plural, more[-1] / totals.square(), entries.active.float())
        squares.masked_fill_(entries.bad, torch.nan)
    return KeptLogits(logits, references, log_totals, log_probs, entropies, squares)


def kept_hidden_grad(
    hidden: Tensor,
    weight: Tensor,
    entries: Entries,
    logits: KeptLogits,
    token_grads: Tensor,
    entropy_weights: Tensor | None,
    settings: RowSettings,
    needed: bool,
) -> tuple[Tensor, Tensor]:
    """d loss / d logits (E,), float32, and d loss / d hidden (N, D), empty unless ``needed``.

    token_grads: (N,) d loss / d log-prob. entropy_weights: (N,), minus d loss / d entropy, or None.
    """
    exponents = _exponents(logits.logits, logits.references, entries, settings)
    log_probs = exponents.sub_(logits.log_totals[entries.tokens])
    probs = log_probs.exp()
    grads = (entries.hits.float() - probs).mul_(token_grads[entries.tokens])
    if entropy_weights is not None:
        assert logits.entropy is not None
        # d -H / d logit = p (log p + H)
        surprises = log_probs.clamp_(min=-1000.0).add_(logits.entropy[entries.tokens])
        grads += surprises.mul_(probs).mul_(entropy_weights[entries.tokens])
    grads.div_(settings.temperature)
    if settings.softcap is not None:
        grads *= 1.0 - (logits.logits / settings.softcap).square_()
    if not needed:
        return grads, hidden.new_empty(0)
    return grads, _weighted_sums(entries.ids, weight, entries.offsets, grads)


def kept_head_grad(
    hidden: Tensor,
    weight: Tensor,
    entries: Entries,
    grads: Tensor,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """d loss / d lm_head_weight, in its dtype or for float16 in float32, and d loss / d bias,
    float32. The first is sparse where the host knows its rows."""
    vocabulary = weight.shape[0]
    if values_are_free(entries.ids):  # then every entry has a part
        used = entries.sorted_ids.unique_consecutive()
    else:
        used = torch.arange(vocabulary, device=weight.device)
    ends = F.pad(torch.searchsorted(entries.sorted_ids, used, right=True), (1, 0))
    grads = grads[entries.order]
    head_grad = bias_grad = None
    if needed[0]:
        dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        tokens = entries.tokens[entries.order]
        sums = _weighted_sums(tokens, hidden.float(), ends, grads).to(dtype)
        head_grad = sums
        if values_are_free(used):
            head_grad = few_rows(used, sums, weight.shape)
    if needed[1]:
        bias_grad = torch.zeros(vocabulary, dtype=torch.float32, device=weight.device)
        bias_grad.index_copy_(0, used, _segments(grads, "sum", ends))
    return head_grad, bias_grad


def _products(hidden: Tensor, weight: Tensor, entries: Entries) -> Tensor:
    """(E,) float32 products of a token's hidden state and a row of the head."""
    free = values_are_free(hidden)
    rows = max(1, (_CPU_BLOCK if free else _GPU_BLOCK) // hidden.shape[-1])
    out = torch.empty(entries.count, dtype=torch.float32, device=hidden.device)
    for start in range(0, entries.count, rows):
        block = slice(start, start + rows)
        left = hidden.index_select(0, entries.tokens[block]).float()
        right = weight.index_select(0, entries.ids[block]).float()
        out[block] = left.mul_(right).sum(1)
    return out


def _exponents(
    logits: Tensor, references: Tensor, entries: Entries, settings: RowSettings
) -> Tensor:
    return logits.sub(references[entries.tokens]).div_(settings.temperature)


def _segments(values: Tensor, reduce: str, offsets: Tensor) -> Tensor:
    """(N,) sums or maxima of each token's entries. In a fixed order, also on a GPU."""
    return torch.segment_reduce(values, reduce, offsets=offsets, unsafe=True)


def _weighted_sums(index: Tensor, rows: Tensor, offsets: Tensor, factors: Tensor) -> Tensor:
    """sum of factors[i] * rows[index[i]] over each segment, added up in float32."""
    if index.shape[0] == 0:
        return rows.new_zeros(offsets.shape[0] - 1, rows.shape[1])
    return F.embedding_bag(
        index, rows, offsets, mode="sum", per_sample_weights=factors.to(rows.dtype),
        include_last_offset=True,
    )  # fmt: skip
