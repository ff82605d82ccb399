"""The entries of kept sets: which belong to which token, which take part, and what is wrong.

Nothing here synchronises a device, and whatever the offsets and ids hold, nothing that is computed
from these entries reads out of bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import values_are_free
from .._rows.records import TokenRows, VocabShard

if TYPE_CHECKING:
    from .sets import KeptSets


class KeptEntries(NamedTuple):
    """All M entries, as they are."""

    ids: Tensor  # int64
    tokens: Tensor  # int64, which of the N tokens an entry belongs to
    offsets: Tensor  # (N + 1,) int64: within [0, M], never falling
    hits: Tensor  # bool: the entry is its token's own
    active: Tensor  # bool: the entry's token counts
    spans: Tensor  # 0-dim bool: the offsets are what they should be


class Trouble(NamedTuple):
    """(N,) bool: what makes the set of a token that counts no set of it."""

    outside: Tensor  # an id outside the vocabulary
    repeated: Tensor  # an id twice
    missing: Tensor  # not the token itself


@dataclass(frozen=True)
class Entries:
    """The E entries that have a part in the loss: those of tokens that count, in sets of two or
    more, and of these the ones of the vocabulary that is here. Where the host cannot count them E
    is M, and the others stand behind the last offset.

    A set of the token alone has log-prob 0 and no gradient whatever its logit is.
    """

    ids: Tensor  # int64 in [0, V): rows of the head that is here
    tokens: Tensor  # int64
    hits: Tensor  # bool
    offsets: Tensor  # (N + 1,) int64
    active: Tensor  # (N,) bool: the token counts
    plural: Tensor  # (N,) bool: and its set, here and elsewhere, is of two or more
    bad: Tensor  # (N,) bool: it counts, and its set is wrong
    sorted_ids: Tensor  # int64, rising; V where an entry stands behind the last offset
    order: Tensor  # int64: the entry of each sorted id, of equal ids the earlier token first

    @property
    def count(self) -> int:
        return self.ids.shape[0]


def kept_entries(ids: Tensor, offsets: Tensor, token_ids: Tensor, active: Tensor) -> KeptEntries:
    size, tokens = ids.shape[0], token_ids.shape[0]
    offsets = offsets.long()
    spans = (offsets[0] == 0) & (offsets[-1] == size) & (offsets.diff() >= 0).all()
    offsets = offsets.clamp(0, size).cummax(0).values
    ids = ids.long()
    if tokens == 0:
        none = ids[:0]
        return KeptEntries(none, none, offsets, none != 0, none != 0, spans)
    positions = torch.arange(size, device=ids.device)
    owners = torch.searchsorted(offsets[1:], positions, right=True).clamp_(max=tokens - 1)
    return KeptEntries(
        ids, owners, offsets, ids == token_ids.long()[owners], active[owners], spans
    )  # fmt: skip


def find_trouble(
    entries: KeptEntries, token_ids: Tensor, active: Tensor, vocabulary: int
) -> Trouble:
    ids, order = torch.sort(entries.ids, stable=True)
    return Trouble(
        active & _outside(entries, vocabulary),
        active & _repeated(ids, entries.tokens[order], token_ids.shape[0]),
        active & _missing(entries),
    )


def make_entries(kept: KeptSets, rows: TokenRows, shard: VocabShard, here: int) -> Entries:
    """``here``: how many words of the vocabulary, from ``shard.first`` on if it is spread."""
    entries = kept_entries(kept.ids, kept.offsets, rows.token_ids, rows.active)
    vocabulary = shard.vocabulary if shard.spread else here
    plural = rows.active & entries.spans & (entries.offsets.diff() > 1)
    live = plural[entries.tokens]
    local_ids = entries.ids
    if shard.spread:
        local_ids = local_ids - shard.first
        live = live & (local_ids >= 0) & (local_ids < here)
    if values_are_free(live):
        taken = live.nonzero()[:, 0]
    else:
        taken = torch.argsort((~live).to(torch.uint8), stable=True)[: None if here else 0]
    counts = _sums(live, entries.offsets)
    live_offsets = F.pad(counts.cumsum(0), (1, 0))
    live_ids, tokens = local_ids[taken].clamp(0, max(0, here - 1)), entries.tokens[taken]
    positions = torch.arange(live_ids.shape[0], device=live_ids.device)
    keys = torch.where(positions < live_offsets[-1], live_ids, here)
    sorted_ids, order = torch.sort(keys, stable=True)
    if shard.spread:  # the same on all ranks, so of all entries
        all_ids, all_order = torch.sort(entries.ids, stable=True)
        repeated = _repeated(all_ids, entries.tokens[all_order], rows.count)
    else:
        # Of the entries that are left out or clamped none is of a set that has no other trouble.
        repeated = _repeated(sorted_ids, tokens[order], rows.count)
    trouble = _outside(entries, vocabulary) | _missing(entries) | repeated | ~entries.spans
    return Entries(
        live_ids, tokens, entries.hits[taken], live_offsets, rows.active, plural,
        rows.active & trouble, sorted_ids, order,
    )  # fmt: skip


def _outside(entries: KeptEntries, vocabulary: int) -> Tensor:
    outside = (entries.ids < 0) | (entries.ids >= vocabulary)
    return _sums(outside, entries.offsets) > 0


def _missing(entries: KeptEntries) -> Tensor:
    return _sums(entries.hits, entries.offsets) == 0


def _repeated(sorted_ids: Tensor, tokens: Tensor, count: int) -> Tensor:
    """(N,) bool: whether a token has an id twice. By a stable sort these are side by side."""
    again = (sorted_ids[1:] == sorted_ids[:-1]) & (tokens[1:] == tokens[:-1])
    found = torch.zeros(count + 1, dtype=torch.bool, device=tokens.device)
    return found.index_fill_(0, torch.where(again, tokens[1:], count), True)[:-1]


def _sums(flags: Tensor, offsets: Tensor) -> Tensor:
    """(N,) int64: how many of each token's entries are flagged."""
    running = F.pad(flags.cumsum(0), (1, 0))
    return running[offsets].diff()
