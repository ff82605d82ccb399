"""The contestants: every one computes the same ΔL policy loss from the same log-probs.

The trainers know no ΔL, but each can be made to give it: a positive weight may ride on the
advantages (min and clip are positively homogeneous in A), and the sum is then plain. That scaling
is done before the clock starts. Each contestant gets what its trainer hands to its loss: TRL an
int64 mask and (G,) advantages, verl a bool mask and (G, T) advantages.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import dl_norm
import dl_norm.reference
from bench.cases import EPS_HIGH, EPS_LOW, Inputs
from bench.contest import OURS, Contestant, Loss, NotHere, our_impl
from bench.lift import NotInstalled, lift, version

# What verl's loss assigns for its metrics alone.
VERL_METRICS = ("ppo_kl", "pg_clipfrac", "pg_clipfrac_lower", "pg_metrics")


def _policy_loss(function: Callable[..., Any], inputs: Inputs, **options: Any) -> Loss:
    def loss() -> Tensor:
        return function(
            inputs.log_probs,
            inputs.old_log_probs,
            inputs.advantages,
            inputs.mask,
            inputs.weights,
            cu_seqlens=inputs.cu_seqlens,
            eps_low=EPS_LOW,
            eps_high=EPS_HIGH,
            **options,
        )

    return loss


def _ours(inputs: Inputs) -> Loss:
    return _policy_loss(dl_norm.policy_loss, inputs, impl=our_impl(inputs.log_probs))


def _ours_torch(inputs: Inputs) -> Loss:
    return _policy_loss(dl_norm.policy_loss, inputs, impl="torch")


def _ours_metrics(inputs: Inputs) -> Loss:
    impl = our_impl(inputs.log_probs)
    loss: Any = _policy_loss(dl_norm.policy_loss, inputs, impl=impl, return_metrics=True)
    return lambda: loss()[0]


def reference(inputs: Inputs) -> Loss:
    return _policy_loss(dl_norm.reference.policy_loss, inputs)


@functools.cache  # one compiled function for all buffer sets of a case
def _compiled_reference() -> Callable[..., Any]:
    return torch.compile(dl_norm.reference.policy_loss, dynamic=False)


def _compiled(inputs: Inputs) -> Loss:
    return _policy_loss(_compiled_reference(), inputs)


class _NoPrompt:
    """An empty prompt: concatenating it with x is x, without the copy that is no part of a loss."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function is torch.cat
        return args[0][1]


@functools.cache
def _trl_compute_loss(metrics: bool) -> Callable[..., Tensor]:
    utilities = {
        name: lift("trl.trainer.utils", name, {"torch": torch}) for name in ("nanmin", "nanmax")
    }
    return lift(
        "trl.trainer.grpo_trainer",
        "GRPOTrainer._compute_loss",
        {"torch": torch, **utilities},
        stop_at_inner_function=None if metrics else "masked_seq_mean:loss",
    )


def _trl(inputs: Inputs, *, metrics: bool) -> Loss:
    return trl_loss(inputs, lambda: inputs.log_probs, metrics=metrics)


def trl_loss(inputs: Inputs, log_probs: Callable[[], Tensor], *, metrics: bool) -> Loss:
    """TRL's loss of what ``log_probs`` returns; of the inputs it takes all else."""
    if inputs.mask is None:
        raise NotHere("TRL's loss takes padded batches only")
    compute_loss = _trl_compute_loss(metrics)
    entropies = torch.zeros_like(inputs.log_probs)
    no_prompt = _NoPrompt()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs(), entropies, None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        aux_loss_enabled=False,
        beta=0.0,
        current_gradient_accumulation_steps=1,
        epsilon_high=EPS_HIGH,
        epsilon_low=EPS_LOW,
        importance_sampling_level="token",
        loss_type="dapo",
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
    )
    mask = inputs.mask.long()
    batch = {
        "prompt_ids": no_prompt,
        "prompt_mask": no_prompt,
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": inputs.advantages * inputs.weights,
        "old_per_token_logps": inputs.old_log_probs,
        "num_items_in_batch": torch.ones((), device=mask.device),
    }

    def loss() -> Tensor:
        # TRL keeps one Python number per call; a trainer empties the lists at every log.
        trainer._metrics.clear()
        return compute_loss(trainer, None, batch)

    return loss


