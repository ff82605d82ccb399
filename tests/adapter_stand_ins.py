"""Stand-ins for trainers that are not installed: what their classes are to the adapters' hooks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum, auto
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_tools import ALPHA, CLIP, M, Rollout, T, fake, fresh_import
from torch import Tensor


def rows(tensors: dict[str, Any], part: slice) -> dict[str, Any]:
    return {name: tensor[part] for name, tensor in tensors.items()}


# -- SkyRL


def skyrl_config(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "policy_loss_type": "delta_l_dual_clip",
            "loss_reduction": "seq_mean_token_sum_norm",
            "max_seq_len": M,
            "eps_clip_low": CLIP["eps_low"],
            "eps_clip_high": CLIP["eps_high"],
            "clip_ratio_c": CLIP["dual_clip"],
            "advantage_batch_normalize": False,
            **changes,
        }
    )


class SkyRLTrainer:
    """SkyRL's division of a mini-batch's advantages by its rows and max_seq_len."""

    def __init__(self, config: SimpleNamespace):
        self.cfg = SimpleNamespace(trainer=SimpleNamespace(algorithm=config))

    def _normalize_advantages(self, data, mini_batch_boundaries, prompt_boundaries=None):
        for start, end in mini_batch_boundaries:
            data["advantages"][start:end] /= (end - start) * self.cfg.trainer.algorithm.max_seq_len
        return data


def skyrl_registry(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    registry: dict[str, Any] = {}
    fake(
        patch,
        "skyrl.backends.skyrl_train.utils.ppo_utils",
        PolicyLossRegistry=SimpleNamespace(register=registry.__setitem__),
    )
    return registry


# -- prime-rl


def prime_samples(rollout: Rollout, **changes: Any) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(
            **{
                "mask": [False, *mask.bool().tolist()],  # a prompt token first
                "advantages": [0.0, *([advantage] * len(mask))],
                "rl_weights": None,
                **changes,
            }
        )
        for mask, advantage in zip(
            rollout.cut(rollout.mask), rollout.advantages.tolist(), strict=True
        )
    ]


# -- slime and Miles


def slime_args(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "delta_l_alpha": ALPHA,
            "delta_l_max_length": M,
            "advantage_estimator": "grpo",
            "calculate_per_token_loss": False,
            "normalize_advantages": False,
            "eps_clip": CLIP["eps_low"],
            "eps_clip_high": CLIP["eps_high"],
            "eps_clip_c": CLIP["dual_clip"],
            "use_rollout_logprobs": False,
            **changes,
        }
    )


def slime_batch(rollout: Rollout) -> dict[str, Any]:
    """slime's rollout data: lists of (L_i,) streams. Lengths are those of the responses."""
    return {
        "rewards": rollout.advantages.tolist(),
        "response_lengths": rollout.widths,
        "total_lengths": [n + 2 for n in rollout.widths],
        "loss_masks": rollout.cut(rollout.mask),
        "kl": rollout.cut(torch.zeros(rollout.mask.shape)),
        "log_probs": rollout.cut(rollout.old),
        "new_log_probs": rollout.cut(rollout.log_probs),
    }


def fake_slime(patch: pytest.MonkeyPatch) -> None:
    """The "logits" of these tests are the list of log-probs."""
    fake(patch, "megatron.core", mpu=SimpleNamespace(get_data_parallel_group=lambda: None))
    fake(
        patch,
        "slime.backends.megatron_utils.loss",
        get_log_probs_and_entropy=lambda logits, **_: (None, {"log_probs": logits}),
        get_rollout_top_p_logprob_kwargs=lambda args, batch: {},
    )


def fake_miles(patch: pytest.MonkeyPatch) -> None:
    fake(
        patch,
        "miles.backends.training_utils.loss_hub.logit_processors",
        get_log_probs_and_entropy=lambda logits, **_: {"log_probs": logits},
    )

    def rewards(args, samples, custom_reward_post_process_func, prompt_group_sizes=None):
        rewards = [sample.reward for sample in samples]
        return rewards, rewards

    fake(patch, "miles.ray.rollout.train_data_conversion", _post_process_rewards=rewards)


def miles_samples(rollout: Rollout) -> list[SimpleNamespace]:
    """A response without a mask, one that is removed, and the rest with masks."""
    samples = [
        SimpleNamespace(
            index=row,
            group_index=row // 2,
            rollout_id=None,
            reward=reward,
            response_length=len(mask),
            loss_mask=mask.bool().tolist(),
            remove_sample=not mask.any(),
        )
        for row, (mask, reward) in enumerate(
            zip(rollout.cut(rollout.mask), rollout.advantages.tolist(), strict=True)
        )
    ]
    if samples[0].loss_mask and all(samples[0].loss_mask):
        samples[0].loss_mask = None
    return samples


# -- NeMo-RL


