"""Which tokens of a batch that processes hold together have the largest, or the smallest, values.

By their digits: a histogram of the first digit over all processes tells which of its values the
boundary lies in, one of the second digit among those where in it, and so on. Three all-reduces of
2048 counts, no sort, no host sync, any number of tokens on each process; integers alone are added
up, so the answer has the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..weights.group_sums import Group, is_spread, sum_over

# Of keys of 33 bits, the first digit first.
_DIGITS = ((22, 11), (11, 11), (0, 11))
LARGEST_KEY = 2**33 - 1


def wide(values: Tensor) -> Tensor:
    """In float64 where the device has it."""
    return values.float() if values.device.type == "mps" else values.double()


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values[index], which would wait for the index on the host."""
    return values.gather(0, index[None])[0]


def order_keys(values: Tensor) -> Tensor:
    """int64 numbers below 2^32 in the order of float32 ``values``."""
    bits = (values.float() + 0.0).view(torch.int32).long() & 0xFFFFFFFF  # -0 is 0
    return torch.where(bits >= 2**31, 0xFFFFFFFF - bits, bits + 2**31)


def largest(keys: Tensor, wanted: Tensor, count: Tensor, group: Group) -> Tensor:
    """bool, True at the ``count`` largest keys of those ``wanted``, or at all if there are fewer.

    keys, wanted: (n,) of this process. Of equal keys the first are taken, in the order of processes
    and positions.
    """
    rest = torch.minimum(count, sum_over(wanted.sum(), group))  # still to be found

    def choose(counts: Tensor) -> Tensor:
        nonlocal rest
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = (at_least >= rest).sum() - 1
        rest = rest - _at(torch.nn.functional.pad(at_least, (0, 1)), digit + 1)
        return digit

    boundary = _boundary(keys, wanted, group, choose)
    return (wanted & (keys > boundary)) | _first(wanted & (keys == boundary), rest, group)


def smallest_of_mean_below(keys: Tensor, wanted: Tensor, bound: float, group: Group) -> Tensor:
    """bool, True at the smallest keys of those ``wanted``, as many as have a mean below ``bound``,
    and at least at one."""
    count = torch.zeros((), dtype=torch.int64, device=keys.device)  # below the boundary
    total = torch.zeros_like(count)

    def choose(counts: Tensor, sums: Tensor) -> Tensor:
        nonlocal count, total
        counts, sums = (
            torch.cat([before[None], before + addends.cumsum(0)])
            for before, addends in ((count, counts), (total, sums))
        )
        # Whether all up to a digit fit: true up to some digit, and false from there on.
        fit = (counts == 0) | (wide(sums) < bound * wide(counts))
        digit = (fit[1:].sum()).clamp(max=len(fit) - 2)
        count, total = _at(counts, digit), _at(sums, digit)
        return digit

    boundary = _boundary(keys, wanted, group, choose, sums=True)
    # Of the q keys that are the boundary b, those for which total + q b < bound (count + q).
    room = (bound * wide(count) - wide(total)) / (wide(boundary) - bound).clamp(min=1e-30)
    fits = room.ceil().clamp(max=LARGEST_KEY) - 1
    fits = torch.maximum(fits, wide(count == 0))  # one at least
    return (wanted & (keys < boundary)) | _first(wanted & (keys == boundary), fits, group)


def _boundary(
    keys: Tensor, wanted: Tensor, group: Group, choose: Callable[..., Tensor], sums: bool = False
) -> Tensor:
    """The key whose digits ``choose`` picks one by one, from how many of the keys ``wanted`` with
    the digits before have each value of the next, and with ``sums`` from the sums of these."""
    boundary = torch.zeros((), dtype=torch.int64, device=keys.device)
    for shift, bits in _DIGITS:
        among = wanted & (keys >> (shift + bits) == boundary)
        digits = (keys >> shift) & (2**bits - 1)
        addends = [among.long(), *([torch.where(among, keys, 0)] if sums else [])]
        table = torch.zeros((len(addends), 2**bits), dtype=torch.int64, device=keys.device)
        table = table.scatter_add(1, digits.expand(len(addends), -1), torch.stack(addends))
        boundary = (boundary << bits) + choose(*sum_over(table, group))
    return boundary


def _first(chosen: Tensor, count: Tensor, group: Group) -> Tensor:
    """The first ``count`` of the chosen, in the order of processes and positions."""
    before = torch.zeros((), dtype=torch.int64, device=chosen.device)
    if is_spread(group):
        counts = before.new_zeros(dist.get_world_size(group))
        rank = dist.get_rank(group)
        counts[rank] = chosen.sum()
        before = sum_over(counts, group)[:rank].sum()
    return chosen & (before + chosen.cumsum(0) <= count)
