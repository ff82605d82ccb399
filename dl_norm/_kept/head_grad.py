"""The head's gradient over kept sets, whose rows are 0 but for a few."""

from __future__ import annotations

import math
import mmap
import sys

import torch
from torch import Tensor

_LARGE = 1 << 20  # bytes from which it is worth asking the system for memory


def few_rows(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """The matrix of ``shape`` with these ``values`` in these ``rows``, rising, and 0 elsewhere, as
    a sparse tensor: it is kept so until backward, which then scales the values alone."""
    return torch.sparse_coo_tensor(
        rows[None], values, shape, is_coalesced=True, check_invariants=False
    )


def dense(matrix: Tensor, values: Tensor | None = None) -> Tensor:
    """Of :func:`few_rows`, maybe with other ``values``; a dense tensor as it is."""
    if not matrix.is_sparse:
        return matrix
    values = matrix.values() if values is None else values
    return zeros(matrix.shape, values.dtype).index_copy_(0, matrix.indices()[0], values)


def zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """On the CPU, in memory that the system makes when it is first used: torch.zeros writes all
    of it, which takes longer than all the rest of a call. Who reads the gradient still pays for
    that, but less: what is not written is one page of zeros, seen many times."""
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE or sys.platform == "win32":
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
