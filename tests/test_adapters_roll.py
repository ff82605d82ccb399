"""ROLL: its worker and its FSDP2 strategy train with the hook."""

from __future__ import annotations

import ast
import contextlib
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from adapter_stand_ins import RollActorWorker, import_roll, roll_batch
from adapter_tools import (
    ALPHA,
    LENGTHS,
    THEIRS,
    TOLERANCE,
    Dist,
    Rollout,
    T,
    check_hook,
    lift,
    make_rollout,
    source,
)
from torch import Tensor

from dl_norm.integrations import rollout as settings_of


@pytest.fixture
def rollout() -> Rollout:
    return make_rollout()


@pytest.fixture
def roll(monkeypatch: pytest.MonkeyPatch) -> Any:
    return import_roll(monkeypatch)


@pytest.mark.parametrize(
    "changes",
    [
        {"importance_sampling": "seq"},
        {"entropy_loss_coef": 0.1},
        {"length_loss_weight": True},
        {"apply_loss_scale": False},
    ],
)
def test_refuses(rollout: Rollout, roll: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        roll.DeltaLActorWorker(**changes).train_step(roll_batch(rollout))


def test_needs_weights(rollout: Rollout, roll: Any) -> None:
    with pytest.raises(ValueError, match="delta_l_weights is missing"):
        roll.DeltaLActorWorker().loss_func(roll_batch(rollout), rollout.log_probs)


def rule(agg_type: str, low: float, high: float, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "enabled": True, "agg_type": agg_type, "ratio_enabled": True, "ratio_low": low,
            "ratio_high": high, "diff_enabled": False, "diff_low": -0.1, "diff_high": 0.1,
            **changes,
        }
    )  # fmt: skip


# (level, upper bound) of the weight, filters, other settings, why ROLL's own code runs.
CORRECTIONS: dict[str, tuple[Any, list[Any], dict[str, Any], str]] = {
    "token": (("token", 1.1), [], {}, ""),
    "token, KL": (("token", 1.1), [], {"use_kl_loss": True, "kl_loss_coef": 0.3}, ""),
    "sequence": (("sequence", 1.3), [], {}, ""),
    "geometric, no bound": (("geometric", None), [], {}, ""),
    "filters": (("token", 1.5), [rule("geometric", 0.9, 1.1), rule("token", 0.7, 1.6)], {}, ""),
    "filters alone": (
        None, [rule("sequence", 0.8, 1.5), rule("token", 2, 3, enabled=False)], {}, "",
    ),
    "nothing": (None, [], {}, ""),
    "segment": (("segment", 1.1), [], {}, "segment"),
    "segment filter": (("token", 1.1), [rule("segment", 0.9, 1.1)], {}, "segment"),
    "differences": (("token", 1.1), [rule("token", 0, 2, diff_enabled=True)], {}, "diff_enabled"),
    "filters, KL": (
        ("token", 1.1), [rule("token", 0.8, 1.2)], {"use_kl_loss": True, "kl_loss_coef": 0.3},
        "use_kl_loss",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n, parts in CORRECTIONS.items() if not parts[3]])