@functools.cache
def _verl_compute_loss(metrics: bool) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    functional = "verl.utils.torch_functional"
    masked_sum = lift(functional, "masked_sum", {"torch": torch})
    masked_mean = lift(functional, "masked_mean", {"torch": torch, "masked_sum": masked_sum})
    tools = {
        "torch": torch,
        "verl_F": SimpleNamespace(masked_sum=masked_sum, masked_mean=masked_mean),
    }
    algorithms = "verl.trainer.ppo.core_algos"
    agg_loss = lift(algorithms, "agg_loss", tools)
    return lift(
        algorithms,
        "compute_policy_loss_vanilla",
        {**tools, "agg_loss": agg_loss, "AlgoConfig": type(None), "pg_metrics": {}},
        drop=() if metrics else VERL_METRICS,
    )


def _verl(inputs: Inputs, *, metrics: bool) -> Loss:
    if inputs.mask is None:
        raise NotHere("verl's loss takes padded batches only")
    advantages = inputs.per_token(inputs.advantages * inputs.weights).contiguous()
    return lambda: verl_loss(
        inputs.old_log_probs, inputs.log_probs, advantages, inputs.mask, metrics=metrics
    )


def verl_loss(
    old_log_probs: Tensor,
    log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    metrics: bool = False,
) -> Tensor:
    """verl's loss; the weights are on the (B, T) advantages."""
    return _verl_compute_loss(metrics)(
        old_log_prob=old_log_probs,
        log_prob=log_probs,
        advantages=advantages,
        response_mask=mask,
        loss_agg_mode="token-sum",
        config=_VerlConfig(
            clip_ratio=EPS_LOW,
            clip_ratio_low=EPS_LOW,
            clip_ratio_high=EPS_HIGH,
            clip_ratio_c=3.0,
            global_batch_info={},
        ),
    )[0]


class _VerlConfig(SimpleNamespace):
    """The part of verl's ActorConfig that the loss reads."""

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


CONTESTANTS = (
    Contestant(OURS, "policy_loss, impl=None", _ours, graphable=True),
    Contestant("dl_norm torch", 'policy_loss, impl="torch"', _ours_torch),
    Contestant("dl_norm + metrics", "policy_loss with return_metrics=True", _ours_metrics),
    Contestant("reference", "dl_norm.reference.policy_loss under autograd", reference),
    Contestant("torch.compile", "the reference compiled for this shape", _compiled, graphable=True),
    Contestant(
        "TRL",
        "lines of GRPOTrainer._compute_loss up to the loss, no metrics, no prompt concatenation",
        lambda inputs: _trl(inputs, metrics=False),
    ),
    Contestant(
        "TRL + metrics",
        "all of GRPOTrainer._compute_loss but the model, metrics and their host syncs included",
        lambda inputs: _trl(inputs, metrics=True),
    ),
    Contestant(
        "verl",
        "compute_policy_loss_vanilla + agg_loss without its metrics; the dual clip is always on",
        lambda inputs: _verl(inputs, metrics=False),
    ),
    Contestant(
        "verl + metrics",
        "compute_policy_loss_vanilla + agg_loss, metrics and their host syncs included",
        lambda inputs: _verl(inputs, metrics=True),
    ),
)


def versions() -> dict[str, str]:
    """Of the trainers whose code is run."""
    found = {}
    for package in ("trl", "verl", "liger-kernel", "cut-cross-entropy", "quack-kernels"):
        try:
            found[package] = version(package)
        except NotInstalled:
            found[package] = "not installed"
    return found
