"""The tensors of one call of a loss, checked once."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _layout as checks
from ._checks import LOG_PROB_DTYPES, REAL_DTYPES, check_tensor, values_are_free
from ._layout import Layout, layout_of


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
    weights: Tensor  # (G,) float32 (float64 in the reference of float64 log-probs)
    cu_seqlens: Tensor | None
    rollout_log_probs: Tensor | None = None

    @property
    def sequences(self) -> int:
        return self.weights.shape[0]

    @property
    def layout(self) -> Layout:
        return Layout(self.log_probs, self.sequences, self.cu_seqlens is not None)

    def is_per_token(self, values: Tensor) -> bool:
        # torch.compile has a symbolic answer for dynamic shapes, and two of those do not compare.
        return True if values.shape == self.log_probs.shape else False  # noqa: SIM210

    def per_token(self, values: Tensor) -> Tensor:
        """``values`` so that they broadcast against the tokens."""
        if self.cu_seqlens is None or self.is_per_token(values):
            return values
        return spread(values[:, 0], self.cu_seqlens, self.log_probs.shape[0])

    def counted(self) -> Tensor:
        """bool, like the tokens."""
        if self.mask is None:
            return torch.ones_like(self.log_probs, dtype=torch.bool)
        return self.mask if self.mask.dtype == torch.bool else self.mask != 0

    def sequence_sums(self, values: Tensor) -> Tensor:
        """(G,) sums of a value per token, in float64 where the device has it."""
        wide = values if values.device.type == "mps" else values.double()
        if self.cu_seqlens is None:
            return wide.sum(-1)
        # The offsets are checked where that costs no sync; elsewhere the kernels answer with NaN.
        lengths = self.cu_seqlens.diff().long()
        return torch.segment_reduce(wide, "sum", lengths=lengths, unsafe=True)

    def sequence_means(self, values: Tensor) -> Tensor:
        """Means over the counted tokens, per sequence, of what is 0 at all others."""
        lengths = self.sequence_sums(self.counted()).clamp(min=1)
        return (self.sequence_sums(values) / lengths).float()[:, None]


def spread(values: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(N,) of (G,) values: those of each token's sequence."""
    if values_are_free(cu_seqlens):
        return values.repeat_interleave(cu_seqlens.diff(), output_size=tokens)
    if values.shape[0] == 0:
        return values.new_zeros(tokens)
    # Offsets that do not span the stream cannot raise without a sync, but nothing is read out of
    # bounds.
    ends = cu_seqlens[1:].contiguous()
    positions = torch.arange(tokens, dtype=ends.dtype, device=ends.device)
    sequence = torch.searchsorted(ends, positions, right=True).clamp_(max=values.shape[0] - 1)
    return values[sequence]


# The tensors of a call besides the log-probs and their offsets, in the order of their checks.
CHECKS = {
    "old_log_probs": checks.per_token,
    "ref_log_probs": checks.per_token,
    "advantages": checks.either,
    "rollout_weights": checks.either,
    "rollout_log_probs": checks.per_token,
    "rollout_mean_weight": checks.mean_weight,
    "weights": checks.sequence_weights,
    "mask": checks.mask_of_tokens,
    "entropy_mask": checks.mask_of_tokens,
    "sequence_mask": checks.mask_of_sequences,
}
TENSORS = ("log_probs", "cu_seqlens", *CHECKS)
_REQUIRED = ("advantages", "weights")


