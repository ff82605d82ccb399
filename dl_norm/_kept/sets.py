"""Kept sets as a sampler returns them, and the checks of them."""

# Without `from __future__ import annotations`: pdoc evaluates those of a named tuple elsewhere.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_tensor, values_are_free
from .entries import Trouble, find_trouble, kept_entries

_INTEGERS = (torch.int64, torch.int32)


class KeptSets(NamedTuple):
    """What top-k, top-p or min-p sampling had left to draw each token from, in CSR form.

    Position t, counted through (B, T) row by row or along a packed (N,), was drawn from
    ``ids[offsets[t] : offsets[t + 1]]``, in any order. vLLM returns them so, as ``SamplingMask``,
    from 0.28 on; see :meth:`cat` for the batch.

    - ids: (M,) int64 or int32. Where the token counts, each is in [0, V) and once in its set, and
      the token is one of them.
    - offsets: (N + 1,) int64 or int32, rising from 0 to M. A token that does not count may have
      any set, the empty one too.

    On a CPU other sets are a ValueError; on a GPU the loss is NaN, or the log-prob of that token.
    """

    ids: Tensor
    offsets: Tensor

    @classmethod
    def cat(cls, parts: Sequence[tuple[Tensor, Tensor]], length: int | None = None) -> "KeptSets":
        """The sets of a batch from (ids, offsets) of each sequence, one behind the other.

        ``length``: T of a padded batch; empty sets fill every sequence up to it. None: packed.
        """
        ids, offsets, total = [], [], 0
        for part_ids, part_offsets in parts:
            ids.append(part_ids)
            missing = 0 if length is None else length - (part_offsets.shape[0] - 1)
            if missing < 0:
                raise ValueError(
                    f"a sequence has {part_offsets.shape[0] - 1} kept sets, more than length = "
                    f"{length}"
                )
            ends = part_offsets[1:].long()
            if missing:
                ends = torch.cat([ends, part_offsets[-1:].long().expand(missing)])
            offsets.append(ends + total)
            total += part_ids.shape[0]
        if not ids:
            return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        first = offsets[0].new_zeros(1)
        return cls(torch.cat(ids), torch.cat([first, *offsets]))


def check_kept(kept: KeptSets, token_ids: Tensor, mask: Tensor | None, vocabulary: int) -> None:
    """Checks the sets of checked ``token_ids``; on the CPU also what their values tell.

    Elsewhere a set that is wrong makes the loss NaN instead of raising.
    """
    if not isinstance(kept, KeptSets):
        raise TypeError(
            f"kept must be dl_norm.KeptSets(ids, offsets) or None, got {type(kept).__name__}"
        )
    for name, tensor in (("kept.ids", kept.ids), ("kept.offsets", kept.offsets)):
        if isinstance(tensor, Tensor) and tensor.dtype not in _INTEGERS:
            raise TypeError(f"{name} must be int64 or int32, got {tensor.dtype}")
        check_tensor(name, tensor, _INTEGERS)
        if tensor.device != token_ids.device:
            raise ValueError(f"{name} is on {tensor.device}, not on {token_ids.device}: move it")
    tokens = token_ids.numel()
    if kept.ids.ndim != 1:
        raise ValueError(f"kept.ids must be (M,), got {tuple(kept.ids.shape)}")
    if kept.offsets.shape != (tokens + 1,):
        raise ValueError(
            f"kept.offsets must be (N + 1,) = ({tokens + 1},) for token_ids "
            f"{tuple(token_ids.shape)}, got {tuple(kept.offsets.shape)}"
        )
    if values_are_free(token_ids):
        _check_values(kept, token_ids, mask, vocabulary)


def _check_values(kept: KeptSets, token_ids: Tensor, mask: Tensor | None, vocabulary: int) -> None:
    first, last = int(kept.offsets[0]), int(kept.offsets[-1])
    size = kept.ids.shape[0]
    if first != 0 or last != size or bool((kept.offsets.diff() < 0).any()):
        raise ValueError(
            f"kept.offsets must rise from 0 to M = {size} without falling, got [{first}, ..., "
            f"{last}]"
        )
    counted = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask != 0
    entries = kept_entries(kept.ids, kept.offsets, token_ids.reshape(-1), counted.reshape(-1))
    trouble = find_trouble(entries, token_ids.reshape(-1), counted.reshape(-1), vocabulary)
    for kind, message in _MESSAGES.items():
        wrong = getattr(trouble, kind)
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0, 0])
            members = kept.ids[int(kept.offsets[place]) : int(kept.offsets[place + 1])].tolist()
            raise ValueError(
                f"{message.format(V=vocabulary)}: position {place} has token "
                f"{int(token_ids.reshape(-1)[place])} and the set {members[:8]}"
                f"{' and more' if len(members) > 8 else ''}"
            )


_MESSAGES = {
    "outside": "kept.ids must be in [0, V = {V}) where mask != 0",
    "repeated": "a kept set must not hold a token twice where mask != 0",
    "missing": (
        "every token with mask != 0 must be in its kept set, as it was sampled from it (mask "
        "tokens without a set, and add their loss by a call without kept)"
    ),
}
assert tuple(_MESSAGES) == Trouble._fields
