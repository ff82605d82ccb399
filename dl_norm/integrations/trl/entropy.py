"""TRL's entropy bonus: a mean over the tokens that it acts on, and the controller of its
coefficient (Skywork-OR1, arXiv:2505.22312).

The state is TRL's own (``entropy_coef``, ``_last_world_entropy``), which it saves and restores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def applied_coef(trainer: Any) -> float:
    """The coefficient of this micro-batch: 0 while the last step's entropy was above its target."""
    if not trainer._entropy_bonus_enabled:
        return 0.0
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        return 0.0
    return trainer.entropy_coef


def acts_on(mask: Tensor, entropy_mask: Tensor | None) -> Tensor:
    """(B, T): the tokens of the policy term."""
    return mask if entropy_mask is None else mask * entropy_mask


def bonus_options(coef: float, active: Tensor) -> dict[str, Any]:
    """The bonus as options of ``linear_policy_loss``; TRL's coefficient may be negative."""
    weights = active / active.sum().clamp(min=1.0)
    return {
        "entropy_coef": abs(coef),
        "entropy_weights": (weights if coef >= 0 else -weights).to(torch.float32),
    }


def adapt(trainer: Any, entropies: Tensor, active: Tensor) -> None:
    """A step of the controller, at the end of an accumulation window. It waits for the device, as
    in TRL: the next step's coefficient is a number on the host."""
    stats = torch.stack([(entropies * active).sum(), active.sum()]).detach()
    if trainer._entropy_window_stats is not None:
        stats = stats + trainer._entropy_window_stats
    trainer._entropy_window_stats = stats
    if not trainer.accelerator.sync_gradients:
        return
    total, count = trainer.accelerator.reduce(stats, reduction="sum")
    entropy = (total / count.clamp(min=1.0)).item()
    args = trainer.args
    if entropy <= args.entropy_target:
        coef = min(trainer.entropy_coef + args.entropy_coef_delta, args.entropy_coef_max)
    else:
        coef = max(trainer.entropy_coef - args.entropy_coef_delta, args.entropy_coef_min)
    trainer.entropy_coef = coef
    trainer._last_world_entropy = entropy
    trainer._entropy_window_stats = None
