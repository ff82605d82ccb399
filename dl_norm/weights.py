"""Loss aggregation as one weight per sequence, known from the lengths alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_cu_seqlens, check_number, values_are_free
from .group_sums import Group, sum_over
from .theory import METHODS


def sequence_weights(
    lengths: Tensor,
    method: str = "delta_l",
    *,
    alpha: float = 1.0,
    max_length: int | None = None,
    group: Group = None,
) -> Tensor:
    r"""Weights x with ``loss = sum_i x_i * sum_t loss_it`` for a rollout batch of G sequences.

    With L_i the number of tokens of sequence i that count, sums over the sequences with L_i > 0:

    - ``"delta_l"``: x_i = (1/M) L_i^-alpha / sum_j L_j^-alpha. Unbiased up to the constant M;
      of least variance at alpha = 1 when a sequence's gradient variance grows like L_i.
    - ``"grpo"``: x_i = 1 / (G L_i), the mean over sequences of the mean over tokens.
    - ``"dapo"``: x_i = 1 / sum_j L_j, the mean over tokens.
    - ``"dr_grpo"``: x_i = 1 / (G M), the same as ``"delta_l"`` with alpha = 0.
    - ``"luspo"``: x_i = 1 / G, the mean over sequences of the sum over tokens; its paper pairs it
      with ``ratio_level="sequence"``.

    Call it where the whole rollout batch is visible, before the batch is cut into micro-batches,
    and hand each slice its own weights: the loss is then the same however the batch is cut.

    Args:
        lengths: (G,) integer tensor, tokens that count in each sequence, e.g. ``mask.sum(-1)``.
            A sequence of length 0 gets weight 0 and is left out of every sum and of G.
        method: one of ``METHODS``.
        alpha: exponent of ``"delta_l"``, 0 <= alpha <= 16. Must be left at 1 for other methods.
        max_length: the constant M > 0, in tokens, usually the maximum response length. Required
            for ``"delta_l"`` and ``"dr_grpo"``, refused for the others. Never read off padding.
        group: process group over which the batch is spread. ``lengths`` are then this rank's and
            the sums run over the group (one all-reduce of one number). None: this process alone.

    Returns:
        (G,) float32 tensor on the device of ``lengths``. No host sync.

    Raises:
        TypeError: ``lengths`` is not an integer tensor.
        ValueError: wrong shape, unknown method, alpha or max_length out of range, missing or
            without effect; a negative length on the CPU (elsewhere it counts as 0).

    Source: He et al., arXiv:2509.07558, section 3; DAPO arXiv:2503.14476; Dr. GRPO
    arXiv:2503.20783; LUSPO arXiv:2602.05261.
    """
    _check_lengths(lengths)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if method == "delta_l":
        _check_alpha(alpha)
    elif alpha != 1.0:
        raise ValueError(f"alpha={alpha} has no effect on method={method!r}; omit it")
    if method in ("delta_l", "dr_grpo"):
        constant = _checked_max_length(max_length, method)
    elif max_length is not None:
        raise ValueError(f"max_length={max_length} has no effect on method={method!r}; omit it")
    else:
        constant = 1

    sequences = _length_power(lengths, 0.0)
    if method == "delta_l":
        numerator = _length_power(lengths, -alpha)
        denominator = _total(numerator, group) * constant
    elif method == "grpo":
        numerator = _length_power(lengths, -1.0)
        denominator = _total(sequences, group)
    elif method == "dapo":
        numerator = sequences
        denominator = _total(_length_power(lengths, 1.0), group)
    else:  # dr_grpo; luspo is its case M = 1
        numerator = sequences
        denominator = _total(sequences, group) * constant
    return _divide(numerator, denominator).float()


def reweight_advantages(
    advantages: Tensor,
    lengths: Tensor,
    *,
    alpha: float = 1.0,
    group: Group = None,
) -> Tensor:
    r"""Advantages times r_i = L_i^-alpha / mean_j L_j^-alpha, for a trainer that sums token losses.

    The factors have mean 1 over the sequences with L_i > 0 and are positive, so they may be moved
    from the loss into the advantage: min, clip and dual clip are positively homogeneous in A. A
    trainer whose loss is (1/(G M)) sum_i sum_t loss_it (Dr. GRPO) then computes the DeltaL loss
    with x_i = r_i / (G M). KL and entropy terms are not reweighted.

    Args:
        advantages: (G,) or (G, T), any floating dtype.
        lengths: (G,) integer tensor of this rank's sequences, as for :func:`sequence_weights`.
        alpha: exponent, 0 <= alpha <= 16.
        group: process group over which the batch is spread (one all-reduce of two numbers).

    Returns:
        A tensor of the shape and dtype of ``advantages``; 0 for sequences of length 0.

    Raises:
        TypeError, ValueError: as :func:`sequence_weights`, and for shapes that do not fit.

    Source: the official code of arXiv:2509.07558 multiplies the advantages by these factors.
    """
    _check_lengths(lengths)
    _check_alpha(alpha)
    if not isinstance(advantages, Tensor) or not advantages.is_floating_point():
        raise TypeError("advantages must be a floating point tensor; convert with .float()")
    if advantages.ndim not in (1, 2) or advantages.shape[0] != lengths.shape[0]:
        raise ValueError(
            f"advantages must be (G,) or (G, T) with G = {lengths.shape[0]} as in lengths, "
            f"got {tuple(advantages.shape)}"
        )
    power = _length_power(lengths, -alpha)
    count = _length_power(lengths, 0.0)
    total, sequences = _total(torch.stack([power, count]), group)
    factors = _divide(power * sequences, total).to(torch.float32)
    if advantages.ndim == 2:
        factors = factors[:, None]
    return (advantages.float() * factors).to(advantages.dtype)


def sequence_lengths(mask: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    """(G,) int64 number of tokens that count: of a (B, T) mask, or of a packed stream with
    ``cu_seqlens`` (G + 1,) and an optional (N,) mask."""
    if cu_seqlens is None:
        if mask is None:
            raise ValueError("mask is required for padded input; it gives the lengths")
        return (mask != 0).sum(-1)
    check_cu_seqlens(cu_seqlens, mask)
    if mask is None:
        return cu_seqlens.diff().long()
    counted = torch.nn.functional.pad((mask != 0).cumsum(0), (1, 0))
    # Where the offsets cannot be checked without a sync, at least nothing is read out of bounds.
    return counted[cu_seqlens.long().clamp(0, mask.shape[0])].diff()


def _length_power(lengths: Tensor, exponent: float) -> Tensor:
    # float64 where the device has it: these are G numbers, and every loss is scaled by them.
    dtype = torch.float32 if lengths.device.type == "mps" else torch.float64
    power = lengths.clamp(min=1).to(dtype) ** exponent
    return torch.where(lengths > 0, power, torch.zeros_like(power))


def _total(values: Tensor, group: Group) -> Tensor:
    return sum_over(values.sum(-1), group)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    # An all-empty batch has denominator 0 and numerators 0: its weights are 0, not NaN.
    return numerator / torch.where(denominator > 0, denominator, torch.ones_like(denominator))


def _check_lengths(lengths: Tensor) -> None:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a tensor, got {type(lengths).__name__}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(
            f"lengths must have an integer dtype, got {lengths.dtype}; they are token counts: "
            "use (mask != 0).sum(-1)"
        )
    if lengths.ndim != 1:
        raise ValueError(f"lengths must be (G,), got {tuple(lengths.shape)}; use mask.sum(-1)")
    if values_are_free(lengths) and bool((lengths < 0).any()):
        raise ValueError("lengths must be >= 0, got a negative length")


def _check_alpha(alpha: float) -> None:
    # Far beyond any use, and short of where L^-alpha underflows in float64.
    check_number(alpha, "alpha", "0 <= alpha <= 16", lambda a: 0 <= a <= 16)


def _checked_max_length(max_length: float | None, method: str) -> float:
    if max_length is None:
        raise ValueError(
            f"method={method!r} needs max_length, the constant M (usually the maximum response "
            "length); it is not read off the padding"
        )
    check_number(max_length, "max_length", "max_length > 0", lambda m: m > 0)
    return max_length