def test_correction_reaches_the_loss(rollout: Rollout, roll: Any, name: str) -> None:
    """Over stand-ins: the settings' RolloutCorrection, in the formula's loss of the whole batch."""
    weight, filters, changes, _ = CORRECTIONS[name]
    level, high = weight or ("token", None)
    enabled = weight is not None
    settings = SimpleNamespace(
        is_weight=SimpleNamespace(enabled=enabled, weight_type=level, upper_bound=high),
        filters=filters,
    )
    worker = type("Worker", (roll.DeltaLActorWorker,), {"alpha": ALPHA})(
        enable_old_logprobs_recompute=False, train_infer_correction=settings, **changes
    )
    data = roll_batch(rollout)
    noise = 0.2 * torch.randn(rollout.old.shape, generator=torch.Generator().manual_seed(3))
    reference = rollout.old - noise
    data.batch |= {"infer_logprobs": rollout.old + noise, "ref_log_probs": reference}
    data.batch[roll.SEQUENCE_WEIGHTS] = worker._weights(rollout.mask)
    data.meta_info = {"batch_num_tokens": {"response_mask": rollout.mask.sum()}}
    loss, metrics = worker.loss_func(data, rollout.log_probs)
    correction = settings_of.roll(settings)
    options: dict[str, Any] = {"log_ratio_clamp": None}
    if correction is not None:
        options |= {"rollout_log_probs": rollout.old + noise, "rollout_correction": correction}
        assert "actor/train_infer_final_mask_mean" in metrics
    if changes:
        options |= {"ref_log_probs": reference, "beta": changes["kl_loss_coef"]}
    rollout.check(loss, **options)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_correction(
    rollout: Rollout,
    name: str,
    impl: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """ROLL's own loss, whose weights are eager, and ours: value, gradient, names of metrics."""
    weight, filters, changes, reason = CORRECTIONS[name]
    functionals = lift(
        "ROLL/roll/utils/functionals.py", "masked_mean", "masked_sum", "agg_loss",
        "compute_approx_kl", Optional=None,
    )  # fmt: skip
    segments = lift("ROLL/roll/pipeline/agentic/utils.py", "compute_segment_masked_mean")
    corrections = lift(
        "ROLL/roll/utils/train_infer_corrections.py", "_compute_all_granularity",
        "_infer_global_valid_samples_from_mask", "_infer_global_valid_tokens_from_mask",
        "compute_train_infer_correction", **vars(functionals), **vars(segments), Dict=dict,
    )  # fmt: skip
    own_code = corrections.compute_train_infer_correction
    ran: list[str] = []

    def compute(**arguments: Any) -> Any:
        ran.append(name)
        return own_code(**arguments)

    own = lift(
        "ROLL/roll/pipeline/rlvr/actor_worker.py", "ActorWorker.loss_func",
        "ActorWorker.compute_sample_weights", **vars(functionals),
        compute_train_infer_correction=own_code,
    )  # fmt: skip
    roll = import_roll(monkeypatch)
    monkeypatch.setattr(roll, "compute_train_infer_correction", compute)
    roll._say.cache_clear()
    level, high = weight or ("token", None)
    settings = {
        "enable_old_logprobs_recompute": False, "loss_agg_mode": "seq-mean-token-sum",
        "train_infer_correction": SimpleNamespace(
            is_weight=SimpleNamespace(
                enabled=weight is not None, weight_type=level, upper_bound=high, detach=True
            ),
            filters=filters,
        ),
        **changes,
    }  # fmt: skip
    worker = type("Worker", (roll.DeltaLActorWorker,), {"options": {"impl": impl}})(**settings)
    worker.compute_sample_weights = own.compute_sample_weights.__get__(worker)
    data = roll_batch(rollout)
    data.non_tensor_batch = {}
    random = torch.Generator().manual_seed(3)
    gap = torch.tensor([0.0, 0.15, 0.0, -0.3, 0.01, 0.06])[:, None]
    noise = 0.2 * torch.randn(rollout.old.shape, generator=random)
    data.batch["infer_logprobs"] = rollout.old + gap + noise
    data.batch["ref_log_probs"] = rollout.old - noise
    data.batch["response_mask"] = data.batch["response_mask"].long()
    data.batch[roll.SEQUENCE_WEIGHTS] = torch.full((len(LENGTHS),), 1 / 5)
    counts = {"response_mask": rollout.mask.sum()}
    data.meta_info = {
        "batch_num_tokens": dict(counts),
        "global_valid_samples": {"response_mask": 5},
    }
    theirs, reported = own.loss_func(worker, data, rollout.log_probs)
    (expected,) = torch.autograd.grad(theirs, rollout.log_probs)
    data.meta_info["batch_num_tokens"] = dict(counts)
    with caplog.at_level("WARNING"):
        loss, metrics = worker.loss_func(data, rollout.log_probs)
    (gradient,) = torch.autograd.grad(loss, rollout.log_probs)
    torch.testing.assert_close(loss, theirs, **THEIRS)
    torch.testing.assert_close(gradient, expected, **THEIRS)
    assert expected.abs().max() > 0.01
    assert bool(ran) == bool(reason) and (reason in caplog.text if reason else not caplog.text)
    added = {"actor/is_weight_clipfrac@sum", "actor/train_infer_final_mask_mean"}
    assert set(metrics) <= set(reported) | added
    assert ("actor/pg_loss@sum" in metrics) != bool(changes)  # with KL it is in total_loss only
    same = {"actor/total_loss@sum", "actor/pg_loss@sum"} & set(metrics)
    same |= {"actor/train_infer_final_mask_mean"} & set(reported)
    for metric in same:
        assert metrics[metric] == pytest.approx(reported[metric], rel=1e-5, abs=1e-6), metric
    if name == "token":  # ROLL's is that over padding too
        outside = (rollout.old - data.batch["infer_logprobs"]).exp() > 1.1
        expected = outside[rollout.mask].sum() / rollout.mask.sum()
        assert metrics["actor/is_weight_clipfrac@sum"] == pytest.approx(expected.item())


class RollData:
    """ROLL's DataProto as far as training takes it: a batch of tensors that iterates in parts."""

    def __init__(self, batch: dict[str, Tensor], meta_info: dict[str, Any]):
        self.batch = Batch(batch)
        self.meta_info, self.non_tensor_batch = meta_info, {}

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def make_iterator(self, mini_batch_size, epochs, seed=None, dataloader_kwargs=None):
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        order = order if (dataloader_kwargs or {}).get("shuffle") else torch.arange(len(self))
        for rows in order.split(mini_batch_size):
            part = {name: stream[rows] for name, stream in self.batch.items()}
            yield RollData(part, self.meta_info)

    def to(self, *_: Any) -> RollData:
        return self

    def prefetch(self) -> None:
        pass


class Batch(dict):
    @property
    def batch_size(self) -> tuple[int]:
        return (len(self["input_ids"]),)


def test_real(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    """ROLL's worker and its FSDP2 strategy train with the hook: two steps of three rows."""
    folder = "ROLL/roll"
    worker_source = lift(
        f"{folder}/pipeline/base_worker.py",
        "ActorWorker.train_step",
        "ActorWorker.get_old_log_probs_with_cache",
        state_offload_manger=lambda **_: contextlib.nullcontext(),
        OffloadStateType=SimpleNamespace(model_params=0, other_params=1),
        current_platform=SimpleNamespace(device_type="cpu"),
        append_to_dict=lambda metrics, new: metrics.update(new),
        reduce_metrics=None,
        tqdm=lambda iterator, **_: iterator,
        DataProto=lambda meta_info: meta_info,
        flatten_sum=sum,
    )
    strategy_source = lift(
        f"{folder}/distributed/strategy/fsdp2_strategy.py",
        "FSDP2TrainStrategy.train_step",
        append_to_dict=lambda metrics, new: metrics.update(new),
        contextlib=contextlib,
        current_platform=SimpleNamespace(device_type="cpu"),
        defaultdict=defaultdict,
        dist=Dist,
        DataProto=RollData,
        logger=None,
    )
    counts = roll_counts(folder)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda *_: 0)

    class ActorWorker:
        train_step = worker_source.train_step
        get_old_log_probs_with_cache = worker_source.get_old_log_probs_with_cache

    roll = import_roll(monkeypatch, ActorWorker)
    check_hook(roll.DeltaLActorWorker.loss_func, "roll")
    check_hook(
        lift(f"{folder}/pipeline/rlvr/actor_worker.py", "ActorWorker.loss_func").loss_func, "roll"
    )

    # The "model": one log-prob per row and position, a parameter.
    table = torch.nn.Parameter(rollout.log_probs.detach().clone())
    worker = type("Worker", (roll.DeltaLActorWorker,), {"alpha": ALPHA})()
    stub = RollActorWorker()
    worker.pipeline_config, worker.worker_config = stub.pipeline_config, stub.worker_config
    worker.pipeline_config.__dict__.update(ppo_epochs=1, seed=1, max_grad_norm=1.0)
    worker.worker_config.__dict__.update(name="actor_train", use_sequence_packing=False)
    worker.worker_name = worker.cluster_name = "actor"
    worker.logger = SimpleNamespace(info=lambda *_: None)
    worker.rank_info = SimpleNamespace(cp_size=1, dp_size=1)
    worker._logprobs_cache = {}
    gradients: list[Tensor] = []

    def step() -> None:
        gradients.append(table.grad.clone())

    strategy = SimpleNamespace(
        **vars(counts),
        worker=worker,
        worker_config=worker.worker_config,
        model=SimpleNamespace(train=lambda: None),
        reduce_scatter_during_grad_accumulation=True,
        param_dtype=torch.bfloat16,
        scaler=None,
        scheduler=SimpleNamespace(step=lambda: None, get_last_lr=lambda: [0.0]),
        optimizer=SimpleNamespace(
            step=step, zero_grad=lambda set_to_none: setattr(table, "grad", None)
        ),
        get_data_input=lambda data: data,
        _clip_grad_norm=lambda max_norm: torch.ones(()),
        _fsdp2_forward=lambda input_ids, **_: table[input_ids[:, 0]],
        op_compute_log_probs=lambda logits, input_ids, attention_mask: logits,
    )
    for name in ("_get_batch_num_tokens", "_get_global_valid_samples"):
        setattr(strategy, name, getattr(counts, name).__get__(strategy))
    strategy.train_step = strategy_source.train_step.__get__(strategy)
    worker.strategy = strategy

    batch = roll_batch(rollout).batch
    del batch["logits"]
    batch["input_ids"] = torch.arange(len(LENGTHS))[:, None].expand(-1, T + 1)
    batch["attention_mask"] = batch["position_ids"] = batch["input_ids"]
    worker.train_step(RollData(batch, {"loss_mask_keys": ["response_mask"], "forward_args": {}}))
    assert len(gradients) == 2
    _, true_gradient = rollout.true()
    torch.testing.assert_close(sum(gradients) / 2, true_gradient, **TOLERANCE)


def roll_counts(folder: str) -> SimpleNamespace:
    path = f"{folder}/distributed/strategy/strategy.py"
    tree = ast.parse(source(path).read_text())
    owner = next(
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and any(getattr(inner, "name", "") == "_get_batch_num_tokens" for inner in node.body)
    )
    names = (f"{owner}._get_batch_num_tokens", f"{owner}._get_global_valid_samples")
    return lift(path, *names, dist=Dist, IGNORE_INDEX=-100)