def fake_nemo_rl(patch: pytest.MonkeyPatch) -> None:
    fake(
        patch,
        "nemo_rl.algorithms.loss.interfaces",
        LossInputType=Enum("LossInputType", {"LOGPROB": "logprob"}),
        LossType=Enum("LossType", {"SEQUENCE_LEVEL": auto()}),
        MetricNormalizer=Enum("MetricNormalizer", {"TOKENS": 1, "SEQUENCES": 2, "NONE": 3}),
    )


NEMO = {
    "ratio_clip_min": CLIP["eps_low"],
    "ratio_clip_max": CLIP["eps_high"],
    "ratio_clip_c": CLIP["dual_clip"],
    "reference_policy_kl_penalty": 0.0,
}


# -- AReaL


class StatsTracker:
    """Takes what AReaL's stats_tracker takes."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def denominator(self, **masks: Tensor) -> None:
        assert all(mask.dtype == torch.bool for mask in masks.values())

    def stat(self, denominator: str, **streams: Tensor) -> None:
        assert denominator == "n_valid_tokens"
        assert all(stream.dtype == torch.float32 for stream in streams.values())
        self.names |= set(streams)


# -- ROLL


class RollActorWorker:
    """What ROLL's actor worker is to its hook: steps of micro-batches, as its FSDP2 strategy."""

    def __init__(self, **changes: Any):
        self.pipeline_config = SimpleNamespace(
            **{
                "response_length": M,
                "difficulty_loss_weight": False,
                "length_loss_weight": False,
                "entropy_loss_coef": 0.0,
                "importance_sampling": "token",
                "use_pg_clip_range": True,
                "pg_clip_low": CLIP["eps_low"],
                "pg_clip_high": CLIP["eps_high"],
                "pg_clip": 1.0,  # dual clip 1 + 2 pg_clip = 3
                "dual_clip_loss": True,
                "use_kl_loss": False,
                "rl_loss_coef": 1.0,
                "enable_old_logprobs_recompute": True,
                "train_infer_correction": SimpleNamespace(is_weight=SimpleNamespace(enabled=False)),
                **changes,
            }
        )
        self.worker_config = SimpleNamespace(
            use_dynamic_batching_in_train=False,
            apply_loss_scale=changes.get("apply_loss_scale", True),
            training_args=SimpleNamespace(
                per_device_train_batch_size=1, gradient_accumulation_steps=3
            ),
        )
        self.strategy = SimpleNamespace(
            get_data_input=lambda data: data,
            op_compute_log_probs=lambda logits, input_ids, attention_mask: logits,
        )

    def get_old_log_probs_with_cache(self, data, log_probs):
        return data.batch["old_log_probs"]

    def train_step(self, data):
        self.losses, self.metrics = [], []
        for row in range(len(data)):
            micro = SimpleNamespace(
                batch=rows(data.batch, slice(row, row + 1)),
                meta_info={"batch_num_tokens": {"response_mask": torch.tensor(20)}},
            )
            loss, metrics = self.loss_func(micro, micro.batch["logits"])
            self.losses.append(loss)
            self.metrics.append(metrics)
        return data


class RollBatch(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.batch["input_ids"])


def import_roll(patch: pytest.MonkeyPatch, worker: type | None = None) -> Any:
    """The adapter, which imports ROLL, over stand-ins."""
    fake(
        patch,
        "roll.distributed.scheduler.decorator",
        Dispatch=SimpleNamespace(DP_MP_DISPATCH_FIRST=None),
        register=lambda **_: lambda function: function,
    )
    fake(patch, "roll.pipeline.rlvr.actor_worker", ActorWorker=worker or RollActorWorker)
    fake(patch, "roll.utils.train_infer_corrections", compute_train_infer_correction=None)
    return fresh_import(patch, "dl_norm.integrations.roll")


def roll_batch(rollout: Rollout) -> RollBatch:
    mask = rollout.mask if rollout.mask.dtype != torch.bool else rollout.mask.int()
    return RollBatch(
        batch={
            "input_ids": torch.zeros(len(rollout), T + 1),
            "response_mask": torch.nn.functional.pad(mask, (1, 0)),
            "advantages": rollout.advantages[:, None] * rollout.mask,
            "old_log_probs": rollout.old,
            "logits": rollout.log_probs,
        },
        meta_info={},
    )


# -- torchtitan


