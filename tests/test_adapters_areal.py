"""AReaL 1.0: its packing, loss weights and scaling around the hook."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from adapter_runs import areal_batches
from adapter_tools import (
    ALPHA,
    CLIP,
    LENGTHS,
    THEIRS,
    Dist,
    Lenient,
    M,
    Rollout,
    T,
    calls,
    lift,
    make_rollout,
)

import dl_norm
from dl_norm.integrations import areal
from dl_norm.integrations import rollout as settings_of


@pytest.fixture
def rollout() -> Rollout:
    return make_rollout()


def test_needs_offsets(rollout: Rollout) -> None:
    log_probs, data = areal_batches(rollout)[0]
    del data["cu_seqlens"]
    hook = areal.DeltaLLoss(max_length=M)
    with pytest.raises(ValueError, match="cu_seqlens"):
        hook(log_probs, log_probs, data)
    with pytest.raises(ValueError, match="cu_seqlens"):
        hook.weight(data)


@pytest.mark.parametrize("options", [{"max_length": 0}, {"max_length": 9, "eps_low": 2.0}])
def test_bad_options_raise_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        areal.DeltaLLoss(**options)


def test_real(rollout: Rollout) -> None:
    """AReaL's packing, loss weights and loss scaling around the hook."""
    data_utils = lift("areal/utils/data.py", "pack_tensor_dict", F=torch.nn.functional, Any=Any)
    total = lift("areal/engine/core/train_engine.py", "compute_total_loss_weight", dist=Dist)
    engine = lift(
        "areal/engine/fsdp_engine.py",
        "FSDPEngine._compute_logprobs_and_loss",
    )
    hook = areal.DeltaLLoss(alpha=ALPHA, max_length=M, **CLIP)
    micro_batches = [
        data_utils.pack_tensor_dict(
            {
                "attention_mask": torch.arange(T) < torch.tensor(LENGTHS)[rows, None],
                "logprobs": rollout.old[rows],
                "advantages": rollout.advantages[rows, None].expand(-1, T),
                "loss_mask": rollout.mask[rows],
                "new": rollout.log_probs[rows],
            }
        )
        for rows in ([0, 1, 2], [3, 4, 5])
    ]
    weight = total.compute_total_loss_weight(
        SimpleNamespace(mbs=micro_batches), hook.weight, dp_group=None
    )
    this = SimpleNamespace(
        config=SimpleNamespace(is_critic=False, temperature=1.0),
        enable_tree_training=False,
        _compute_logprobs_entropy=lambda logits, inputs, pad: (logits, torch.zeros_like(logits)),
        _get_vocab_min_max_logits=lambda logits, pad: (logits, logits),
    )
    padding = 3  # at the end of a packed micro-batch; the engine cuts it off
    losses = [
        engine._compute_logprobs_and_loss(
            this,
            torch.nn.functional.pad(mb["new"], (0, padding)),
            SimpleNamespace(mb_input=mb, model_inputs=mb, pad_length=padding, ulysses_pad_size=0),
            hook,
            hook.weight,
            weight,
            loss_multiplier=2.0,  # two data-parallel ranks, whose gradients are averaged
        )
        for mb in micro_batches
    ]
    rollout.check(torch.stack(losses).sum() / 2)


