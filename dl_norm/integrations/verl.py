r"""DeltaL Normalization in verl, by its own registries: installing the package is enough.

verl imports this module itself (entry point group ``verl.plugins``), in the driver and in every
worker. It registers

- the advantage estimators ``delta_l_grpo`` and ``delta_l_rloo``: verl's ``grpo`` (with the std or
  without, as ``norm_adv_by_std_in_grpo`` says) and ``rloo``, times the DeltaL weights of the whole
  rollout;
- the policy loss ``delta_l``: verl's clipped loss, computed by :func:`dl_norm.policy_loss`.

What a user writes:

    algorithm.adv_estimator=delta_l_grpo
    +algorithm.delta_l_alpha=0.75
    actor_rollout_ref.actor.policy_loss.loss_mode=delta_l
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm
    actor_rollout_ref.actor.loss_scale_factor=3072

``delta_l_alpha`` is alpha (1 if left out), ``loss_scale_factor`` the constant M.

**The algebra.** The estimator sees the whole rollout batch of B rows, before verl cuts it. With L_i
the tokens of row i that count, it multiplies the row's advantage by

    r_i = B L_i^-alpha / sum_j L_j^-alpha        (0 if L_i = 0; sums over all B rows),

which may move from the loss into the advantage because every clip is positively homogeneous in A.
verl cuts the rows into N mini-batches of G = ``global_batch_size`` = B / N rows, these over
P = ``dp_size`` ranks and into micro-batches, adds the micro-batches' gradients up and averages them
over the ranks. A micro-batch's loss is

    P / (G M) * sum_{i in micro-batch} r_i sum_t l_it,

so a mini-batch's gradient is 1/(G M) sum_{i in mini-batch} r_i grad sum_t l_it, whatever P and the
number of micro-batches are. As r_i / (G M) = N x_i, with x_i = (1/M) L_i^-alpha / sum_j L_j^-alpha
the DeltaL weight in the whole rollout, the mean over the N mini-batches is exactly
sum_i x_i grad sum_t l_it. With N = 1 it is the single step on the whole batch; with N > 1 each step
is its part, times N, and the normaliser stays the rollout's: a mini-batch of long responses is not
scaled up. Empty rows (rejected ones, verl's padding rows) count in B and in G alike, so they
cancel.

So the loss must be a plain sum of a row's tokens over a constant: ``loss_agg_mode`` is
``seq-mean-token-sum-norm`` (M = ``loss_scale_factor``) or ``seq-mean-token-sum`` (M = 1). Any other
raises, in the estimator already if it is given verl's whole configuration. verl's ``vanilla`` loss
on these advantages gives the same numbers in many small operations; ``delta_l`` is one kernel.

**Rollout correction.** verl's driver corrects before the advantages are made, by
``algorithm.rollout_correction``, and the loss takes its finished weights. Written into the actor's
section in its place, as ``actor.policy_loss.rollout_correction``, it is computed in the kernel: see
:func:`ppo_loss` and :func:`compute_policy_loss_delta_l`.

Not re-weighted: verl's KL loss and entropy bonus, which verl aggregates itself, with 1/(G M). Every
row is a response of its own: where an agent gives several outputs per session, verl's ``grpo``
takes the last one for all of them, and these estimators do not.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import Tensor

import dl_norm
from dl_norm._checks import check_number

from . import rollout as settings_of
from . import verl_rollout as rollout
from ._shared import adapter_loss, checked

_TESTED, _OLDEST, _UNTESTED = "0.9.1", "0.9", "0.10"
_logger = logging.getLogger(__name__)

# verl swallows what a plugin raises and logs it at DEBUG, so it is said here.
try:
    from omegaconf import OmegaConf  # pyright: ignore[reportMissingImports]
    from omegaconf.errors import ConfigKeyError  # pyright: ignore[reportMissingImports]
    from packaging.version import Version
    from verl import __version__ as _found  # pyright: ignore[reportAttributeAccessIssue]

    if Version(_found) < Version(_OLDEST):
        raise ImportError(f"it needs verl >= {_OLDEST}, but verl {_found} is installed")
    from verl.trainer.ppo.core_algos import (  # pyright: ignore[reportMissingImports]
        compute_grpo_outcome_advantage,
        compute_rloo_outcome_advantage,
        register_adv_est,
        register_policy_loss,
    )
    from verl.workers.utils import losses as _losses  # pyright: ignore[reportMissingImports]
except Exception as error:
    _logger.error(
        "dl_norm is not available in verl: its plugin failed with %s: %s. Nothing named delta_l is "
        "registered; it is tested with verl %s.",
        type(error).__name__,
        error,
        _TESTED,
    )
    raise
if Version(_found) >= Version(_UNTESTED):
    _logger.warning("dl_norm's plugin is tested with verl %s, this is verl %s", _TESTED, _found)

__all__ = [
    "compute_delta_l_grpo_advantage",
    "compute_delta_l_rloo_advantage",
    "compute_policy_loss_delta_l",
    "delta_l_factors",
    "ppo_loss",
    "register",
]

_PREFIX, _ALPHA = "delta_l", "delta_l_alpha"
_LOG_RATIO_CLAMP = 20.0  # verl's, in compute_policy_loss_vanilla
_ours = {"delta_l"}  # values of loss_mode


@register_adv_est("delta_l_grpo")
def compute_delta_l_grpo_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """verl's GRPO advantages times :func:`delta_l_factors`; the estimator ``delta_l_grpo``.

    Args:
        token_level_rewards, response_mask: (B, T), the whole rollout batch.
        index: (B,) prompt ids, verl's ``uid``.
        epsilon: verl's, added to the std.
        config: verl's ``algorithm`` section: ``delta_l_alpha`` (default 1) and
            ``norm_adv_by_std_in_grpo`` (default True). None: both defaults.
        **kwargs: what verl passes to some estimators besides; GRPO does not use it.

    Returns:
        (B, T) advantages with the DeltaL factors, and verl's (B, T) returns without them.

    Raises:
        ValueError: from :func:`delta_l_factors`.
    """
    advantages, returns = compute_grpo_outcome_advantage(
        token_level_rewards=token_level_rewards,
        response_mask=response_mask,
        index=index,
        epsilon=epsilon,
        norm_adv_by_std_in_grpo=(config or {}).get("norm_adv_by_std_in_grpo", True),
    )
    return advantages * delta_l_factors(response_mask, config)[:, None], returns


@register_adv_est("delta_l_rloo")
def compute_delta_l_rloo_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """verl's RLOO advantages times :func:`delta_l_factors`; the estimator ``delta_l_rloo``.

    Arguments and results as for :func:`compute_delta_l_grpo_advantage`.
    """
    advantages, returns = compute_rloo_outcome_advantage(
        token_level_rewards=token_level_rewards, response_mask=response_mask, index=index
    )
    return advantages * delta_l_factors(response_mask, config)[:, None], returns


def delta_l_factors(response_mask: Tensor, config: Any = None) -> Tensor:
    r"""Factors r_i = B L_i^-alpha / sum_j L_j^-alpha of a rollout batch of B rows.

    To put DeltaL weights on the advantages of an estimator of your own.

    Args:
        response_mask: (B, T), the **whole** rollout batch, before any cut; L_i = its row sums.
        config: verl's ``algorithm`` section; alpha is its ``delta_l_alpha``, 1 if absent.

    Returns:
        (B,) float32, of mean 1; 0 for an empty row.

    Raises:
        ValueError, TypeError: alpha out of range or no number; another ``delta_l*`` key in the
            section; an actor (if the section is part of verl's whole configuration) whose
            ``loss_agg_mode``, ``loss_scale_factor`` or ``rollout_correction`` does not fit.
    """
    config = {} if config is None else config
    unknown = [key for key in config if key.startswith(_PREFIX) and key != _ALPHA]
    if unknown:
        raise ValueError(f"unknown option algorithm.{unknown[0]}; there is algorithm.{_ALPHA}")
    _check_actor(config)
    lengths = (response_mask != 0).sum(-1)
    weights = dl_norm.sequence_weights(
        lengths, alpha=config.get(_ALPHA, 1.0), max_length=1, group="local"
    )
    return lengths.shape[0] * weights


@register_policy_loss("delta_l")
def compute_policy_loss_delta_l(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Any]]:
    r"""verl's clipped policy loss of a micro-batch, by :func:`dl_norm.policy_loss`.

    .. math:
        \frac{P}{G M} \sum_i \sum_t m_{it} w_{it} \ell_{it}

    with P = ``dp_size``, G = ``global_batch_size``, M = ``loss_scale_factor`` and the token loss l
    of verl's ``vanilla`` loss: asymmetric clip, dual clip, log-ratio clamped to +-20. The DeltaL
    weights are in the advantages; see the module.

    With ``config.policy_loss.rollout_correction``, verl's own section of that name, the weights w
    and rejections are computed here: in the kernel, of the rollout's log-probs, which
    :func:`ppo_loss` brings; in bypass mode, where ``old_log_prob`` are these, as verl's
    ``bypass_mode`` loss does, of the current policy: with loss_type "reinforce" in the kernel,
    with the token loss -A log pi; with "ppo_clip" the rejections alone, in a few operations before
    it. A rejected token keeps its place in the lengths L_i.

    Args:
        old_log_prob, log_prob: (B, T), float32, bfloat16 or float16; arithmetic is float32.
        advantages: (B, T), from a ``delta_l_*`` estimator.
        response_mask: (B, T), bool or number; masked positions may hold anything.
        loss_agg_mode: "seq-mean-token-sum-norm" or "seq-mean-token-sum".
        config: verl's ActorConfig: ``clip_ratio``, ``clip_ratio_low``, ``clip_ratio_high``,
            ``clip_ratio_c``, ``policy_loss.rollout_correction``, and ``global_batch_info`` as verl
            fills it.
        rollout_is_weights: (B, T) off-policy weights, or None.
        **options: those given to :func:`register`; verl passes none.

    Returns:
        The loss, and the means over this micro-batch's tokens ``actor/pg_clipfrac``,
        ``actor/pg_clipfrac_lower`` and ``actor/ppo_kl`` as 0-dim tensors (none of them with
        "reinforce", which has no ratio); with a correction in the kernel also ``rollout_corr/kl``
        and ``k3_kl`` as verl has them, and what else :class:`dl_norm._metrics.RolloutMetrics` sums
        up; with rejections before it ``rollout_corr/rollout_rs_masked_fraction``. Nothing here
        waits for the device: verl 0.9.1 reads the values itself, when it stores them.

    Raises:
        ValueError, TypeError: another ``loss_agg_mode``, no M, or no ``dp_size`` or
            ``global_batch_size``: a micro-batch never stands in for the whole. A
            ``rollout_correction`` beside finished weights, without the rollout's log-probs, with
            ``rollout_is_batch_normalize``, or with a token loss beside REINFORCE. Also what
            :func:`dl_norm.policy_loss` refuses.
    """
    if config is None:
        raise ValueError("the policy loss delta_l needs config, verl's ActorConfig; got None")
    scale = _scale(config.global_batch_info, loss_agg_mode)
    low, high = config.clip_ratio_low, config.clip_ratio_high
    clip: dict[str, Any] = {
        "eps_low": config.clip_ratio if low is None else low,
        "eps_high": config.clip_ratio if high is None else high,
        "dual_clip": config.clip_ratio_c,
    }
    streams = old_log_prob, log_prob, response_mask
    theirs = rollout.settings(config)
    if theirs is None:
        options["rollout_weights"] = rollout_is_weights
        return _loss(streams, advantages, weights=scale, clip=clip, **options)
    rollout.check_settings(theirs, rollout_is_weights, options)
    correction = settings_of.verl(theirs)
    in_kernel = {**options, "rollout_correction": correction}
    if not theirs.get("bypass_mode", False):
        in_kernel["rollout_log_probs"] = rollout.sampled_here()
        return _loss(streams, advantages, weights=scale, clip=clip, **in_kernel)
    if rollout.loss_type(theirs) == "reinforce":
        in_kernel["rollout_log_probs"], streams = old_log_prob, (None, *streams[1:])
        clip = {"surrogate": "policy_gradient"}
        return _loss(streams, advantages, weights=scale, clip=clip, **in_kernel)
    if not correction.reject:
        return _loss(streams, advantages, weights=scale, clip=clip, **options)
    kept, share = rollout.kept(*streams, correction)
    streams = *streams[:2], kept
    loss, metrics = _loss(streams, advantages, weights=scale, clip=clip, **options)
    return loss, metrics | {"rollout_corr/rollout_rs_masked_fraction": 1 - share}


def _loss(
    streams: tuple[Tensor | None, Tensor, Tensor], advantages: Tensor, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics, under verl's names where it has one."""
    old, new, mask = streams
    loss, metrics = adapter_loss(
        new, old, advantages, mask, log_ratio_clamp=_LOG_RATIO_CLAMP, **options
    )
    tokens = metrics.tokens.clamp(min=1)
    clipped = metrics.clipped_low + metrics.clipped_high
    of_tokens = {name: value / tokens for name, value in metrics.extras.items()}
    if old is not None:
        of_tokens |= {
            "pg_clipfrac": clipped / tokens,
            "ppo_kl": metrics.kl_old_k1 / tokens,
            "pg_clipfrac_lower": metrics.clipped_dual / tokens,
        }
    shown = {f"actor/{name}": value for name, value in of_tokens.items()}
    if metrics.rollout is not None:
        verls = {"rollout_k1": "kl", "rollout_k3": "k3_kl"}
        for name, value in metrics.rollout.summary(tokens).items():
            shown[f"rollout_corr/{verls.get(name, name)}"] = value
    return loss, shown


def ppo_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> Any:
    """verl's ``ppo_loss``, where a policy loss of this module finds the rollout's log-probs.

    verl calls a policy loss with finished weights and without ``rollout_log_probs``, which are in
    ``data``. This function stands in verl's place from the import of the plugin on, does verl's
    work by verl's function, and changes nothing for other policy losses or without
    ``policy_loss.rollout_correction``. Arguments and results are verl's.
    """
    theirs = rollout.settings(config) if config.policy_loss.get("loss_mode") in _ours else None
    sampled = None
    if theirs is not None and not theirs.get("bypass_mode", False):
        if "rollout_log_probs" not in data:
            raise ValueError(
                "policy_loss.rollout_correction needs rollout_log_probs, which this batch lacks: "
                "set actor_rollout_ref.rollout.calculate_log_probs=true"
            )
        sampled = data.select("rollout_log_probs").to_padded_tensor()["rollout_log_probs"]
    token = rollout.sampled.set(sampled)
    try:
        return _verls_ppo_loss(config, model_output, data, dp_group)
    finally:
        rollout.sampled.reset(token)


# verl's workers are imported after the plugins, and take it from there.
_verls_ppo_loss, _losses.ppo_loss = _losses.ppo_loss, ppo_loss


def register(name: str, **options: Any) -> None:
    """Registers ``delta_l`` with other options as verl's policy loss ``name``.

    Call it in a module that VERL_USE_EXTERNAL_MODULES names, and set ``policy_loss.loss_mode`` to
    ``name``.

    Args:
        **options: of :func:`dl_norm.policy_loss` that are no tensors, over verl's clip settings:
            ``surrogate="my_package.losses:my_loss"``, a token loss of your own (verl's clip
            settings are then left out), or ``ratio_level="sequence"``.
    """
    checked(options)
    _ours.add(name)
    register_policy_loss(name)(functools.partial(compute_policy_loss_delta_l, **options))


def _scale(info: dict[str, Any], loss_agg_mode: str) -> float:
    """P / (G M), of verl's ``global_batch_info``."""
    constant = _max_length(loss_agg_mode, info.get("loss_scale_factor"))
    for name in ("dp_size", "global_batch_size"):
        if info.get(name) is None:
            raise ValueError(
                f"config.global_batch_info lacks {name!r}, without which the loss would depend on "
                f"how the batch is cut; it holds {info}. verl's ppo_loss fills it in: pass "
                "global_batch_size with the data"
            )
        check_number(info[name], name, f"{name} >= 1", lambda count: count >= 1)
    return info["dp_size"] / (info["global_batch_size"] * constant)


def _max_length(loss_agg_mode: str, loss_scale_factor: float | None) -> float:
    """The constant M of the actor's settings."""
    if loss_agg_mode == "seq-mean-token-sum-norm":
        if loss_scale_factor is None:
            raise ValueError(
                "set actor.loss_scale_factor to the constant M, such as data.max_response_length: "
                "without it verl divides by the padded width of each micro-batch"
            )
        check_number(loss_scale_factor, "loss_scale_factor", "> 0", lambda length: length > 0)
        return loss_scale_factor
    if loss_agg_mode == "seq-mean-token-sum":
        if loss_scale_factor is not None:
            raise ValueError(
                f"loss_scale_factor={loss_scale_factor} has no effect on loss_agg_mode="
                f"{loss_agg_mode!r}: set loss_agg_mode=seq-mean-token-sum-norm"
            )
        return 1
    raise ValueError(
        f"loss_agg_mode={loss_agg_mode!r} would weight the sequences a second time: set "
        "actor.loss_agg_mode=seq-mean-token-sum-norm and actor.loss_scale_factor to the constant M"
    )


def _check_actor(algorithm: Any) -> None:
    """Checks the actor's aggregation where ``algorithm`` is a section of verl's configuration."""
    if not OmegaConf.is_config(algorithm):
        return
    try:
        actor = OmegaConf.select(algorithm, "..actor_rollout_ref.actor")
    except ConfigKeyError:  # a section on its own
        return
    if actor is not None:
        _max_length(actor.loss_agg_mode, actor.get("loss_scale_factor"))
        rollout.check_one_corrects(algorithm.get("rollout_correction"), actor, _ours)
