"""What the pages' blocks for trainers find defined, and what must have come of them.

A namespace runs over stand-ins for its trainer (TRL's over TRL itself), and ends in the loss of the
whole batch that the block sets up.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

sys.path.append(str(Path(__file__).parent))

import adapter_stand_ins as stand_ins
from adapter_tools import fake

import dl_norm

Namespace = Iterator[dict[str, Any]]
NAMESPACES: dict[str, Callable[..., Namespace]] = {}


def namespace(function: Callable[..., Namespace]) -> Callable[..., Namespace]:
    """Yields what the blocks find defined, then looks at what they made of it."""
    NAMESPACES[function.__name__.replace("_", "-")] = function
    return function


def tiny_batch() -> dict[str, Any]:
    mask = torch.arange(8) < torch.tensor([3, 8, 1, 5])[:, None]
    log_probs = -torch.rand(4, 8)
    return {
        "dl_norm": dl_norm,
        "torch": torch,
        "old": log_probs.clone(),
        "old_log_probs": log_probs.clone(),
        "log_probs": log_probs.requires_grad_(),
        "adv": torch.randn(4),
        "mask": mask,
        "weights": dl_norm.sequence_weights(mask.sum(-1), max_length=3072),
    }


def whole_batch(batch: dict[str, Any], max_length: int = 3072) -> torch.Tensor:
    """The DeltaL loss that the adapters' snippets set up."""
    weights = dl_norm.sequence_weights(batch["mask"].sum(-1), alpha=0.75, max_length=max_length)
    log_probs = batch["log_probs"].detach()
    return dl_norm.policy_loss(log_probs, batch["old"], batch["adv"], batch["mask"], weights)


