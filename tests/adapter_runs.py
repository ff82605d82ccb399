"""The loss of a whole rollout as each trainer puts it together, over stand-ins for the trainers.

A run takes a :class:`adapter_tools.Rollout` and a user's own options, and returns the loss of the
rollout: micro-batches, the trainer's division and everything.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from adapter_stand_ins import (
    NEMO,
    PAD,
    SkyRLTrainer,
    StatsTracker,
    SwiftTrainer,
    UnslothTrainer,
    fake_miles,
    fake_nemo_rl,
    fake_slime,
    import_roll,
    import_torchtitan,
    import_verl,
    megatron_rollouts,
    megatron_utils,
    miles_samples,
    prime_samples,
    roll_batch,
    rows,
    skyrl_config,
    skyrl_registry,
    slime_args,
    slime_batch,
    swift_batches,
    titan_samples,
)
from adapter_tools import ALPHA, CLIP, LENGTHS, M, Rollout, T, fake, own
from torch import Tensor

import dl_norm
from dl_norm.integrations import (
    _shared as shared,
)
from dl_norm.integrations import (
    areal,
    megatron_rl,
    miles,
    ms_swift,
    nemo_rl,
    open_instruct,
    prime_rl,
    skyrl,
    slime,
    unsloth,
)

Run = Callable[..., Tensor]
RUNS: dict[str, Run] = {}  # those whose loss is ours
FIXED: dict[str, Run] = {}  # those whose loss is ours, with no options but the trainer's
WEIGHTED: dict[str, Run] = {}  # those whose loss is the trainer's


def run(registry: dict[str, Run]) -> Callable[[Run], Run]:
    def register(function: Run) -> Run:
        registry[function.__name__.replace("_", "-")] = function
        return function

    return register


def token_mean(rollout: Rollout) -> int:
    return max(int(rollout.lengths.sum()), 1)


class WeightedSkyRLTrainer(skyrl.DeltaLAdvantages, SkyRLTrainer):
    alpha = ALPHA


def skyrl_steps(
    rollout: Rollout, patch: pytest.MonkeyPatch, boundaries: list[tuple[int, int]], **options: Any
) -> Tensor:
    registry, config = skyrl_registry(patch), skyrl_config()
    skyrl.register(**options)
    loss_fn = registry[config.policy_loss_type]
    data = {
        "advantages": rollout.advantages[:, None] * torch.ones(rollout.mask.shape),
        "loss_mask": rollout.mask,
    }
    data = WeightedSkyRLTrainer(config)._normalize_advantages(data, boundaries)
    total = torch.zeros(())
    for row in range(len(rollout)):
        part = slice(row, row + 1)
        loss, metrics = loss_fn(
            rollout.log_probs[part],
            rollout.old[part],
            data["advantages"][part],
            config=config,
            loss_mask=data["loss_mask"][part],
            rollout_logprobs=None,
        )
        assert isinstance(metrics["clip_ratio"], float)
        total = total + loss
    return total / len(boundaries)


@run(RUNS)
def skyrl_trainer(rollout: Rollout, patch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    return skyrl_steps(rollout, patch, [(0, len(rollout))], **options)


def prime_streams(rollout: Rollout) -> dict[str, list[Tensor]]:
    samples = prime_samples(rollout)
    prime_rl.weight_samples(samples, alpha=ALPHA, max_length=M)
    return {
        "trainer_logprobs": rollout.cut(rollout.log_probs),
        "inference_logprobs": rollout.cut(rollout.old),
        "advantages": [torch.tensor(sample.advantages[1:]) for sample in samples],
        "loss_mask": rollout.cut(rollout.mask),
    }


@run(RUNS)
def prime_rl_sequences(rollout: Rollout, patch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    fake(patch, "prime_rl.trainer.rl.loss", LossOutputs=SimpleNamespace)
    streams = prime_streams(rollout)
    outputs = [
        prime_rl.delta_l_loss(
            SimpleNamespace(**dict(zip(streams, values, strict=True)), loss_weights=None),
            **own(options),
        )
        for values in zip(*streams.values(), strict=True)
    ]
    assert all(value.ndim == 0 for value in outputs[0].metrics.values())
    assert set(outputs[0].metrics) == {"is_masked", "is_masked_low", "is_masked_high"}
    return torch.stack([output.loss for output in outputs]).sum() / token_mean(rollout)


@run(RUNS)
def prime_rl_packed(rollout: Rollout, patch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    loss, metrics = prime_rl.make_compute_loss(**own(options))(
        **prime_streams(rollout),
        **dict.fromkeys(("ref_logprobs", "rl_weights", "ce_weights", "ref_kl_weights")),
        rl_loss_fn=None,
        rl_scale=token_mean(rollout),
        ce_scale=1,
        ref_kl_scale=1,
    )
    assert set(metrics) == {"is_masked", "is_masked_low", "is_masked_high"}
    return loss


def packed_micro_batches(trainer: Any, args: Any, batch: dict[str, Any]) -> Tensor:
    """slime's loss of a step in two micro-batches, divided by its samples."""
    keys = ("response_lengths", "total_lengths", "loss_masks", "log_probs", "advantages")
    samples = len(batch["rewards"])
    total = torch.zeros(())
    for part in (slice(0, 4), slice(4, samples)):
        micro = rows({key: batch[key] for key in keys}, part) | {"unconcat_tokens": None}
        if not micro["response_lengths"]:
            continue
        loss, metrics = trainer.policy_loss(args, micro, batch["new_log_probs"][part], None)
        assert set(metrics) == {"loss", "pg_loss", "pg_clipfrac", "ppo_kl"}
        assert all(value.ndim == 0 for value in metrics.values())
        total = total + loss
    return total / samples


