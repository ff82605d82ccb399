"""Counts and sums that the loss kernel collects while it has every token in hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

# The fields of PolicyLossMetrics that an implementation computes: all but ``sequences``.
NUM_METRIC_SUMS = 9
NUM_ROLLOUT_SUMS = 9  # those of RolloutMetrics


@dataclass(frozen=True)
class RolloutMetrics:
    """What a :class:`dl_norm.RolloutCorrection` did, over the counted tokens, as 0-dim float32
    tensors. With d = old_log_probs - rollout_log_probs, 0 where the token is not scored:

    - weight, weight_squares: sums of w and w^2, after mode, rejection and veto, before
      ``rollout_mean_weight`` divides them.
    - truncated, masked, vetoed: tokens whose weight (or their sequence's) was clamped; is 0 by
      mode="mask" or a rejection; is 0 by a veto. A token may be in several.
    - unscored: tokens whose d is not known.
    - k1, k3: sums of -d and of exp(d) - 1 - d, estimates of KL(rollout || old); d clamped to +-20.
    - weight_max: the largest w; combined by maximum.
    """

    weight: Tensor
    weight_squares: Tensor
    truncated: Tensor
    masked: Tensor
    vetoed: Tensor
    unscored: Tensor
    k1: Tensor
    k3: Tensor
    weight_max: Tensor

    def summary(self, tokens: Tensor) -> dict[str, Tensor]:
        """Means over ``tokens``, those of k1 and k3 over the scored ones; ``rollout_ess`` is the
        effective sample size (sum w)^2 / sum w^2 as a share of them."""
        scored = (tokens - self.unscored).clamp(min=1)
        squares = torch.where(self.weight_squares > 0, self.weight_squares, 1.0)
        return {
            "rollout_weight_mean": self.weight / tokens,
            "rollout_weight_max": self.weight_max,
            "rollout_truncated": self.truncated / tokens,
            "rollout_masked": self.masked / tokens,
            "rollout_vetoed": self.vetoed / tokens,
            "rollout_unscored": self.unscored / tokens,
            "rollout_ess": self.weight.square() / squares / tokens,
            "rollout_k1": self.k1 / scored,
            "rollout_k3": self.k3 / scored,
        }


@dataclass(frozen=True)
class PolicyLossMetrics:
    """What :func:`dl_norm.policy_loss` saw, as sums that add up over micro-batches and ranks.

    Every field is a 0-dim float32 tensor on the device of the loss; reading none of them is
    forced on the host. Counts are exact up to 2^24 tokens.

    - tokens, sequences: positions with mask != 0; sequences with a non-zero weight.
    - clipped_low: A < 0 and r below 1 - eps_low. clipped_high: A > 0 and r above the upper
      bound. clipped_dual: A < 0 and r above dual_clip (or delta). All without gradient.
      With surrogate="cispo" every clipped ratio is counted in one of them, and has a gradient:
      low for either sign of A, high for A > 0, dual for A < 0. With "sapo" all are 0; with
      "dppo_tv", "dppo_kl" and "ipo" they are the tokens that are dropped, with "gmpo" those whose
      log-ratio counts as a bound.
    - ratio, kl_old_k1, kl_old_k3: sums of r, -log r and r - 1 - log r, after the log-ratio clamp.
    - kl_ref: sum of the KL estimate, exp(d) - d - 1 with d = ref_log_probs - log_probs unless
      ``kl`` says otherwise (0 without a reference), times r with bias_corrected_kl.
    - ratio_max: the largest r; combined by maximum.
    - extras: sums of the further quantities that the surrogate returns, by name.
    - rollout: :class:`RolloutMetrics`, or None without ``rollout_log_probs``.

    r is the token's ratio as the loss uses it: that of its sequence if ``ratio_level`` says so, so
    counts and sums are of tokens at either level. An entropy mask or sequence mask drops terms of
    the loss and changes no metric.
    """

    tokens: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor
    ratio: Tensor
    kl_old_k1: Tensor
    kl_old_k3: Tensor
    kl_ref: Tensor
    ratio_max: Tensor
    sequences: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    rollout: RolloutMetrics | None = None

    @classmethod
    def from_sums(
        cls,
        sums: Tensor,
        weights: Tensor,
        extra_names: tuple[str, ...] = (),
        with_rollout: bool = False,
    ) -> PolicyLossMetrics:
        """From the sums of an implementation: the (NUM_METRIC_SUMS,) fields in their order, then
        the further quantities of the surrogate, then the fields of RolloutMetrics."""
        values = sums.unbind()
        rollout = None
        if with_rollout:
            rollout = RolloutMetrics(*values[-NUM_ROLLOUT_SUMS:])
            values = values[:-NUM_ROLLOUT_SUMS]
        extras = dict(zip(extra_names, values[NUM_METRIC_SUMS:], strict=True))
        sequences = (weights != 0).sum().float()
        fields = values[:NUM_METRIC_SUMS]
        return cls(*fields, sequences=sequences, extras=extras, rollout=rollout)

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All sums and counts by name, and all maxima."""
        sums = {**vars(self), **self.extras}
        del sums["extras"], sums["rollout"]
        maxima = {"ratio_max": sums.pop("ratio_max")}
        if self.rollout is not None:
            sums |= {f"rollout.{name}": value for name, value in vars(self.rollout).items()}
            maxima["rollout.weight_max"] = sums.pop("rollout.weight_max")
        return sums, maxima

    def _rebuilt(self, sums: dict[str, Tensor], maxima: dict[str, Tensor]) -> PolicyLossMetrics:
        values = sums | maxima
        rollout = None
        if self.rollout is not None:
            names = vars(self.rollout)
            rollout = RolloutMetrics(**{name: values.pop(f"rollout.{name}") for name in names})
        extras = {name: values.pop(name) for name in self.extras}
        return PolicyLossMetrics(**values, extras=extras, rollout=rollout)

    def __add__(self, other: PolicyLossMetrics) -> PolicyLossMetrics:
        """The metrics of two slices of a batch together."""
        if self.extras.keys() != other.extras.keys():
            raise ValueError(
                f"metrics of two surrogates, with {list(self.extras)} and {list(other.extras)}"
            )
        if (self.rollout is None) != (other.rollout is None):
            raise ValueError("metrics with and without those of a rollout correction do not add up")
        (mine, highest), (theirs, high) = self._parts(), other._parts()
        return self._rebuilt(
            {name: mine[name] + theirs[name] for name in mine},
            {name: torch.maximum(highest[name], high[name]) for name in highest},
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> PolicyLossMetrics:
        """The metrics of all ranks of ``group`` together (None: the default group).

        Raises:
            ValueError: this process is not in ``group`` (torch would warn and leave its sums as
                they are).
        """
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "this process is not in the group: its sums would be left out; pass a group that "
                "it is a member of"
            )
        reduced = []
        for part, op in zip(self._parts(), (dist.ReduceOp.SUM, dist.ReduceOp.MAX), strict=True):
            values = torch.stack(list(part.values()))
            dist.all_reduce(values, op=op, group=group)
            reduced.append(dict(zip(part, values.unbind(), strict=True)))
        return self._rebuilt(*reduced)

    def summary(self) -> dict[str, Tensor]:
        """Means over tokens and the counts, as 0-dim tensors; 0 where there is no token."""
        tokens = self.tokens.clamp(min=1)
        return {
            "clip_fraction_low": self.clipped_low / tokens,
            "clip_fraction_high": self.clipped_high / tokens,
            "clip_fraction_dual": self.clipped_dual / tokens,
            "ratio_mean": self.ratio / tokens,
            "ratio_max": self.ratio_max,
            "kl_old_k1": self.kl_old_k1 / tokens,
            "kl_old_k3": self.kl_old_k3 / tokens,
            "kl_ref": self.kl_ref / tokens,
            "tokens": self.tokens,
            "sequences": self.sequences,
            **{name: value / tokens for name, value in self.extras.items()},
            **({} if self.rollout is None else self.rollout.summary(tokens)),
        }