class TitanBatcher:
    """torchtitan's batcher as far as weights go: it takes the samples of a step out of groups."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        pass

    def __init__(self, config: Any, **kwargs: Any):
        self.samples = kwargs["samples"]

    def _take_groups(self):
        return self.samples, [], 1, 0


class TitanLoss:
    @dataclass(kw_only=True, slots=True)
    class Config:
        pass


def import_torchtitan(patch: pytest.MonkeyPatch) -> Any:
    """The adapter over stand-ins. The "logits" of these tests are log-probs."""
    fake(
        patch,
        "torchtitan.components.loss",
        BaseLoss=TitanLoss,
        compute_logprobs=lambda logits, labels, return_entropy: (logits, torch.zeros_like(logits)),
    )
    fake(patch, "torchtitan.experiments.rl.components.batcher", Batcher=TitanBatcher)
    return fresh_import(patch, "dl_norm.integrations.torchtitan")


def titan_samples(rollout: Rollout) -> list[SimpleNamespace]:
    """A prompt token first; a sampler's log-prob that is missing takes its token out."""
    return [
        SimpleNamespace(
            loss_mask=[False, *mask.bool().tolist()],
            logprobs=[0.0, *old.tolist()],
            advantage=[0.0, *([advantage] * len(mask))],
        )
        for mask, old, advantage in zip(
            rollout.cut(rollout.mask),
            rollout.cut(rollout.old),
            rollout.advantages.tolist(),
            strict=True,
        )
    ]


class UnslothTrainer:
    """What unsloth's trainer is to the mixin: a batch comes out, and the loss reads a key of it."""

    def __init__(self, mask: Tensor, training: bool = True):
        self.mask, self.model = mask, SimpleNamespace(training=training)
        self.args = SimpleNamespace(max_completion_length=M)
        self.accelerator = SimpleNamespace(process_index=0, gather=lambda tensor: tensor)

    def _generate_and_score_completions(self, inputs):
        return {"completion_mask": self.mask}

    def compute_loss(self, model, inputs):
        return inputs.get("unsloth_sample_weight", None)


class SwiftTrainer:
    """What ms-swift's trainer is to the mixin, with its loss over rows and a constant."""

    dynamic_num_samples = use_liger_loss = overlong_filter = False

    def __init__(self, advantages: Tensor, **changes: Any):
        self.advantages = advantages
        self.args = SimpleNamespace(loss_type="dr_grpo")
        self.template = SimpleNamespace(sequence_parallel_size=1)
        self.accelerator = SimpleNamespace(gather=lambda tensor: tensor)
        self.__dict__.update(changes)

    def _compute_advantages(self, samples, rewards_per_func, batch_encoded_inputs):
        return self.advantages


def swift_batches(mask: Tensor, truncated: Tensor | None = None) -> list[dict[str, Any]]:
    truncated = torch.zeros(len(mask), dtype=torch.bool) if truncated is None else truncated
    return [
        {"grpo_batch": SimpleNamespace(completion_mask=part, truncated_mask=cut)}
        for part, cut in zip(mask.chunk(2), truncated.chunk(2), strict=True)
    ]


def megatron_utils(advantages: Tensor, **changes: Any) -> SimpleNamespace:
    """Megatron-RL's module as far as the adapter goes; every turn is a row of its own."""
    args = {
        "calculate_per_token_loss": True,
        "grpo_prompts_per_step": 3,
        "grpo_group_size": 2,
        "global_batch_size": 6,
        "rl_use_sequence_packing": False,
    }
    return SimpleNamespace(
        get_args=lambda: SimpleNamespace(**args | changes),
        compute_group_stats=lambda *_: SimpleNamespace(advantages=advantages.tolist()),
        _to_list=list,
        _is_collapsible_rollout=lambda rollout: False,
    )


PAD = 0


def megatron_rollouts(rollout: Rollout) -> list[list[SimpleNamespace]]:
    """Groups of two; a prompt token first, and no trajectory where there is no response."""
    found = [
        SimpleNamespace(
            trajectory=[[7, *[1] * len(mask)]] if len(mask) else [],
            generation_mask=[[False, *mask.bool().tolist()]] if len(mask) else None,
        )
        for mask in rollout.cut(rollout.mask)
    ]
    return [found[start : start + 2] for start in range(0, len(found), 2)]


def import_verl(patch: pytest.MonkeyPatch) -> Any:
    """The plugin over stand-ins for verl's registries and its GRPO advantages."""

    def register(name: str) -> Any:
        return lambda function: function

    def grpo(token_level_rewards: Tensor, response_mask: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        advantages = token_level_rewards * response_mask
        return advantages, advantages

    fake(
        patch,
        "verl.trainer.ppo.core_algos",
        compute_grpo_outcome_advantage=grpo,
        compute_rloo_outcome_advantage=grpo,
        register_adv_est=register,
        register_policy_loss=register,
    )
    fake(patch, "verl.workers.utils.losses", ppo_loss=None)
    patch.setattr(sys.modules["verl"], "__version__", "0.9.1", raising=False)
    fake(patch, "omegaconf", OmegaConf=SimpleNamespace(is_config=lambda config: False))
    fake(patch, "omegaconf.errors", ConfigKeyError=KeyError)
    return fresh_import(patch, "dl_norm.integrations.verl")
