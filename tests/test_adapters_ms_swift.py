"""ms-swift: its advantages, its batch post-processing and its loss, with the mixin between them."""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from adapter_runs import WeightedSwiftTrainer
from adapter_stand_ins import swift_batches
from adapter_tools import (
    ALPHA,
    CLIP,
    TOLERANCE,
    M,
    Rollout,
    check_hook,
    fake,
    forget,
    hollow,
    lift,
    make_rollout,
)

import dl_norm
from dl_norm.integrations import ms_swift

TRAINER = "swift/rlhf_trainers/grpo_trainer.py"


@pytest.fixture
def rollout() -> Rollout:
    return make_rollout()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"args": SimpleNamespace(loss_type="grpo")}, "loss_type='grpo'"),
        ({"dynamic_num_samples": True}, "dynamic_num_samples"),
        ({"use_liger_loss": True}, "use_liger_loss"),
        ({"template": SimpleNamespace(sequence_parallel_size=2)}, "sequence_parallel_size"),
    ],
)
def test_refuses(rollout: Rollout, changes: dict[str, Any], words: str) -> None:
    trainer = WeightedSwiftTrainer(rollout.advantages, **changes)
    with pytest.raises(ValueError, match=words):
        trainer._compute_advantages(None, None, swift_batches(rollout.mask))


def test_overlong_responses_do_not_count(rollout: Rollout) -> None:
    """ms-swift's loss leaves them out under overlong_filter, and divides by their rows."""
    truncated = torch.tensor([False, True, False, False, False, True])
    batches = swift_batches(rollout.mask, truncated)
    trainer = WeightedSwiftTrainer(torch.ones(6), overlong_filter=True)
    factors = trainer._compute_advantages(None, None, batches)
    lengths = rollout.lengths.masked_fill(truncated, 0)
    weights = dl_norm.sequence_weights(lengths, alpha=ALPHA, max_length=M)
    torch.testing.assert_close(factors / (6 * M), weights, **TOLERANCE)


@pytest.fixture
def swift_advantages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module swift.rl_core.advantage."""
    hollow(monkeypatch, "swift", "swift.rl_core")
    fake(monkeypatch, "swift.utils", nanstd=None)
    yield importlib.import_module("swift.rl_core.advantage")
    forget("swift")


@pytest.mark.parametrize(
    ("processes", "accumulation", "per_generation"), [(1, 1, 1), (1, 3, 3), (1, 1, 3), (2, 1, 1)]
)
def test_real(
    rollout: Rollout, swift_advantages: Any, processes: int, accumulation: int, per_generation: int
) -> None:
    """The mean of a generation batch's steps, micro-batches and processes averaged as by ms-swift.

    The advantages are ms-swift's own, of groups of two.
    """
    methods = lift(
        TRAINER,
        "WINDOW_NORMALIZED_LOSS_TYPES",
        "GRPOTrainer._compute_advantages",
        "GRPOTrainer._postprocess_batch",
        "GRPOTrainer._compute_loss_and_metrics",
        "GRPOTrainer._undo_gradient_accumulation_scaling",
        **vars(swift_advantages),
        get_even_process_data=lambda trainer, data: data[trainer.rows],
        GRPOBatch=Any,
        gather_object=lambda objects: objects,
        nanmin=torch.min,
        nanmax=torch.max,
    )
    check_hook(methods._compute_advantages, "ms-swift")
    check_hook(ms_swift.DeltaLAdvantages._compute_advantages, "ms-swift")
    lengths, rewards = rollout.lengths, torch.tensor([[1.0], [0], [0.5], [2], [-1], [1]])
    parts = torch.arange(6).chunk(processes)
    total = torch.zeros(())
    for rows in parts:
        base = type("GRPOTrainer", (), vars(methods))
        trainer: Any = type("Trainer", (ms_swift.DeltaLAdvantages, base), {"alpha": ALPHA})()
        micro_batches = rows.chunk(per_generation)
        trainer.__dict__.update(
            defaults(processes, lengths),
            rows=slice(int(rows[0]), int(rows[-1]) + 1),
            split_by_mini_batches=lambda samples, n=per_generation: [
                samples[k * len(samples) // n : (k + 1) * len(samples) // n] for k in range(n)
            ],
            _rewards_per_func=rewards,
            _get_per_token_logps_and_entropies=lambda model, inputs, batch, **_: (inputs, None),
        )
        batches = [
            {
                "grpo_batch": SimpleNamespace(
                    completion_mask=rollout.mask[micro],
                    truncated_mask=torch.zeros(len(micro), dtype=torch.bool),
                    old_per_token_logps=rollout.old[micro],
                    rollout_per_token_logps=None,
                    teacher_per_token_logps=None,
                    num_items_in_batch=lengths.sum(),
                )
            }
            for micro in micro_batches
        ]
        trainer._postprocess_batch([SimpleNamespace() for _ in rows], batches)
        for micro, batch in zip(micro_batches, batches, strict=True):
            loss, _ = trainer._compute_loss_and_metrics(
                trainer.model, rollout.log_probs[micro], batch["grpo_batch"]
            )
            total = total + loss / accumulation / processes  # transformers' Trainer, DDP
    expected, _ = swift_advantages.compute_advantages(rewards, torch.ones(1), num_generations=2)
    rollout = replace(rollout, advantages=expected)
    steps = per_generation // accumulation
    rollout.check(total / steps, dual_clip=None, delta=3.0)


def defaults(processes: int, lengths: torch.Tensor) -> dict[str, Any]:
    """A trainer with every option off but GRPO's."""
    return {
        "accelerator": SimpleNamespace(
            device="cpu",
            num_processes=processes,
            gather=lambda tensor: lengths,
            gather_for_metrics=lambda tensor: tensor,
        ),
        "args": SimpleNamespace(loss_type="dr_grpo", top_entropy_quantile=1.0, delta=3.0),
        "model": SimpleNamespace(training=True),
        "template": SimpleNamespace(sequence_parallel_size=1),
        "loss_type": "dr_grpo",
        "epsilon_low": CLIP["eps_low"],
        "epsilon_high": CLIP["eps_high"],
        "max_completion_length": M,
        "num_generations": 2,
        "reward_weights": torch.ones(1),
        "reward_func_names": ["reward"],
        "advantage_estimator": "grpo",
        "scale_rewards": "group",
        "importance_sampling_level": "token",
        "beta": 0.0,
        "advantage_reweight": None,
        "sdar_loss_coef": 0.0,
        "rollout_importance_sampling_mode": None,
        "off_policy_sequence_mask_delta": None,
        "chord_sft_iterator": None,
        "_metrics": {"train": defaultdict(list)},
        "_logs": {"advantages": [], "rewards": defaultdict(list)},
        **dict.fromkeys(
            (
                "dynamic_num_samples",
                "use_liger_loss",
                "overlong_filter",
                "kl_in_reward",
                "compute_entropy",
                "use_teacher_api",
                "_has_teacher",
                "log_rollout_offpolicy_metrics",
                "disable_rollout_importance_sampling",
            ),
            False,
        ),
    }
