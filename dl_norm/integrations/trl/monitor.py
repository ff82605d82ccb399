"""A TRL callback that logs how gradient variance grows with length, and the alpha it suggests.

    trainer = DeltaLGRPOTrainer(..., callbacks=[VarianceMonitorCallback()])

``DeltaLGRPOTrainer`` shows its log-probs to every callback that has ``on_policy_loss``; the metrics
appear among TRL's own, wherever those are logged. What is estimated, how, and what the estimate
leaves out: :mod:`dl_norm.monitor`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from dl_norm.monitor import VarianceMonitor

__all__ = ["VarianceMonitorCallback"]


class VarianceMonitorCallback(TrainerCallback):
    """Logs ``variance/beta``, ``beta_low``, ``beta_high``, ``suggested_alpha`` and
    ``variance/cv_<method>`` (:meth:`dl_norm.monitor.VarianceMonitor.summary`).

    A batch is what one optimizer step adds up on all processes; a second pass over the same
    rollouts (``num_iterations`` > 1) counts again, under the policy of that time. The terms of the
    proxy are taken at ratio 1. Nothing leaves the device between two logs.

    Args:
        window, confidence: as for :class:`dl_norm.monitor.VarianceMonitor`; ``window`` counts the
            sequences of one process.

    Raises:
        RuntimeError: at the first log, if the trainer is not a ``DeltaLGRPOTrainer``.
    """

    def __init__(self, *, window: int = 4096, confidence: float = 0.95):
        self._settings = {"window": window, "confidence": confidence}
        self._monitor = VarianceMonitor(**self._settings)  # checks the settings
        self._trainer: Any = None

    def on_policy_loss(
        self, trainer: Any, log_probs: Tensor, mask: Tensor, inputs: dict[str, Any]
    ) -> None:
        """Called by the trainer for each micro-batch that it trains on: (B, T) log-probs without
        gradient, mask of the tokens that count, and TRL's batch."""
        if self._trainer is not trainer:
            self._trainer = trainer
            self._monitor = VarianceMonitor(alpha=trainer.args.alpha, **self._settings)
        groups = prompt_ids(inputs["prompt_ids"], inputs["prompt_mask"])
        self._monitor.update(log_probs, mask, groups=groups)

    def on_step_end(self, args, state, control, **kwargs):
        """Close the batch; where TRL is about to log, add the summary to what it logs."""
        if self._trainer is None:
            raise RuntimeError(
                "VarianceMonitorCallback saw no log-probs: use it with DeltaLGRPOTrainer of "
                "dl_norm.integrations.trl, or VarianceMonitor in a trainer of your own"
            )
        self._monitor.end_batch()
        self._log(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Where TRL logs by epochs."""
        self._log(control)

    def _log(self, control) -> None:
        if not control.should_log:
            return
        accelerator = self._trainer.accelerator
        several = accelerator.num_processes > 1
        summary = self._monitor.summary(accelerator.gather if several else None)
        for name, value in summary.items():
            self._trainer._metrics["train"][f"variance/{name}"].append(value)


def prompt_ids(tokens: Tensor, mask: Tensor) -> Tensor:
    """(B,) int64 >= 0, equal for equal prompts whatever their left padding: a hash of the tokens.

    TRL's batch no longer says which sequences share a prompt, and the interval has to know.
    """
    from_end = torch.arange(tokens.shape[1], 0, -1, device=tokens.device)
    mixed = tokens * 0x9E3779B1 + from_end * 0x85EBCA77
    mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D
    mixed = (mixed ^ (mixed >> 12)) * 0x297A2D39
    return (mixed * (mask != 0)).sum(1) & 0x7FFFFFFFFFFFFFFF
