"""The loss as a module, for trainers that build theirs from a configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .functional import delta_l_loss
from .metrics import PolicyLossMetrics
from .options import PolicyLossOptions
from .weights.group_sums import Group


class DeltaLLoss(torch.nn.Module):
    """:func:`dl_norm.delta_l_loss` with its settings fixed at construction.

    Args:
        alpha, max_length, group: as for :func:`dl_norm.sequence_weights`.
        eps_low, eps_high, dual_clip, delta, log_ratio_clamp, beta, ratio_level, surrogate,
        sapo_temperature_pos, sapo_temperature_neg, bias_corrected_kl, impl, return_metrics: as for
            :func:`dl_norm.policy_loss`.
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        max_length: int,
        group: Group = None,
        eps_low: float = 0.2,
        eps_high: float = 0.2,
        dual_clip: float | None = None,
        delta: float | None = None,
        log_ratio_clamp: float | None = 20.0,
        beta: float = 0.0,
        ratio_level: str = "token",
        surrogate: str = "clip",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        bias_corrected_kl: bool = False,
        impl: str | None = None,
        return_metrics: bool = False,
    ):
        super().__init__()
        options = PolicyLossOptions(
            eps_low, eps_high, dual_clip, delta, log_ratio_clamp, beta, ratio_level, surrogate,
            sapo_temperature_pos, sapo_temperature_neg, bias_corrected_kl,
        )  # fmt: skip
        self.settings: dict[str, Any] = dict(
            alpha=alpha, max_length=max_length, group=group, **vars(options), impl=impl,
            return_metrics=return_metrics,
        )  # fmt: skip

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor | None,
        advantages: Tensor,
        mask: Tensor | None,
        *,
        cu_seqlens: Tensor | None = None,
        ref_log_probs: Tensor | None = None,
        rollout_weights: Tensor | None = None,
        entropy_mask: Tensor | None = None,
        sequence_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, PolicyLossMetrics]:
        return delta_l_loss(
            log_probs, old_log_probs, advantages, mask, cu_seqlens=cu_seqlens,
            ref_log_probs=ref_log_probs, rollout_weights=rollout_weights,
            entropy_mask=entropy_mask, sequence_mask=sequence_mask, **self.settings,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())
