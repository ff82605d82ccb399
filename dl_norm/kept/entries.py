"""The entries of kept sets: which belong to which token, which take part, and what is wrong.

Nothing here synchronises a device, and whatever the offsets and ids hold, nothing that is computed
from these entries reads out of bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import values_are_free
from ..rows.records import TokenRows


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
    more. Where the host cannot count them E is M, and the others stand behind the last offset.

    A set of the token alone has log-prob 0 and no gradient whatever its logit is.
    """

    ids: Tensor  # int64 in [0, V)
    tokens: Tensor  # int64
    hits: Tensor  # bool
    offsets: Tensor  # (N + 1,) int64
    bad: Tensor  # (N,) bool: a token that counts, whose set is wrong
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
    outside = (entries.ids < 0) | (entries.ids >= vocabulary)
    # Sorted by id and, as the sort is stable, by token: what is there twice is side by side.
    ids, order = torch.sort(entries.ids, stable=True)
    owners = entries.tokens[order]
    again = (ids[1:] == ids[:-1]) & (owners[1:] == owners[:-1])
    repeated = F.pad(again, (1, 0)) if ids.shape[0] else again
    return Trouble(
        active & (_sums(outside, entries.offsets) > 0),
        active & _any_of(owners, repeated, token_ids.shape[0]),
        active & (_sums(entries.hits, entries.offsets) == 0),
    )


def make_entries(ids: Tensor, offsets: Tensor, rows: TokenRows, vocabulary: int) -> Entries:
    entries = kept_entries(ids, offsets, rows.token_ids, rows.active)
    trouble = find_trouble(entries, rows.token_ids, rows.active, vocabulary)
    bad = rows.active & (trouble.outside | trouble.repeated | trouble.missing | ~entries.spans)
    live = entries.active & (entries.offsets.diff()[entries.tokens] > 1)
    if values_are_free(live):
        taken = live.nonzero()[:, 0]
    else:
        taken = torch.argsort((~live).to(torch.uint8), stable=True)
    counts = _sums(live, entries.offsets)
    part = Entries(
        ids=entries.ids[taken].clamp(0, vocabulary - 1),
        tokens=entries.tokens[taken],
        hits=entries.hits[taken],
        offsets=F.pad(counts.cumsum(0), (1, 0)),
        bad=bad,
        sorted_ids=taken,
        order=taken,
    )
    positions = torch.arange(part.count, device=ids.device)
    keys = torch.where(positions < part.offsets[-1], part.ids, vocabulary)
    sorted_ids, order = torch.sort(keys, stable=True)
    return replace(part, sorted_ids=sorted_ids, order=order)


def _sums(flags: Tensor, offsets: Tensor) -> Tensor:
    """(N,) int64: how many of each token's entries are flagged."""
    running = F.pad(flags.cumsum(0), (1, 0))
    return running[offsets].diff()


def _any_of(tokens: Tensor, flags: Tensor, count: int) -> Tensor:
    """(N,) bool: whether an entry of the token is flagged; these come in any order."""
    found = torch.zeros(count + 1, dtype=torch.bool, device=tokens.device)
    return found.index_fill_(0, torch.where(flags, tokens, count), True)[:-1]
