r"""DeltaL Normalization in SkyRL, by its policy loss registry.

The hook is ``register_policy_loss``: ``f(log_probs, old_log_probs, advantages, config,
loss_mask=None, rollout_logprobs=None)`` returning ``(loss, metrics)``. What a user writes:
README.md of this folder, and `skyrl.md` at length.

**Where the weights come from.** They ride on the advantages. SkyRL scales the advantages of each
mini-batch by 1/(B' M), B' its rows, and the loss is a plain sum, multiplied by dp_size against the
averaging of gradients. :class:`DeltaLAdvantages` multiplies them before, where the whole training
batch of B rows is in one place, by f_i = (B' S) L_i^-alpha / sum_j L_j^-alpha with S the number of
mini-batches and L_i from ``loss_mask`` (tool tokens and SkyRL's padding rows do not count): a
step's gradient is S times the mini-batch's part of sum_i x_i grad sum_t l_it, their mean is the
whole.

SkyRL's KL and entropy terms stay as they are, and so does its off-policy correction unless a
``rollout_correction`` takes its place.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .shared import adapter_loss, checked, clip_fraction, needed, on_host, required, row_factors

REDUCTION = "seq_mean_token_sum_norm"
_UTILS, _NEEDS = "skyrl.backends.skyrl_train.utils", "SkyRL 0.4 (pip install 'skyrl>=0.4,<0.5')"


def delta_l_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, float]]:
    """SkyRL's clipped loss as a plain masked sum, by :func:`dl_norm.policy_loss`.

    Args:
        log_probs, old_log_probs, advantages, loss_mask, rollout_logprobs: (B, T).
        config: SkyRL's ``AlgorithmConfig``: ``eps_clip_low``, ``eps_clip_high``, and
            ``clip_ratio_c`` if ``policy_loss_type`` is "delta_l_dual_clip".
        **options: those given to :func:`register`. With ``rollout_correction`` it is ours, in the
            kernel, in the place of SkyRL's.

    Returns:
        (loss, {"clip_ratio": ...}): SkyRL takes metrics as Python floats, which is one host sync.

    Raises:
        ValueError: ``loss_reduction`` is not "seq_mean_token_sum_norm"; a ``rollout_correction``
            beside one of SkyRL's, or without ``rollout_logprobs``.
    """
    _check_reduction(config)
    rollout_weights, metrics = None, {}
    if options.get("rollout_correction") is not None:
        options["rollout_log_probs"] = _sampled(rollout_logprobs, config)
    elif rollout_logprobs is not None:
        correction = needed(f"{_UTILS}.off_policy_correction_utils", _NEEDS)
        rollout_weights, metrics, loss_mask = correction.compute_off_policy_correction(
            old_log_probs, rollout_logprobs, loss_mask, config.off_policy_correction
        )
        if rollout_weights is not None and rollout_weights.shape[-1] == 1:
            rollout_weights = rollout_weights.squeeze(-1)  # one per sequence
    dual = config.policy_loss_type == "delta_l_dual_clip"
    loss, seen = adapter_loss(
        log_probs,
        old_log_probs,
        advantages,
        loss_mask,
        rollout_weights=rollout_weights,
        clip={
            "eps_low": config.eps_clip_low,
            "eps_high": config.eps_clip_high,
            "dual_clip": config.clip_ratio_c if dual else None,
        },
        **options,
    )
    shown = {"clip_ratio": clip_fraction(seen)}
    if seen.rollout is not None:
        shown |= seen.rollout.summary(seen.tokens.clamp(min=1))
    return loss, {**on_host(shown), **metrics}


def _sampled(rollout_logprobs: Tensor | None, config: Any) -> Tensor:
    """The rollout's log-probs for a correction of ours."""
    theirs = config.off_policy_correction
    correction = needed(f"{_UTILS}.off_policy_correction_utils", _NEEDS)
    if correction.off_policy_correction_enabled(theirs):
        raise ValueError(
            "rollout_correction beside SkyRL's off_policy_correction would correct twice: turn one "
            "of them off; dl_norm.integrations.rollout.skyrl(config) is SkyRL's as ours"
        )
    remedy = "rollout_correction needs them: let the inference engine return log-probs"
    return required(rollout_logprobs, "rollout_logprobs", remedy)


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


def register(**options: Any) -> None:
    """Register ``delta_l`` and ``delta_l_dual_clip`` as values of ``policy_loss_type``.

    Args:
        **options: of :func:`dl_norm.policy_loss`, over SkyRL's clip settings; also
            ``rollout_correction``, of SkyRL's settings :func:`dl_norm.integrations.rollout.skyrl`.
    """
    registry = needed(f"{_UTILS}.ppo_utils", _NEEDS).PolicyLossRegistry
    loss = functools.partial(delta_l_policy_loss, **checked(options, rollout=True))
    for name in ("delta_l", "delta_l_dual_clip"):
        registry.register(name, loss)


def _check_reduction(config: Any) -> None:
    if config.loss_reduction != REDUCTION:
        raise ValueError(
            f"loss_reduction={config.loss_reduction!r} divides by what it counts itself; DeltaL "
            f"needs a constant: set trainer.algorithm.loss_reduction={REDUCTION} and max_seq_len"
        )
