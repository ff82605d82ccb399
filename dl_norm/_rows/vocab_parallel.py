"""Rows of logits whose vocabulary is spread over the processes of a group.

Nobody holds a whole row. Two passes over the part that is here, and between them two small
collectives: the maximum of the references, then the sum of what :func:`row_sums` found, the logit
of the token itself among it, at its one owner. From then on every process computes the same token
losses, with the same bits, and the gradient of its own logits. The gradient at the hidden states
is a sum over the processes, for which chunks.py calls :class:`SumOverShards`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import values_are_free
from .records import RowOutputs, RowSettings, TokenRows, VocabShard, with_entropy

if TYPE_CHECKING:
    from types import ModuleType


def group_of(shard: VocabShard) -> Any:
    from torch.distributed import distributed_c10d

    # By its name, as an operator takes no group; functional collectives do the same.
    return distributed_c10d._resolve_process_group(shard.group)  # pyright: ignore


def all_reduce(tensor: Tensor, shard: VocabShard, op: str, *, wait: bool = True) -> Any:
    """In place; everything that is communicated here goes through this function."""
    import torch.distributed as dist

    if tensor.numel() == 0:  # on every process alike
        return None
    reduction = getattr(dist.ReduceOp, op)
    return dist.all_reduce(tensor, reduction, group=group_of(shard), async_op=not wait)


def row_pass(module: ModuleType, shard: VocabShard) -> Callable[..., None]:
    """``module.logits_pass``, of rows that are spread over processes if the shard says so."""
    if not shard.spread:
        return module.logits_pass

    def spread_pass(
        logits: Tensor,
        grad: Tensor | None,
        rows: TokenRows,
        first_row: int,
        settings: RowSettings,
        outputs: RowOutputs,
    ) -> None:
        count = 3 + with_entropy(rows, settings) + settings.sum_sq_probs
        sums = torch.zeros((count, rows.count), dtype=torch.float32, device=logits.device)
        module.row_sums(logits, rows, first_row, settings, sums)
        span = slice(first_row, first_row + logits.shape[:-1].numel())
        here = is_here(rows.token_ids[span], shard, logits.shape[-1])
        sums[:, span] = combined(
            sums[:, span], here, with_entropy(rows, settings), shard,
            module.reference_scale(settings),
        )  # fmt: skip
        module.logits_pass(logits, grad, rows, first_row, settings, outputs, sums)

    return spread_pass


def is_here(token_ids: Tensor, shard: VocabShard, words: int) -> Tensor:
    """Whether a token is one of the ``words`` that this process has."""
    own = token_ids - shard.first
    return (own >= 0) & (own < words)


def combined(sums: Tensor, here: Tensor, entropy: bool, shard: VocabShard, scale: float) -> Tensor:
    """What ``row_sums`` wrote, over all processes, relative to one reference."""
    reference = sums[0].clone()
    all_reduce(reference, shard, "MAX")
    # 2^-300 is 0. Without the bound a part of which nothing is possible would be 0 * -inf.
    shift = ((sums[0] - reference) * scale).clamp_(min=-300.0)
    factor = shift.exp2()
    _, own, total, *more = sums
    added = [torch.where(here, own + shift, 0.0), total * factor]
    if entropy:
        added.append((more.pop(0) + shift * total) * factor)
    added += [squares * factor.square() for squares in more]
    stacked = torch.stack(added)
    all_reduce(stacked, shard, "SUM")
    return torch.cat([reference[None], stacked])


class SumOverShards:
    """Adds up over the processes of the group, each sum while the caller goes on."""

    def __init__(self, shard: VocabShard):
        self.shard = shard
        self.under_way: list[tuple[Any, Callable[[], Any] | None]] = []

    def start(self, tensor: Tensor, then: Callable[[], Any] | None = None) -> None:
        """``tensor`` is the sum, and ``then`` was called, once :meth:`wait` has returned."""
        work = all_reduce(tensor.detach(), self.shard, "SUM", wait=False)
        self.under_way.append((work, then))

    def wait(self) -> None:
        for work, then in self.under_way:
            if work is not None:
                work.wait()
            if then is not None:
                then()
        self.under_way.clear()


def checksum(values: Tensor) -> Tensor:
    """0-dim int64, of integers: their sum, each times what depends on its place."""
    place = torch.arange(1, values.shape[0] + 1, device=values.device)
    return (values.long() * (place % 8191)).sum()


def check_agreement(rows: TokenRows, shard: VocabShard, **sizes: int | Tensor) -> Tensor | None:
    """The processes must have the same tokens and cut them alike, or they would add up what does
    not belong together. Where they do not: ValueError on every process if values are free, else
    the returned bool (0-dim) is True. None if the vocabulary is not spread.
    """
    if not shard.spread:
        return None
    of_ids = checksum(torch.where(rows.active, rows.token_ids.long() + 1, 0))
    known = [shard.vocabulary, rows.count, *sizes.values()]
    mine = torch.stack(
        [*(size if isinstance(size, Tensor) else torch.full_like(of_ids, size) for size in known),
         of_ids]
    )  # fmt: skip
    both = torch.cat([mine, -mine])
    all_reduce(both, shard, "MAX")
    largest, least = both.chunk(2)
    different = largest != -least
    if not values_are_free(rows.token_ids):
        return different.any()
    if bool(different.any()):
        names = ["vocab_size", "tokens", *sizes, "token_ids with mask != 0 (a checksum)"]
        found = [
            f"{name} from {-int(low)} to {int(high)}"
            for name, low, high, differs in zip(names, least, largest, different, strict=True)
            if differs
        ]
        raise ValueError(
            "the processes of tp_group must have the same tokens and cut them alike, but they "
            f"have {', '.join(found)}: give all of them the same hidden states, token_ids and mask"
        )
    return None
