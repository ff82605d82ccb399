"""Megatron-RL: its group statistics, trajectories, loss and division, with weighted advantages."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from adapter_stand_ins import PAD, megatron_rollouts, megatron_utils
from adapter_tools import ALPHA, CLIP, M, Rollout, T, check_hook, fake, lift, make_rollout
from torch import Tensor

import dl_norm
from dl_norm.integrations import megatron_rl

UTILS = "Megatron-LM/megatron/rl/rl_utils.py"
SCHEDULES = "Megatron-LM/megatron/core/pipeline_parallel/schedules.py"
PACKING = "Megatron-LM/megatron/rl/sequence_packing_utils.py"
EOD = 2
TOKENIZER = SimpleNamespace(
    library="none", pad=PAD, bos=None, eod=EOD, vocab_size=9, detokenize=lambda tokens: ""
)


@pytest.fixture
def rollout() -> Rollout:
    return make_rollout()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calculate_per_token_loss": False}, "calculate-per-token-loss"),
        ({"global_batch_size": 3}, "set it to 6"),
    ],
)
def test_refuses(rollout: Rollout, changes: dict[str, Any], words: str) -> None:
    utils = megatron_utils(rollout.advantages, **changes)
    megatron_rl.weight_advantages(utils, alpha=ALPHA, max_length=M)
    with pytest.raises(ValueError, match=words):
        utils.compute_group_stats(megatron_rollouts(rollout), TOKENIZER, T + 1, {})


def test_needs_the_generated_tokens(rollout: Rollout) -> None:
    utils = megatron_utils(rollout.advantages)
    megatron_rl.weight_advantages(utils, alpha=ALPHA, max_length=M)
    groups = megatron_rollouts(rollout)
    groups[0][0].generation_mask = None
    with pytest.raises(ValueError, match="generation_mask"):
        utils.compute_group_stats(groups, TOKENIZER, T + 1, {})


# -- Megatron's own code


class TokenRollout(SimpleNamespace):
    """Megatron's class of that name without pydantic."""

    def __init__(self, **given: Any):
        super().__init__(
            **{
                "reward": 0.0, "logprobs": None, "env_id": "env", "completion_ids": [],
                "rollout_status": "ok", "failure_reason": None, "generation_cap": None, **given,
            }
        )  # fmt: skip


