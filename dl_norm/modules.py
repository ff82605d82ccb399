"""The loss as a module, for trainers that build theirs from a configuration."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .functional import delta_l_loss
from .metrics import PolicyLossMetrics
from .options import PolicyLossOptions


class DeltaLLoss(torch.nn.Module):
    """:func:`dl_norm.delta_l_loss` with its settings fixed at construction.

    Args:
        alpha, max_length, group: as for :func:`dl_norm.sequence_weights`.
        eps_low, eps_high, dual_clip, delta, log_ratio_clamp, beta, impl, return_metrics: as for
            :func:`dl_norm.policy_loss`.
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        max_length: int,
        group: dist.ProcessGroup | None = None,
        eps_low: float = 0.2,
        eps_high: float = 0.2,
        dual_clip: float | None = None,
        delta: float | None = None,
        log_ratio_clamp: float | None = 20.0,
        beta: float = 0.0,
        impl: str | None = None,
        return_metrics: bool = False,
    ):
        super().__init__()
        PolicyLossOptions(eps_low, eps_high, dual_clip, delta, log_ratio_clamp, beta)
        self.settings: dict[str, Any] = dict(
            alpha=alpha, max_length=max_length, group=group, eps_low=eps_low, eps_high=eps_high,
            dual_clip=dual_clip, delta=delta, log_ratio_clamp=log_ratio_clamp, beta=beta,
            impl=impl, return_metrics=return_metrics,
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
    ) -> Tensor | tuple[Tensor, PolicyLossMetrics]:
        return delta_l_loss(
            log_probs, old_log_probs, advantages, mask, cu_seqlens=cu_seqlens,
            ref_log_probs=ref_log_probs, rollout_weights=rollout_weights, **self.settings,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())
