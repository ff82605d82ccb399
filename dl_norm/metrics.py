"""Counts and sums that the loss kernel collects while it has every token in hand."""

from __future__ import annotations

from dataclasses import dataclass

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
      low for either sign of A, high for A > 0, dual for A < 0. With "sapo" all are 0.
    - ratio, kl_old_k1, kl_old_k3: sums of r, -log r and r - 1 - log r, after the log-ratio clamp.
    - kl_ref: sum of exp(d) - d - 1, d = ref_log_probs - log_probs (0 without a reference), times
      r with bias_corrected_kl.
    - ratio_max: the largest r; combined by maximum.

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

    @classmethod
    def from_sums(cls, sums: Tensor, weights: Tensor) -> PolicyLossMetrics:
        """From the (NUM_METRIC_SUMS,) sums of an implementation, in the order of the fields."""
        return cls(*sums.unbind(), sequences=(weights != 0).sum().float())

    def __add__(self, other: PolicyLossMetrics) -> PolicyLossMetrics:
        """The metrics of two slices of a batch together."""
        mine, theirs = vars(self), vars(other)
        total = {name: mine[name] + theirs[name] for name in mine}
        total["ratio_max"] = torch.maximum(self.ratio_max, other.ratio_max)
        return PolicyLossMetrics(**total)

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
        fields = dict(vars(self))
        ratio_max = fields.pop("ratio_max").clone()
        sums = torch.stack(list(fields.values()))
        dist.all_reduce(sums, group=group)
        dist.all_reduce(ratio_max, op=dist.ReduceOp.MAX, group=group)
        return PolicyLossMetrics(
            **dict(zip(fields, sums.unbind(), strict=True)), ratio_max=ratio_max
        )

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
        }
