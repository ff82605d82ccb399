"""Tokens that count in each sequence, from a mask or from offsets."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_cu_seqlens, check_mask, values_are_free


def sequence_lengths(mask: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    """(G,) int64 number of tokens that count in each sequence.

    Args:
        mask: (B, T), or (N,) with ``cu_seqlens`` and then optional. A position counts where
            mask != 0; any dtype.
        cu_seqlens: (G + 1,) int32 or int64 offsets of a packed stream.

    No host sync.

    Raises:
        TypeError: a mask that is not a tensor, or complex.
        ValueError: no mask of padded input, or another shape. On the CPU also a mask with a
            negative value or NaN, such as an additive attention mask or labels: elsewhere such
            positions count, as reading them would need a sync.
    """
    if mask is not None:
        check_mask("mask", mask, mask)
    if cu_seqlens is None:
        if mask is None:
            raise ValueError("mask is required for padded input; it gives the lengths")
        if mask.ndim != 2:
            raise ValueError(
                f"mask must be (B, T), or (N,) with cu_seqlens; got {tuple(mask.shape)}"
            )
        return (mask != 0).sum(-1)
    check_cu_seqlens(cu_seqlens, mask)
    if mask is None:
        return cu_seqlens.diff().long()
    if mask.ndim != 1:
        raise ValueError(
            f"with cu_seqlens the mask must be packed, (N,); got {tuple(mask.shape)}: pass "
            "mask.reshape(-1), or drop cu_seqlens"
        )
    counted = torch.nn.functional.pad((mask != 0).cumsum(0), (1, 0))
    # Where the offsets cannot be checked without a sync, at least nothing is read out of bounds.
    return counted[cu_seqlens.long().clamp(0, mask.shape[0])].diff()


def check_lengths(lengths: Tensor) -> Tensor:
    """Checked (G,) lengths as int64, in which no sum of theirs wraps."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a tensor, got {type(lengths).__name__}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(
            f"lengths must have an integer dtype, got {lengths.dtype}; they are token counts: "
            "use (mask != 0).sum(-1)"
        )
    if lengths.ndim != 1:
        raise ValueError(f"lengths must be (G,), got {tuple(lengths.shape)}; use mask.sum(-1)")
    lengths = lengths.long()
    if values_are_free(lengths) and bool((lengths < 0).any()):
        raise ValueError("lengths must be >= 0, got a negative length")
    return lengths
