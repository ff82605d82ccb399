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
