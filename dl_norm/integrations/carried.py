r"""What the adapters share: weights that ride on the advantages, and the loss for them.

In most trainers the loss sees one micro-batch and nothing more, while the weights x_i of
:func:`dl_norm.sequence_weights` need the whole rollout. A factor f_i > 0 may move from the loss
into the advantage, because every clip is positively homogeneous in A, so the weights travel with
the advantages:

    where the rollout is whole      A_i <- f_i A_i,  f_i = x_i D
    in the loss                     sum over the micro-batch of (1/c) sum_t l_it(f_i A_i)

with D what the trainer divides by in the end and c what the loss itself divides by, so that the
step's gradient is sum_i x_i grad sum_t l_it. KL and entropy terms are not reweighted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dl_norm
from dl_norm.metrics import PolicyLossMetrics
from dl_norm.weights.group_sums import Group, sum_over


def row_factors(lengths: Tensor, *, alpha: float = 1.0, group: Group = "local") -> Tensor:
    r"""(B,) float32 factors f_i = B L_i^-alpha / sum_j L_j^-alpha, 0 where L_i = 0.

    For a trainer that divides the sum of all token losses by its number of rows and by a constant
    M: f_i / (B M) = x_i, the DeltaL weight over the whole rollout. B counts the empty rows too,
    since the trainer's division does. If the trainer takes S steps with B / S rows each, every
    step's division is by B / S, and the mean of the S gradients is the rollout's.

    Args:
        lengths: (B,) integers, tokens that count in each row of the **whole** rollout, or in this
            rank's part of it with ``group`` (two all-reduces of one number).
        alpha, group: as for :func:`dl_norm.sequence_weights`.
    """
    rows = sum_over(torch.tensor(lengths.shape[0], device=lengths.device), group)
    return dl_norm.sequence_weights(lengths, alpha=alpha, max_length=1, group=group) * rows


def carried_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    scale: float | Tensor = 1.0,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, PolicyLossMetrics]:
    """``scale`` times the plain sum of the token losses, for advantages that carry the weights.

    ``scale`` may be a 0-dim tensor on the device: it is not read on the host. ``options`` are those
    of :func:`dl_norm.policy_loss`.
    """
    if mask is None and cu_seqlens is None:
        mask = torch.ones_like(log_probs, dtype=torch.bool)
    sequences = log_probs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    weights = torch.ones(sequences, device=log_probs.device) * scale
    loss, metrics = dl_norm.policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        mask,
        weights,
        cu_seqlens=cu_seqlens,
        return_metrics=True,
        **options,
    )
    return loss, metrics


def offsets(lengths: list[int] | Tensor, device: torch.device) -> Tensor:
    """(G + 1,) int64 cu_seqlens of sequences laid end to end. One copy to the device, no sync."""
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, non_blocking=True)


def clip_fraction(metrics: PolicyLossMetrics) -> Tensor:
    """0-dim share of the tokens whose ratio is cut off by eps_low or eps_high."""
    return (metrics.clipped_low + metrics.clipped_high) / metrics.tokens.clamp(min=1)


def required(value: Any, name: str, remedy: str) -> Any:
    """``value``, or a ValueError when it is None: nothing falls back to the micro-batch."""
    if value is None:
        raise ValueError(f"{name} is missing: {remedy}")
    return value


def refuse(trainer: str, options: dict[str, Any], remedy: str) -> None:
    """ValueError for every option (name -> value) that is set and that the loss cannot follow."""
    for name, value in options.items():
        if value:
            raise ValueError(f"{trainer}'s {name}={value!r} is not supported here: {remedy}")