def named(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@namespace
def trl(patch: pytest.MonkeyPatch) -> Namespace:
    """One step of every trainer, of a tiny model on the CPU; M is the 3072 of the snippets."""
    pytest.importorskip("trl")
    tiny = sys.modules.get("trl_tiny") or importlib.import_module("trl_tiny")
    from dl_norm.integrations import trl as integration

    config, trainer = integration.DeltaLGRPOConfig, integration.DeltaLGRPOTrainer
    small = {
        "per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 1, "use_cpu": True,
        "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1, "gradient_checkpointing": False,
    }  # fmt: skip
    runs: list[Any] = []
    calls: dict[str, list[Any]] = {"policy_loss": [], "linear_policy_loss": []}
    make_config, make_trainer, train = config.__init__, trainer.__init__, trainer.train

    def fused(*args: Any, **given: Any) -> Any:
        calls["linear_policy_loss"].append(given["weights"])
        return linear_policy_loss(*args, **given)

    def plain(*args: Any, **given: Any) -> Any:
        calls["policy_loss"].append(given["weights"])
        return original(*args, **given)

    def remember(self: Any) -> None:
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for seen in calls.values():
            seen.clear()
        train(self)
        moved = any((p != before[name]).any() for name, p in self.model.named_parameters())
        weights = {name: list(seen) for name, seen in calls.items() if seen}
        runs.append((self.args, self.state.log_history[0]["loss"], moved, weights))

    original, linear_policy_loss = dl_norm.policy_loss, dl_norm.linear_policy_loss
    patch.setattr(dl_norm, "policy_loss", plain)
    patch.setattr(dl_norm, "linear_policy_loss", fused)
    patch.setattr(config, "__init__", lambda self, **o: make_config(self, **small, **o))
    patch.setattr(trainer, "train", remember)
    with tempfile.TemporaryDirectory() as folder, tiny.quiet(), tiny.one_thread():
        patch.chdir(folder)
        model = tiny.save_model(Path(folder) / "model")
        # Nothing to generate with, and a tokenizer that goes by another name than the model.
        tokenizer = tiny.PreTrainedTokenizerFast.from_pretrained(model)
        given = {"rollout_func": tiny.fixed_rollouts, "processing_class": tokenizer}
        patch.setattr(trainer, "__init__", functools.partialmethod(make_trainer, **given))
        space = {"model": model, "reward": tiny.reward, "data": tiny.prompts(8)}
        yield space
    if "VarianceMonitorCallback" in space:
        callbacks = space["trainer"].callback_handler.callbacks
        assert any(type(callback).__name__ == "VarianceMonitorCallback" for callback in callbacks)
    assert [args.fused_lm_head for args, *_ in runs] == [
        space["page"].startswith("dl_norm/integrations")
    ]
    for args, loss, moved, weights in runs:
        assert math.isfinite(loss) and loss != 0 and moved
        assert args.alpha == 0.75 and args.aggregation == "delta_l"
        # The loss that ran, once, with weights that add up to 1/M.
        ((name, (used,)),) = weights.items()
        assert name == ("linear_policy_loss" if args.fused_lm_head else "policy_loss")
        assert used.sum().item() == pytest.approx(1 / 3072)


@namespace
def skyrl(patch: pytest.MonkeyPatch) -> Namespace:
    registry: dict[str, Any] = {}
    fake(
        patch,
        "skyrl.backends.skyrl_train.utils.ppo_utils",
        PolicyLossRegistry=SimpleNamespace(register=registry.__setitem__),
    )
    fake(patch, "skyrl.train.trainer", RayPPOTrainer=stand_ins.SkyRLTrainer)
    fake(patch, "skyrl.train.entrypoints.main_base", BasePPOExp=object)
    space: dict[str, Any] = {}
    yield space
    settings = dict(word.split("=") for word in space["blocks"][0])
    names = {name.rpartition(".")[2]: value for name, value in settings.items()}
    assert names["policy_loss_type"] in registry
    config = stand_ins.skyrl_config(**names | {"max_seq_len": int(names["max_seq_len"])})
    trainer = space["Experiment"]().get_trainer(config)
    batch = tiny_batch()
    data = {"advantages": batch["adv"][:, None].expand(4, 8), "loss_mask": batch["mask"]}
    data = trainer._normalize_advantages(data, [(0, 4)])
    loss, _ = registry[names["policy_loss_type"]](
        batch["log_probs"], batch["old"], data["advantages"], config, batch["mask"]
    )
    assert loss.isclose(whole_batch(batch), rtol=1e-5)


@namespace
def prime_rl(patch: pytest.MonkeyPatch) -> Namespace:
    fake(patch, "prime_rl.trainer.rl.loss", LossOutputs=SimpleNamespace)
    batch = tiny_batch()
    samples = [
        SimpleNamespace(mask=row.tolist(), advantages=[a] * 8, rl_weights=None)
        for row, a in zip(batch["mask"], batch["adv"].tolist(), strict=True)
    ]
    sink = SimpleNamespace(process_batch=lambda: SimpleNamespace(samples=samples))
    space: dict[str, Any] = {"sink": sink}
    yield space
    config = space["blocks"][0]["trainer"]["loss"]
    assert config["type"] == "custom"
    hook = named(config["import_path"])
    losses = [
        hook(
            SimpleNamespace(
                trainer_logprobs=batch["log_probs"][row],
                inference_logprobs=batch["old"][row],
                advantages=torch.tensor(sample.advantages),
                loss_mask=batch["mask"][row],
                loss_weights=None,
            ),
            **config["kwargs"],
        ).loss
        for row, sample in enumerate(space["batch"].samples)
    ]
    loss = torch.stack(losses).sum() / batch["mask"].sum()
    assert loss.isclose(whole_batch(batch), rtol=1e-5)


@namespace
def slime(patch: pytest.MonkeyPatch) -> Namespace:
    mpu = SimpleNamespace(get_data_parallel_group=lambda: None)
    fake(patch, "megatron.core", mpu=mpu)
    space: dict[str, Any] = {}
    yield space
    reducer, config, loss = space["blocks"]
    options = dict(zip(reducer[::2], reducer[1::2], strict=True))
    options |= dict(zip(loss[::2], loss[1::2], strict=True))
    del options["--custom-config-path"]
    hooks = {name: named(path) for name, path in options.items() if name.startswith("--custom")}
    assert options["--loss-type"] == "custom_loss" and len(hooks) == 3

    batch, lengths = tiny_batch(), [8] * 4
    data = {
        "rewards": batch["adv"].tolist(),
        "response_lengths": lengths,
        "loss_masks": list(batch["mask"].int()),
        "kl": list(torch.zeros(4, 8)),
    }
    args = SimpleNamespace(calculate_per_token_loss=False, **config)
    hooks["--custom-advantage-function-path"](args, data)
    reduce = hooks["--custom-pg-loss-reducer-function-path"](lengths, lengths, data["loss_masks"])
    # At ratio 1 the token loss is -A.
    assert (reduce(-torch.cat(data["advantages"])) / 4).isclose(whole_batch(batch), rtol=1e-5)


@namespace
def nemo_rl(patch: pytest.MonkeyPatch) -> Namespace:
    stand_ins.fake_nemo_rl(patch)
    created = SimpleNamespace(
        compute_advantage=lambda prompt_ids, rewards, mask: rewards[:, None].expand(mask.shape)
    )
    grpo = ModuleType("nemo_rl.algorithms.grpo")
    patch.setattr(grpo, "_create_advantage_estimator", lambda config: created, raising=False)
    patch.setitem(sys.modules, grpo.__name__, grpo)
    patch.setattr(sys.modules["nemo_rl.algorithms"], "grpo", grpo, raising=False)
    space = {"master_config": SimpleNamespace(loss_fn={"reference_policy_kl_penalty": 0.0})}
    yield space
    batch = tiny_batch()
    token_mask = torch.nn.functional.pad(batch["mask"].int(), (1, 0))
    old = torch.nn.functional.pad(batch["old"], (1, 0))
    estimator = grpo._create_advantage_estimator(space["master_config"])
    data = {
        "token_mask": token_mask,
        "sample_mask": torch.ones(4),
        "advantages": estimator.compute_advantage(None, batch["adv"], token_mask),
        "prev_logprobs": old,
        "generation_logprobs": old,
    }
    loss, _ = space["loss_fn"](batch["log_probs"], data, torch.tensor(4.0), batch["mask"].sum())
    assert loss.isclose(whole_batch(batch), rtol=1e-5)


@namespace
def roll(patch: pytest.MonkeyPatch) -> Namespace:
    stand_ins.import_roll(patch)
    space: dict[str, Any] = {}
    yield space
    worker = space["MyActorWorker"]
    (config,) = space["blocks"]
    assert config["actor_train"]["worker_cls"] == f"my_worker.{worker.__name__}"
    batch = tiny_batch()
    weights = dl_norm.sequence_weights(batch["mask"].sum(-1), alpha=0.75, max_length=3072)
    assert torch.equal(worker()._weights(batch["mask"]), weights)


@namespace
def torchtitan(patch: pytest.MonkeyPatch) -> Namespace:
    adapter = stand_ins.import_torchtitan(patch)
    package = "torchtitan.experiments.rl.examples.dapo_math.config_registry"

    def dapo() -> SimpleNamespace:
        loop = SimpleNamespace(batcher=stand_ins.TitanBatcher.Config())
        return SimpleNamespace(
            async_loop=loop, trainer=SimpleNamespace(loss=SimpleNamespace(loss_fn=None))
        )

    fake(patch, package, rl_dapo_qwen3_4b_math_8k=dapo)
    space: dict[str, Any] = {}
    yield space
    config = space["config"]
    batch = tiny_batch()
    samples = [
        SimpleNamespace(loss_mask=[False, *m], logprobs=[0.0] * 9, advantage=[a] * 9)
        for m, a in zip(batch["mask"].tolist(), batch["adv"].tolist(), strict=True)
    ]
    batcher = adapter.DeltaLBatcher(config.async_loop.batcher, samples=samples)
    samples, *_ = batcher._take_groups()
    loss, _ = adapter.DeltaLLoss(config.trainer.loss.loss_fn)(
        batch["log_probs"],
        None,
        batch["mask"].sum(),
        generator_logprobs=batch["old"],
        advantages=torch.tensor([sample.advantage[1:] for sample in samples]),
        loss_mask=batch["mask"],
    )
    assert loss.isclose(whole_batch(batch, max_length=8192), rtol=1e-5)


@namespace
def unsloth(patch: pytest.MonkeyPatch) -> Namespace:
    fake(patch, "unsloth", FastLanguageModel=None)
    fake(patch, "trl", GRPOConfig=None, GRPOTrainer=stand_ins.UnslothTrainer)
    space: dict[str, Any] = {}
    yield space
    batch = tiny_batch()
    trainer = space["Trainer"](batch["mask"])
    trainer.args.max_completion_length = 3072
    weights = trainer._generate_and_score_completions(None)["unsloth_sample_weight"]
    # At ratio 1 the token loss is -A.
    loss = -(weights[:, None] * batch["adv"][:, None] * batch["mask"]).sum()
    assert loss.isclose(whole_batch(batch), rtol=1e-5)


@namespace
def ms_swift(patch: pytest.MonkeyPatch) -> Namespace:
    mapping: dict[str, str] = {}
    fake(patch, "swift.trainers", TrainerFactory=SimpleNamespace(TRAINER_MAPPING=mapping))
    fake(patch, "swift.rlhf_trainers", GRPOTrainer=stand_ins.SwiftTrainer)
    space: dict[str, Any] = {}
    yield space
    assert mapping == {"grpo": "readme.Trainer"}
    words = space["blocks"][0]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options["--external_plugins"] == "delta_l.py" and options["--rlhf_type"] == "grpo"
    batch = tiny_batch()
    trainer = space["Trainer"](batch["adv"])
    trainer.args.loss_type = options["--loss_type"]
    weighted = trainer._compute_advantages(None, None, stand_ins.swift_batches(batch["mask"]))
    rows_times_m = len(batch["adv"]) * int(options["--max_completion_length"])
    loss = -(weighted[:, None] * batch["mask"]).sum() / rows_times_m
    assert loss.isclose(whole_batch(batch), rtol=1e-5)


@namespace
def miles(patch: pytest.MonkeyPatch) -> Namespace:
    stand_ins.fake_miles(patch)
    space: dict[str, Any] = {}
    yield space
    reducer, config, loss = space["blocks"]
    options = dict(zip(reducer[::2], reducer[1::2], strict=True))
    options |= dict(zip(loss[::2], loss[1::2], strict=True))
    del options["--custom-config-path"]
    hooks = {name: named(path) for name, path in options.items() if name.startswith("--custom")}
    assert options["--loss-type"] == "custom_loss" and len(hooks) == 3
    batch, lengths = tiny_batch(), [8] * 4
    samples = [
        SimpleNamespace(index=i, rollout_id=None, reward=a, loss_mask=m, remove_sample=False)
        for i, (a, m) in enumerate(zip(batch["adv"].tolist(), batch["mask"].tolist(), strict=True))
    ]
    args = stand_ins.slime_args(**config)
    _, weighted = hooks["--custom-reward-post-process-path"](args, samples)
    masks = list(batch["mask"].int())
    reduce = hooks["--custom-pg-loss-reducer-function-path"](lengths, lengths, masks)
    tokens = -torch.tensor(weighted).repeat_interleave(8)
    assert (reduce(tokens) / 4).isclose(whole_batch(batch), rtol=1e-5)


@namespace
def megatron_rl(patch: pytest.MonkeyPatch) -> Namespace:
    batch = tiny_batch()
    changes = {"grpo_prompts_per_step": 2, "global_batch_size": 4}
    utils = stand_ins.megatron_utils(batch["adv"], **changes)
    fake(patch, "megatron.rl", rl_utils=utils)
    yield {}
    rollouts = [
        SimpleNamespace(trajectory=[[7, *[1] * 8]], generation_mask=[[False, *mask]])
        for mask in batch["mask"].tolist()
    ]
    stats = utils.compute_group_stats([rollouts], SimpleNamespace(pad=stand_ins.PAD), 9, {})
    tokens = torch.tensor(stats.advantages)[:, None] * batch["mask"]
    assert (-tokens.sum() / batch["mask"].sum()).isclose(whole_batch(batch), rtol=1e-5)


@namespace
def open_instruct(_) -> Namespace:
    batch = tiny_batch()
    ids = batch["mask"].long() * torch.arange(1, 5)[:, None]
    masks = torch.nn.functional.pad(ids, (1, 0))  # a query token first
    space = {
        "advantages": batch["adv"].numpy().astype(numpy.float64),
        "packed_sequences": SimpleNamespace(response_masks=list(masks)),
    }
    yield space
    loss = -(torch.tensor(space["advantages"])[:, None] * batch["mask"]).sum() / (128 * 3072)
    assert loss.float().isclose(whole_batch(batch), rtol=1e-5)


@namespace
def areal(_) -> Namespace:
    batch = tiny_batch()
    mb = {
        "loss_mask": batch["mask"],
        "logprobs": batch["old"],
        "advantages": batch["adv"][:, None].expand(4, 8),
    }
    losses = []

    def train_batch(mb: Any, loss_fn: Any, loss_weight_fn: Any) -> None:
        weight = loss_weight_fn(mb)
        losses.append(loss_fn(batch["log_probs"], batch["old"], mb) * weight / weight)

    yield {
        "engine": SimpleNamespace(train_batch=train_batch),
        "mb_inputs": SimpleNamespace(mbs=[mb]),
        "stats_tracker": stand_ins.StatsTracker(),
    }
    assert losses[0].isclose(whole_batch(batch), rtol=1e-5)


@namespace
def no_hook(_) -> Namespace:
    batch = tiny_batch()
    space = {
        "dl_norm": dl_norm,
        "action_mask": batch["mask"],
        "advantages": batch["adv"],
        "max_length": 3072,
    }
    yield space
    # A trainer's token mean, at ratio 1.
    loss = -(space["advantages"][:, None] * batch["mask"]).sum() / batch["mask"].sum()
    assert loss.isclose(whole_batch(batch), rtol=1e-5)
