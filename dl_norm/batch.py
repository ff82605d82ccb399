"""The tensors of one call of a loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """What operators, launchers and both implementations take whole.

    A value per token has the shape of ``log_probs``, (B, T) or packed (N,); a value per sequence
    is (G, 1), so that the two are never mistaken for each other.
    """

    log_probs: Tensor
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None  # None unless a KL term or its metric is asked for
    advantages: Tensor  # per token or per sequence
    mask: Tensor | None
    policy_weights: Tensor | None  # e q w of the formula; float, or bool: kept or dropped
    weights: Tensor  # (G,) float32
    cu_seqlens: Tensor | None

    def is_per_token(self, values: Tensor) -> bool:
        return values.shape == self.log_probs.shape


def batch_of(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ref_log_probs: Tensor | None,
    rollout_weights: Tensor | None,
    entropy_mask: Tensor | None,
    sequence_mask: Tensor | None,
) -> Batch:
    """Of what is passed around one by one."""
    per_sequence = (weights.shape[0],)

    def either(values: Tensor) -> Tensor:
        return values[:, None] if values.shape == per_sequence else values

    def spread(values: Tensor) -> Tensor:
        if values.shape == log_probs.shape or cu_seqlens is None:
            return values
        positions = cu_seqlens.new_tensor(range(log_probs.shape[0]))
        return values[
            (positions[:, None] >= cu_seqlens[1:]).sum(-1).clamp(max=per_sequence[0] - 1), 0
        ]

    policy_weights = None if rollout_weights is None else either(rollout_weights)
    for mask_of in (None if sequence_mask is None else sequence_mask[:, None], entropy_mask):
        if mask_of is None:
            continue
        kept = mask_of != 0
        if policy_weights is None:
            policy_weights = kept
            continue
        if policy_weights.shape != kept.shape:
            policy_weights, kept = spread(policy_weights), spread(kept)
        policy_weights = (
            policy_weights * kept
            if policy_weights.dtype == kept.dtype
            else policy_weights.where(kept, 0)
        )
    return Batch(
        log_probs, old_log_probs, ref_log_probs, either(advantages), mask, policy_weights, weights,
        cu_seqlens,
    )  # fmt: skip