def real_utils(**changes: Any) -> SimpleNamespace:
    names = (
        "RolloutStats",
        "calculate_grpo_advantages",
        "compute_group_stats",
        "_to_list",
        "_is_collapsible_rollout",
        "prepare_trajectories",
        "calculate_grpo_loss",
    )
    module = lift(
        UTILS,
        *names,
        keep=("RolloutStats",),
        dataclass=dataclass,
        np=numpy,
        Counter=Counter,
        logging=logging,
        logger=logging.getLogger("megatron"),
        log_single_rank=lambda *args: None,
        lang_rl_log=lambda text: None,
        single_turn_termination_ok=lambda *args: True,
        TokenRollout=TokenRollout,
    )
    module.get_args = megatron_utils(torch.zeros(0), **changes).get_args
    return module


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_real(rollout: Rollout, micro_batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in micro-batches, padding rows among them, divided by Megatron's count of tokens."""
    utils = real_utils()
    check_hook(utils.compute_group_stats, "megatron")
    rewards = [1.0, 0.0, 0.5, 2.0, -1.0, 1.0]
    rollouts = [
        TokenRollout(
            trajectory=[[7, *[3] * len(mask)]],
            generation_mask=[[False, *mask.tolist()]],
            logprobs=[[0.0] * int(mask.sum())],
            reward=reward,
        )
        for mask, reward in zip(rollout.cut(rollout.mask), rewards, strict=True)
    ]
    groups = [rollouts[start : start + 2] for start in (0, 2, 4)]
    plain = utils.compute_group_stats(groups, TOKENIZER, T + 1, {}).advantages
    rollout = replace(rollout, advantages=torch.tensor(plain, dtype=torch.float32))
    megatron_rl.weight_advantages(utils, alpha=ALPHA, max_length=M)
    check_hook(utils.compute_group_stats, "megatron")
    weighted = utils.compute_group_stats(groups, TOKENIZER, T + 1, {}).advantages

    padding = -len(rollouts) % micro_batch_size
    rows = [*rollouts, *[None] * padding]
    advantages = torch.tensor([*weighted, *[0.0] * padding])
    tokens, generated, _ = utils.prepare_trajectories(rows, TOKENIZER, T + 1, True)
    loss_mask = (generated & (tokens != PAD))[:, 1:].float()
    streams = [
        torch.nn.functional.pad(stream, (0, 0, 0, padding))
        for stream in (rollout.log_probs, rollout.old)
    ]

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    loss_func = lift(
        "Megatron-LM/train_rl.py",
        "loss_func",
        get_args=lambda: SimpleNamespace(
            check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=False
        ),
        get_rerun_state_machine=lambda: None,
    ).loss_func
    fake(monkeypatch, "megatron.core.transformer.multi_token_prediction", MTPLossAutoScaler=None)
    divide = lift(
        SCHEDULES,
        "forward_step_calc_loss",
        _get_experimental_attention_variant_loss_scale_func=lambda config: None,
    ).forward_step_calc_loss
    config = SimpleNamespace(calculate_per_token_loss=True, timers=None)
    total, count = torch.zeros(()), torch.zeros((), dtype=torch.int)
    for part in torch.arange(len(rows)).split(micro_batch_size):
        new, old = (stream[part] for stream in streams)
        losses, *more = utils.calculate_grpo_loss(
            new, old, torch.zeros_like(old), advantages[part], CLIP["eps_low"], CLIP["eps_high"],
            kl_beta=0.0, entropy_weight=0.0,
        )  # fmt: skip
        loss, tokens_of_part = divide(
            None, losses, partial(loss_func, loss_mask[part], *more), config, None, False, 2, [],
            cp_group_size=1, is_last_stage=True,
        )  # fmt: skip
        total, count = total + loss, count + tokens_of_part
    empty = sum(
        not loss_mask[part].any() for part in torch.arange(len(rows)).split(micro_batch_size)
    )
    tokens = int(loss_mask.sum())
    assert count == tokens + empty  # the limit that the adapter's text names
    rollout.check(total / count * (count / tokens), dual_clip=None)


@pytest.mark.parametrize("packed", [False, True])
def test_counts_what_the_loss_counts(packed: bool) -> None:
    """Of one turn, of several that collapse into a row, and of several that do not."""
    utils = real_utils(rl_use_sequence_packing=packed)
    first, both = [5, 6, 3, 4, EOD], [5, 6, 3, 4, EOD, 8, 8, 3, EOD]
    turn, second = [0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1, 1]
    kinds = {
        "one turn": ([first], [turn]),
        "collapsible": ([first, both], [turn, second]),
        "not": ([first, [1, *both]], [turn, [0, *second]]),
        "the padding token ends a text": ([[5, 3, PAD, 4, PAD]], [[0, 1, 1, 1, 1]]),
        "the first token is generated": ([[3, 4]], [[1, 1]]),
        "nothing generated": ([[5, 6]], [[0, 0]]),
    }
    for kind, (trajectory, mask) in kinds.items():
        given = TokenRollout(
            trajectory=trajectory,
            generation_mask=[[bool(m) for m in row] for row in mask],
            logprobs=[[0.0] * sum(row) for row in mask],
        )
        collapses = utils._is_collapsible_rollout(given)
        rows = [given] if collapses else [(given, turn) for turn in range(len(trajectory))]
        tokens, generated, _ = utils.prepare_trajectories(rows, TOKENIZER, 12, True)
        counted = int(loss_mask(tokens, generated, packed).sum())
        ours = sum(
            megatron_rl._counted(*row, PAD, packed) for row in megatron_rl._rows(utils, given)
        )
        assert ours == counted, (kind, ours, counted)


def loss_mask(tokens: Tensor, generated: Tensor, packed: bool) -> Tensor:
    """As Megatron has it with packed rows, and without."""
    if not packed:
        return (generated & (tokens != PAD))[:, 1:]
    actual = lift(PACKING, "get_actual_sequence_lengths").get_actual_sequence_lengths
    ends = torch.tensor(actual(tokens, PAD))
    return (generated & (torch.arange(tokens.shape[1]) < ends[:, None]))[:, 1:]


def test_bad_settings_raise_at_once() -> None:
    for bad in ({"alpha": -1.0, "max_length": M}, {"max_length": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            megatron_rl.weight_advantages(SimpleNamespace(), **bad)
    assert dl_norm  # the weights' own checks