class Stats:
    """What of AReaL's stats_tracker the loss calls."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def denominator(self, **masks: torch.Tensor) -> None:
        self.seen |= masks

    def stat(self, *, denominator: str, **values: torch.Tensor) -> None:
        assert denominator in self.seen
        assert all(v.shape == self.seen[denominator].shape for v in values.values())
        self.seen |= values


# As AReaL's RejectionSamplingConfig has them.
CORRECTIONS = {
    "token": {"level": "token", "action": "mask", "metric": "ratio", "upper": 1.3, "lower": 0.7},
    "clamp": {"level": "token", "action": "clamp", "metric": "ratio", "upper": 1.2, "lower": 0.0},
    "sequence": {"level": "sequence", "action": "mask", "metric": "ratio", "agg": "mean",
                 "upper": 1.06, "lower": 0.85},
}  # fmt: skip


@pytest.mark.parametrize("name", CORRECTIONS)
def test_decoupled_loss(rollout: Rollout, name: str) -> None:
    """AReaL's own decoupled loss of a micro-batch, by its share: with alpha = 0 every sequence
    weighs 1 / (G M), where AReaL divides by the tokens."""
    settings = Lenient(**CORRECTIONS[name])
    functions = lift(
        "areal/utils/functional/functional.py", "RejectionSamplingResult", "_check_bounds",
        "apply_rejection_sampling", "ppo_actor_loss_fn", keep=("RejectionSamplingResult",),
        dataclass=dataclass,
    )  # fmt: skip
    stats = Stats()
    hook = areal.DeltaLLoss(
        alpha=0.0, max_length=M, stats=stats, rejection_sampling=settings, eps_low=0.2,
        eps_high=0.3, dual_clip=3.0,
    )  # fmt: skip
    random = torch.Generator().manual_seed(8)
    log_probs, data = areal_batches(rollout)[0]
    behind = data["logprobs"]
    data["prox_logp"], data["logprobs"] = behind, behind + 0.2 * torch.randn(
        behind.shape, generator=random
    )  # fmt: skip
    loss = hook(log_probs, torch.zeros_like(log_probs), data)
    mask = data["loss_mask"].bool()
    theirs, stat = functions.ppo_actor_loss_fn(
        logprobs=log_probs, proximal_logprobs=data["prox_logp"], old_logprobs=data["logprobs"],
        advantages=data["advantages"], eps_clip=0.2, eps_clip_higher=0.3, c_clip=3.0,
        loss_mask=mask, rejection_sampling=settings, cu_seqlens=data["cu_seqlens"],
    )  # fmt: skip
    assert 0 < stat["filtered_fraction"] < 1
    lengths = dl_norm.sequence_lengths(mask, data["cu_seqlens"])
    share = lengths.sum() / ((lengths > 0).sum() * M)
    torch.testing.assert_close(loss, theirs * share, **THEIRS)
    ours, wanted = (torch.autograd.grad(x, log_probs)[0] for x in (loss, theirs * share))
    torch.testing.assert_close(ours, wanted, **THEIRS)
    kept = stat["behave_mask"]
    assert torch.equal(stats.seen["unclipped_behave_tokens"], kept)
    for name in ("behave_imp_weight", "behave_approx_kl"):
        torch.testing.assert_close(stats.seen[name][kept], stat[name][kept], **THEIRS)


def test_correction_refuses(rollout: Rollout) -> None:
    settings = Lenient(**CORRECTIONS["token"])
    ours = settings_of.areal(settings)
    with pytest.raises(ValueError, match="give one of them"):
        areal.DeltaLLoss(max_length=M, rejection_sampling=settings, rollout_correction=ours)
    with pytest.raises(ValueError, match="no counterpart"):
        other = Lenient(level="sequence", action="clamp", metric="ratio", agg="sum", upper=2.0)
        areal.DeltaLLoss(max_length=M, rejection_sampling=other)
    with pytest.raises(ValueError, match="AReaL leaves those out of a sequence's ratio"):
        areal.DeltaLLoss(max_length=M, rejection_sampling=settings, ratio_level="sequence")
    hook = areal.DeltaLLoss(max_length=M, rollout_correction=ours)
    log_probs, data = areal_batches(rollout)[0]
    with pytest.raises(ValueError, match="use_decoupled_loss=true"):
        hook(log_probs, log_probs, data)


def test_hook_is_called_as_recorded() -> None:
    shapes = {
        (len(call.args), tuple(word.arg for word in call.keywords))
        for call in calls("areal/engine/fsdp_engine.py", "loss_fn")
    }
    assert (3, ("vocab_min_logits", "vocab_max_logits")) in shapes, "AReaL calls loss_fn otherwise"
