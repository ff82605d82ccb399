r"""DeltaL Normalization in SkyRL, by its policy loss registry.

Read and run: SkyRL 0.4.0. The hook is ``register_policy_loss``:
``f(log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None)`` returning
``(loss, metrics)``. What a user writes::

    from dl_norm.integrations import skyrl as delta_l

    delta_l.register()  # trainer.algorithm.policy_loss_type=delta_l

    class Trainer(delta_l.DeltaLAdvantages, RayPPOTrainer):
        alpha = 0.75

    class Experiment(BasePPOExp):
        def get_trainer(self, *args, **kwargs):
            return Trainer(*args, **kwargs)

with ``trainer.algorithm.loss_reduction=seq_mean_token_sum_norm`` and
``trainer.algorithm.max_seq_len=3072``, the constant M.

**Where the weights come from.** They ride on the advantages. SkyRL scales the advantages of each
mini-batch by 1/(B' M), B' its rows, and the loss is a plain sum, multiplied by dp_size against the
averaging of gradients. :class:`DeltaLAdvantages` multiplies them before, where the whole training
batch of B rows is in one place, by f_i = (B' S) L_i^-alpha / sum_j L_j^-alpha with S the number of
mini-batches and L_i from ``loss_mask`` (tool tokens and SkyRL's padding rows do not count): a
step's gradient is S times the mini-batch's part of sum_i x_i grad sum_t l_it, their mean is the
whole.

SkyRL's KL and entropy terms and its off-policy correction stay as they are.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .carried import carried_loss, clip_fraction, row_factors

REDUCTION = "seq_mean_token_sum_norm"


def delta_l_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """SkyRL's clipped loss as a plain masked sum, by :func:`dl_norm.policy_loss`.

    Args:
        log_probs, old_log_probs, advantages, loss_mask, rollout_logprobs: (B, T).
        config: SkyRL's ``AlgorithmConfig``: ``eps_clip_low``, ``eps_clip_high``, and
            ``clip_ratio_c`` if ``policy_loss_type`` is "delta_l_dual_clip".

    Returns:
        (loss, {"clip_ratio": ...}): SkyRL takes metrics as Python floats, which is one host sync.

    Raises:
        ValueError: ``loss_reduction`` is not "seq_mean_token_sum_norm".
    """
    _check_reduction(config)
    rollout_weights, metrics = None, {}
    if rollout_logprobs is not None:
        rollout_weights, metrics, loss_mask = _off_policy_correction(
            old_log_probs, rollout_logprobs, loss_mask, config.off_policy_correction
        )
        if rollout_weights is not None and rollout_weights.shape[-1] == 1:
            rollout_weights = rollout_weights.squeeze(-1)  # one per sequence
    dual = config.policy_loss_type == "delta_l_dual_clip"
    loss, seen = carried_loss(
        log_probs,
        old_log_probs,
        advantages,
        loss_mask,
        eps_low=config.eps_clip_low,
        eps_high=config.eps_clip_high,
        dual_clip=config.clip_ratio_c if dual else None,
        rollout_weights=rollout_weights,
    )
    return loss, {"clip_ratio": clip_fraction(seen).item(), **metrics}


class DeltaLAdvantages:
    """Mixin before SkyRL's ``RayPPOTrainer``: DeltaL weights on the advantages of a training batch.

    Raises ValueError for a ``loss_reduction`` other than "seq_mean_token_sum_norm" and for
    ``advantage_batch_normalize``, which would normalise the weights away.
    """

    alpha: float = 1.0
    cfg: Any

    @torch.no_grad()
    def _normalize_advantages(self, data, mini_batch_boundaries, prompt_boundaries=None):
        algorithm = self.cfg.trainer.algorithm
        _check_reduction(algorithm)
        if algorithm.advantage_batch_normalize:
            raise ValueError(
                "advantage_batch_normalize=True would normalise the DeltaL weights away: set "
                "trainer.algorithm.advantage_batch_normalize=false"
            )
        lengths = (data["loss_mask"] != 0).sum(-1)
        factors = row_factors(lengths, alpha=self.alpha)
        # B' S / B: 1 unless the mini-batches differ in size.
        steps = len(mini_batch_boundaries)
        for start, end in mini_batch_boundaries:
            factors[start:end] *= (end - start) * steps / len(factors)
        data["advantages"] = data["advantages"] * factors[:, None]
        return super()._normalize_advantages(  # pyright: ignore[reportAttributeAccessIssue]
            data, mini_batch_boundaries, prompt_boundaries
        )


def register() -> None:
    """Register ``delta_l`` and ``delta_l_dual_clip`` as values of ``policy_loss_type``."""
    try:
        from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
    except ImportError as error:
        raise ImportError("register() needs SkyRL 0.4: pip install 'skyrl>=0.4,<0.5'") from error
    for name in ("delta_l", "delta_l_dual_clip"):
        PolicyLossRegistry.register(name, delta_l_policy_loss)


def _check_reduction(config: Any) -> None:
    if config.loss_reduction != REDUCTION:
        raise ValueError(
            f"loss_reduction={config.loss_reduction!r} divides by what it counts itself; DeltaL "
            f"needs a constant: set trainer.algorithm.loss_reduction={REDUCTION} and max_seq_len"
        )


def _off_policy_correction(old_log_probs, rollout_logprobs, loss_mask, config):
    try:
        from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import (
            compute_off_policy_correction,
        )
    except ImportError as error:
        raise ImportError("rollout_logprobs need SkyRL 0.4's off-policy correction") from error
    return compute_off_policy_correction(old_log_probs, rollout_logprobs, loss_mask, config)
