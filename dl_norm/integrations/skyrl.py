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

SkyRL's ``off_policy_correction`` is computed in the kernel; only what
:func:`dl_norm.integrations.rollout.skyrl` cannot say, a token mask beside a weight or a mask of
sequences, by SkyRL's own function. SkyRL's KL and entropy terms stay as they are.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .._rollout import RolloutCorrection
from . import rollout as settings_of
from ._shared import adapter_loss, checked, clip_fraction, needed, on_host, required, row_factors

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
        config: SkyRL's ``AlgorithmConfig``: ``eps_clip_low``, ``eps_clip_high``,
            ``off_policy_correction``, and ``clip_ratio_c`` if ``policy_loss_type`` is
            "delta_l_dual_clip".
        **options: those given to :func:`register`. A ``rollout_correction`` is one beyond SkyRL's
            settings, which must then be off.

    Returns:
        (loss, metrics): "clip_ratio", and with a correction in the kernel those of
        :class:`dl_norm._metrics.RolloutMetrics`. SkyRL takes metrics as Python floats, which is one
        host sync.

    Raises:
        ValueError: ``loss_reduction`` is not "seq_mean_token_sum_norm"; a ``rollout_correction``
            beside one of SkyRL's; a correction without ``rollout_logprobs``.
    """
    _check_reduction(config)
    ours, theirs = _correction(config, options.pop("rollout_correction", None))
    metrics: dict[str, float] = {}
    if ours is not None or theirs:
        remedy = "the correction needs them: let the inference engine return log-probs"
        required(rollout_logprobs, "rollout_logprobs", remedy)
    if ours is not None:
        options |= {"rollout_correction": ours, "rollout_log_probs": rollout_logprobs}
    elif theirs:
        correction = needed(f"{_UTILS}.off_policy_correction_utils", _NEEDS)
        weights, metrics, loss_mask = correction.compute_off_policy_correction(
            old_log_probs, rollout_logprobs, loss_mask, config.off_policy_correction
        )
        if weights is not None and weights.shape[-1] == 1:
            weights = weights.squeeze(-1)  # one per sequence
        options["rollout_weights"] = weights
    dual = config.policy_loss_type == "delta_l_dual_clip"
    clip = {
        "eps_low": config.eps_clip_low,
        "eps_high": config.eps_clip_high,
        "dual_clip": config.clip_ratio_c if dual else None,
    }
    loss, seen = adapter_loss(log_probs, old_log_probs, advantages, loss_mask, clip=clip, **options)
    shown = {"clip_ratio": clip_fraction(seen)}
    if seen.rollout is not None:
        shown |= seen.rollout.summary(seen.tokens.clamp(min=1))
    return loss, {**on_host(shown), **metrics}


def _correction(config: Any, given: Any) -> tuple[RolloutCorrection | None, bool]:
    """The correction in the kernel, and whether SkyRL's own function has to correct."""
    theirs = getattr(config, "off_policy_correction", None)
    try:
        ours = settings_of.skyrl({} if theirs is None else theirs)
    except ValueError:  # no counterpart
        ours = None
    if ours == RolloutCorrection("none"):  # all of it is off
        return given, False
    if given is not None:
        raise ValueError(
            "rollout_correction beside SkyRL's off_policy_correction would correct twice: turn one "
            "of them off"
        )
    return ours, ours is None


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
            ``rollout_correction``, for one beyond SkyRL's ``off_policy_correction``, which is
            followed without it.
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
