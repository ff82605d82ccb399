"""The actor's section ``policy_loss.rollout_correction`` of :mod:`dl_norm.integrations.verl`."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from contextvars import ContextVar
from typing import Any

from torch import Tensor

import dl_norm
from dl_norm._rollout import token_weights

# What the policy that sampled gave a micro-batch: verl calls a policy loss without it.
sampled: ContextVar[Tensor | None] = ContextVar("rollout_log_probs", default=None)


def sampled_here() -> Tensor:
    found = sampled.get()
    if found is None:
        raise ValueError(
            "policy_loss.rollout_correction needs the rollout's log-probs, which come with "
            "dl_norm.integrations.verl.ppo_loss: a loss function of your own must call that in "
            "the place of verl's ppo_loss, or leave the correction to algorithm.rollout_correction"
        )
    return found


def settings(config: Any) -> Any:
    """The actor's ``rollout_correction``, None where it says nothing."""
    policy_loss = getattr(config, "policy_loss", None)
    theirs = None if policy_loss is None else policy_loss.get("rollout_correction", None)
    if _is_default(theirs):
        return None
    names = ("rollout_is", "rollout_rs", "bypass_mode")
    return theirs if theirs is not None and any(theirs.get(n, None) for n in names) else None


def _is_default(theirs: Any) -> bool:
    """verl fills the place with a value of its class, at its defaults: that stands for nothing."""
    return dataclasses.is_dataclass(theirs) and theirs == type(theirs)()  # type: ignore


def loss_type(theirs: Any) -> str:
    found = theirs.get("loss_type", "ppo_clip")
    if found not in ("ppo_clip", "reinforce"):
        raise ValueError(
            f"loss_type={found!r} of rollout_correction must be 'ppo_clip' or 'reinforce'"
        )
    return found


def check_settings(theirs: Any, finished: Tensor | None, options: dict[str, Any]) -> None:
    if finished is not None:
        raise ValueError(
            "both algorithm.rollout_correction, whose weights are here, and "
            "actor.policy_loss.rollout_correction would correct: take one of them out"
        )
    bypass = theirs.get("bypass_mode", False)
    reinforce = bypass and loss_type(theirs) == "reinforce"
    weighs = theirs.get("rollout_is", None) and (reinforce or not bypass)
    if weighs and theirs.get("rollout_is_batch_normalize", False):
        raise ValueError(
            "rollout_is_batch_normalize needs the mean weight of the whole batch, and the policy "
            "loss sees a micro-batch: leave the correction to algorithm.rollout_correction, which "
            "verl's driver computes, without bypass_mode"
        )
    if reinforce and options.get("surrogate") is not None:
        raise ValueError(
            f"surrogate={options['surrogate']!r} beside loss_type='reinforce', which is a token "
            "loss: take one of them"
        )


def kept(
    old_log_prob: Tensor, log_prob: Tensor, mask: Tensor, correction: dl_norm.RolloutCorrection
) -> tuple[Tensor, Tensor]:
    """The mask without what is rejected, by the current policy, and the share that is left. PPO's
    ratio is the weight already, so nothing else of the correction is."""
    alone = dl_norm.RolloutCorrection("none", reject=correction.reject)
    counted = mask != 0
    left = counted & (token_weights(log_prob.detach(), old_log_prob, mask, alone) != 0)
    return left, left.sum() / counted.sum().clamp(min=1)


def check_one_corrects(drivers: Any, actor: Any, ours: Container[str]) -> None:
    """Raises where the settings of verl's driver and of the actor do not go together."""
    actors = settings(actor)
    bypass = {
        "algorithm.rollout_correction": bool(drivers and drivers.get("bypass_mode", False)),
        "actor.policy_loss.rollout_correction": bool(actors and actors.get("bypass_mode", False)),
    }
    first, second = bypass
    if actors and bypass[first] != bypass[second]:
        raise ValueError(
            f"bypass_mode, by which old_log_probs are the rollout's, is {bypass[first]} in {first} "
            f"and {bypass[second]} in {second}: it must be the same in both"
        )
    if not drivers:
        return
    asks = drivers.get("rollout_rs", None) or drivers.get("loss_type", None) == "reinforce"
    if bypass[first] and not bypass[second] and asks and actor.policy_loss.loss_mode in ours:
        raise ValueError(
            f"in bypass_mode verl's driver leaves rollout_rs and loss_type of {first} to the "
            f"policy loss: add {second}='${{algorithm.rollout_correction}}' to the run"
        )
    if actors and not bypass[first] and any(map(drivers.get, ("rollout_is", "rollout_rs"))):
        raise ValueError(
            f"both {first} and {second} would correct: give rollout_is and rollout_rs in one of "
            "them"
        )
