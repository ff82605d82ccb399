"""Sums over the cells of a batch: its prompts, or the signs of the advantage within a prompt.

Ids are any integers and cells of any size, so the number of cells is data; tables are made as long
as it can get, and no value has to be read to allocate them: no host sync.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Cells(NamedTuple):
    """The cell of each of G sequences."""

    of: Tensor  # (G,) int64, 0 <= of < size
    size: int

    def totals(self, values: Tensor) -> Tensor:
        """(size,) sums of (G,) ``values``. What is added here are whole numbers in floating point,
        so that no order of adding changes a bit: on GPUs the order varies from run to run."""
        return values.new_zeros(self.size).index_add_(0, self.of, values)


def make_cells(groups: Tensor, signs: Tensor | None) -> Cells:
    """Cells of equal ids in ``groups``, and of equal ``signs`` (-1, 0, 1) if they are given."""
    order = groups.argsort()
    ordered = groups[order]
    starts = torch.ones_like(ordered)
    starts[1:] = ordered[1:] != ordered[:-1]
    index = torch.empty_like(ordered)
    index[order] = starts.cumsum(0) - 1
    if signs is None:
        return Cells(index, groups.shape[0])
    return Cells(3 * index + signs + 1, 3 * groups.shape[0])