class Logits(list):
    """A list of log-probs in the place of logits; an empty micro-batch sums them."""

    def sum(self) -> Tensor:
        return sum((stream.sum() for stream in self), torch.zeros(()))


@run(RUNS)
def slime_trainer(rollout: Rollout, patch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    fake_slime(patch)
    args, batch = slime_args(delta_l_options=options), slime_batch(rollout)
    slime.advantages(args, batch)
    batch["new_log_probs"] = _Slices(batch["new_log_probs"])
    return packed_micro_batches(slime, args, batch)


@run(RUNS)
def miles_trainer(rollout: Rollout, patch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    fake_miles(patch)
    args, batch = slime_args(delta_l_options=options), slime_batch(rollout)
    _, weighted = miles.rewards(args, miles_samples(rollout))
    batch["advantages"] = [
        torch.ones_like(kl) * reward for kl, reward in zip(batch["kl"], weighted, strict=True)
    ]
    batch["new_log_probs"] = _Slices(batch["new_log_probs"])
    return packed_micro_batches(miles, args, batch)


class _Slices(list):
    def __getitem__(self, part: Any) -> Any:
        return Logits(super().__getitem__(part))


def nemo_data(rollout: Rollout) -> dict[str, Tensor]:
    """NeMo-RL's streams have a position more than the log-probs, in front."""

    def shifted(stream: Tensor) -> Tensor:
        return torch.nn.functional.pad(stream, (1, 0))

    class Grpo:
        def compute_advantage(self, prompt_ids, rewards, mask, **kwargs):
            return rewards[:, None].expand(mask.shape)

    token_mask = shifted(rollout.mask if rollout.mask.dtype != torch.bool else rollout.mask.int())
    advantages = nemo_rl.WeightedEstimator(Grpo(), alpha=ALPHA).compute_advantage(
        prompt_ids=None, rewards=rollout.advantages, mask=token_mask
    )
    return {
        "token_mask": token_mask,
        "sample_mask": (rollout.lengths > 0).float(),
        "advantages": advantages,
        "prev_logprobs": shifted(rollout.old),
        "generation_logprobs": shifted(rollout.old),
    }


@run(RUNS)
def nemo_rl_trainer(rollout: Rollout, patch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    fake_nemo_rl(patch)
    loss_fn = nemo_rl.DeltaLLossFn(NEMO, max_length=M, **options)
    data = nemo_data(rollout)
    counts = data["sample_mask"].sum(), rollout.lengths.sum()
    total = torch.zeros(())
    for part in (slice(0, 1), slice(1, 6)):
        if part.start >= len(rollout):
            continue
        loss, metrics = loss_fn(rollout.log_probs[part], rows(data, part), *counts)
        assert all(isinstance(value, float) for value in metrics.values())
        total = total + loss
    # exp is not clamped in NeMo-RL; no ratio here comes near the clamp.
    return total


def areal_batches(rollout: Rollout) -> list[tuple[Tensor, dict[str, Any]]]:
    """Two packed micro-batches with padding at the end of each row cut off."""
    batches = []
    for part in torch.arange(len(rollout)).chunk(2):

        def pack(stream: Tensor, part: Tensor = part) -> Tensor:
            return torch.cat([rollout.cut(stream)[row] for row in part])

        widths = [rollout.widths[row] for row in part]
        batches.append(
            (
                pack(rollout.log_probs),
                {
                    "logprobs": pack(rollout.old),
                    "advantages": pack(rollout.advantages[:, None].expand(rollout.mask.shape)),
                    "loss_mask": pack(rollout.mask),
                    "cu_seqlens": shared.offsets(widths, torch.device("cpu")).int(),
                },
            )
        )
    return batches


@run(RUNS)
def areal_actor(rollout: Rollout, patch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    stats = StatsTracker()
    hook = areal.DeltaLLoss(alpha=ALPHA, max_length=M, stats=stats, **own(options))
    batches = areal_batches(rollout)
    weights = [hook.weight(data) for _, data in batches]
    whole = torch.stack(weights).sum()
    losses = [
        hook(log_probs, torch.zeros_like(log_probs), data) * weight / whole.clamp(min=1e-9)
        for (log_probs, data), weight in zip(batches, weights, strict=True)
    ]
    assert {"approx_kl", "clip_ratio", "importance_weight", "entropy"} <= stats.names
    return torch.stack(losses).sum()


@run(RUNS)
def roll_worker(rollout: Rollout, patch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    settings = {"alpha": ALPHA, "options": options}
    worker = type("Worker", (import_roll(patch).DeltaLActorWorker,), settings)()
    worker.train_step(roll_batch(rollout))
    names = set(worker.metrics[0])
    assert {"actor/pg_loss@sum", "actor/ppo_ratio_clipfrac@sum", "actor/ratio_max@max"} <= names
    steps = max(len(rollout) // 3, 1)
    return torch.stack(worker.losses).sum() / steps


@run(RUNS)
def torchtitan_trainer(rollout: Rollout, patch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    titan = import_torchtitan(patch)
    config = titan.DeltaLBatcher.Config(alpha=ALPHA, max_length=M)
    samples, *_ = titan.DeltaLBatcher(config, samples=titan_samples(rollout))._take_groups()
    loss_fn = titan.DeltaLLoss(titan.DeltaLLoss.Config(options=own(options)))
    total = torch.zeros(())
    for row, (sample, width) in enumerate(zip(samples, rollout.widths, strict=True)):
        cut = (row, slice(0, width))
        loss, metrics = loss_fn(
            rollout.log_probs[cut],
            torch.zeros(width, dtype=torch.long),
            token_mean(rollout),
            generator_logprobs=rollout.old[cut],
            advantages=torch.tensor(sample.advantage[1:]),
            loss_mask=rollout.mask[cut],
        )
        assert all(value.ndim == 0 for value in metrics.values())
        total = total + loss
    return total


@run(FIXED)
def verl_plugin(rollout: Rollout, patch: pytest.MonkeyPatch) -> Tensor:
    verl = import_verl(patch)
    advantages, _ = verl.compute_delta_l_grpo_advantage(
        token_level_rewards=rollout.advantages[:, None].expand(rollout.mask.shape),
        response_mask=rollout.mask,
        index=None,
        config={"delta_l_alpha": ALPHA},
    )
    config = SimpleNamespace(
        clip_ratio=None,
        clip_ratio_low=CLIP["eps_low"],
        clip_ratio_high=CLIP["eps_high"],
        clip_ratio_c=CLIP["dual_clip"],
        global_batch_info={
            "dp_size": 2,
            "global_batch_size": len(rollout),
            "loss_scale_factor": M,
        },
    )
    total = torch.zeros(())
    for part in (slice(0, 1), slice(1, 6)):
        if part.start >= len(rollout):
            continue
        loss, metrics = verl.compute_policy_loss_delta_l(
            rollout.old[part],
            rollout.log_probs[part],
            advantages[part],
            rollout.mask[part],
            "seq-mean-token-sum-norm",
            config,
        )
        assert all(value.ndim == 0 for value in metrics.values())
        total = total + loss / 2  # gradients are averaged over two ranks
    return total


# -- trainers whose own loss stays: the token losses here are the reference's


def token_sums(rollout: Rollout, advantages: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted sum over the rollout of each response's token losses."""
    ones = torch.ones(len(rollout))
    return dl_norm.reference.policy_loss(
        rollout.log_probs.float(),
        rollout.old.float(),
        advantages,
        rollout.mask,
        ones if weights is None else weights,
        **CLIP,
    )


@run(WEIGHTED)
def unsloth_trainer(rollout: Rollout, patch: pytest.MonkeyPatch) -> Tensor:
    trainer = type("Trainer", (unsloth.DeltaLWeights, UnslothTrainer), {"alpha": ALPHA})
    weights = trainer(rollout.mask)._generate_and_score_completions(None)[unsloth.KEY]
    return token_sums(rollout, rollout.advantages, weights)


class WeightedSwiftTrainer(ms_swift.DeltaLAdvantages, SwiftTrainer):
    alpha = ALPHA


@run(WEIGHTED)
def ms_swift_trainer(rollout: Rollout, patch: pytest.MonkeyPatch) -> Tensor:
    trainer = WeightedSwiftTrainer(rollout.advantages)
    weighted = trainer._compute_advantages(None, None, swift_batches(rollout.mask))
    return token_sums(rollout, weighted) / (len(rollout) * M)


@run(WEIGHTED)
def megatron_rl_trainer(rollout: Rollout, patch: pytest.MonkeyPatch) -> Tensor:
    utils = megatron_utils(rollout.advantages)
    megatron_rl.weight_advantages(utils, alpha=ALPHA, max_length=M)
    stats = utils.compute_group_stats(
        megatron_rollouts(rollout), SimpleNamespace(pad=PAD), T + 1, {}
    )
    return token_sums(rollout, torch.tensor(stats.advantages)) / token_mean(rollout)


@run(WEIGHTED)
def open_instruct_trainer(rollout: Rollout, patch: pytest.MonkeyPatch) -> Tensor:
    masks = [
        torch.nn.functional.pad(mask.long() * (row + 1), (1, 0))  # a query token first
        for row, mask in enumerate(rollout.cut(rollout.mask))
    ]
    packed = SimpleNamespace(response_masks=[torch.cat(masks[:2]), *masks[2:]])
    weighted = open_instruct.weight_advantages(
        rollout.advantages.numpy().astype(numpy.float64),
        packed,
        alpha=ALPHA,
        max_length=M,
        loss_denominator=7.5,
    )
    return token_sums(rollout, torch.tensor(weighted)) / 7.5


assert len(LENGTHS) == 6  # micro-batches above are cut for six rows
