"""AReaL 1.0: its packing, loss weights and scaling around the hook."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from adapter_runs import areal_batches
from adapter_tools import ALPHA, CLIP, LENGTHS, Dist, M, Rollout, T, calls, lift, make_rollout

from dl_norm.integrations import areal


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


def test_hook_is_called_as_recorded() -> None:
    shapes = {
        (len(call.args), tuple(word.arg for word in call.keywords))
        for call in calls("areal/engine/fsdp_engine.py", "loss_fn")
    }
    assert (3, ("vocab_min_logits", "vocab_max_logits")) in shapes, "AReaL calls loss_fn otherwise"