def make_batch(
    log_probs: Tensor,
    cu_seqlens: Tensor | None = None,
    dtypes: tuple[torch.dtype, ...] = LOG_PROB_DTYPES,
    **tensors: Tensor | None,
) -> Batch:
    """Checks types, dtypes, devices, layouts and shapes, and on the CPU what values can tell.

    ``tensors``: those of ``CHECKS``. The ones that mean one factor of the policy term become
    ``policy_weights``.
    """
    check_tensor("log_probs", log_probs, dtypes)
    layout = layout_of(log_probs, tensors.get("mask"), cu_seqlens)
    _check_rollout(tensors)
    checked: dict[str, Any] = {}
    for name, check in CHECKS.items():
        values = tensors.pop(name, None)
        absent = values is None and name not in _REQUIRED
        checked[name] = None if absent else check(name, values, layout)  # type: ignore
    assert not tensors, tensors
    entropy_mask, sequence_mask = checked.pop("entropy_mask"), checked.pop("sequence_mask")
    mean, policy_weights = checked.pop("rollout_mean_weight"), checked.pop("rollout_weights")
    if mean is not None:
        policy_weights = mean.reciprocal().expand(layout.sequences, 1)
    batch = Batch(log_probs, cu_seqlens=cu_seqlens, policy_weights=policy_weights, **checked)
    if values_are_free(batch.weights) and values_are_free(log_probs):
        _check_weights_fit(batch)
    if entropy_mask is sequence_mask is None:
        return batch
    return _with_masks(batch, entropy_mask, sequence_mask)


def unweighted_batch(log_probs: Tensor, **tensors: Tensor | None) -> Batch:
    """One whose sequences all weigh 1, of any real dtype: for what is known before the loss.

    ``tensors``: of :func:`make_batch`. Without advantages those are 1 too.
    """
    check_tensor("log_probs", log_probs, REAL_DTYPES)
    layout = layout_of(log_probs, tensors.get("mask"), tensors.get("cu_seqlens"))
    # Whatever the default dtype is.
    ones = torch.ones(layout.sequences, dtype=torch.float32, device=log_probs.device)
    return make_batch(
        log_probs, dtypes=REAL_DTYPES, **{"advantages": ones, "weights": ones, **tensors}
    )  # type: ignore


def _with_masks(batch: Batch, entropy_mask: Tensor | None, sequence_mask: Tensor | None) -> Batch:
    """The rollout weights, 0 where a mask drops the policy term; without them what is kept."""
    weights = batch.policy_weights
    for mask in (sequence_mask, entropy_mask):
        if mask is None:
            continue
        kept = mask if mask.dtype == torch.bool else mask != 0
        if weights is None:
            weights = kept
            continue
        if batch.is_per_token(weights) != batch.is_per_token(kept):
            weights, kept = batch.per_token(weights), batch.per_token(kept)
        weights = weights & kept if weights.dtype == torch.bool else torch.where(kept, weights, 0)
    return batch._replace(policy_weights=weights)


def _check_rollout(tensors: dict[str, Tensor | None]) -> None:
    if tensors.get("rollout_log_probs") is None:
        if tensors.get("rollout_mean_weight") is not None:
            raise ValueError(
                "rollout_mean_weight divides the weights that are made of rollout_log_probs, and "
                "there are none: pass them, or divide rollout_weights yourself"
            )
    elif tensors.get("rollout_weights") is not None:
        raise ValueError(
            "rollout_weights are the finished weights that rollout_log_probs would be made into: "
            "pass one of them"
        )


def _check_weights_fit(batch: Batch) -> None:
    """What weights alone tell of a mistake; the tokens are counted only if they do."""
    if batch.sequences == 0:
        return
    least, largest = (value.item() for value in batch.weights.aminmax())
    if largest > 1:
        lengths = batch.sequence_sums(batch.counted())
        if torch.equal(lengths, batch.weights.to(lengths.dtype)):
            raise ValueError(
                "weights are the lengths themselves: pass sequence_weights(lengths, ...)"
            )
    if least == 0:
        dropped = (batch.weights == 0) & (batch.sequence_sums(batch.counted()) > 0)
        if bool(dropped.any()):
            warnings.warn(
                f"sequences {dropped.nonzero()[:, 0].tolist()[:8]} have tokens that count but "
                "weight 0, so they have no part in the loss. Were the weights computed from the "
                "lengths of another mask? To drop sequences on purpose, pass a mask that is 0 "
                "there",
                stacklevel=4,
            )
