"""Counts and sums that the loss kernel collects while it has every token in hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

# The fields of PolicyLossMetrics that an implementation computes: all but ``sequences``.
NUM_METRIC_SUMS = 9


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

    @classmethod
    def from_sums(
        cls, sums: Tensor, weights: Tensor, extra_names: tuple[str, ...] = ()
    ) -> PolicyLossMetrics:
        """From the sums of an implementation: the (NUM_METRIC_SUMS,) fields in their order, then
        the further quantities of the surrogate."""
        values = sums.unbind()
        extras = dict(zip(extra_names, values[NUM_METRIC_SUMS:], strict=True))
        sequences = (weights != 0).sum().float()
        return cls(*values[:NUM_METRIC_SUMS], sequences=sequences, extras=extras)

    def _flat(self) -> dict[str, Tensor]:
        """All sums and counts by name."""
        fields = {**vars(self), **self.extras}
        del fields["extras"], fields["ratio_max"]
        return fields

    def _rebuilt(self, flat: dict[str, Tensor], ratio_max: Tensor) -> PolicyLossMetrics:
        extras = {name: flat.pop(name) for name in self.extras}
        return PolicyLossMetrics(**flat, ratio_max=ratio_max, extras=extras)

    def __add__(self, other: PolicyLossMetrics) -> PolicyLossMetrics:
        """The metrics of two slices of a batch together."""
        if self.extras.keys() != other.extras.keys():
            raise ValueError(
                f"metrics of two surrogates, with {list(self.extras)} and {list(other.extras)}"
            )
        mine, theirs = self._flat(), other._flat()
        largest = torch.maximum(self.ratio_max, other.ratio_max)
        return self._rebuilt({name: mine[name] + theirs[name] for name in mine}, largest)

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
        flat, ratio_max = self._flat(), self.ratio_max.clone()
        sums = torch.stack(list(flat.values()))
        dist.all_reduce(sums, group=group)
        dist.all_reduce(ratio_max, op=dist.ReduceOp.MAX, group=group)
        return self._rebuilt(dict(zip(flat, sums.unbind(), strict=True)), ratio_max)

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
        }
