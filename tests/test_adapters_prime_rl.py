"""prime-rl: its compute_loss around the custom loss, and ours in its place."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from adapter_stand_ins import prime_samples
from adapter_tools import (
    ALPHA,
    CLIP,
    LENGTHS,
    THEIRS,
    M,
    Rollout,
    T,
    check_hook,
    fake,
    lift,
    make_rollout,
)

from dl_norm.integrations import prime_rl


@pytest.fixture
def rollout() -> Rollout:
    return make_rollout()


def test_weight_stream(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed or one by one, rl weights multiply the loss, and 0 takes a token out."""
    fake(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=SimpleNamespace)
    weights = (torch.arange(len(LENGTHS) * T) % 3).view(-1, T) * 0.5
    old = rollout.old.masked_fill(weights == 0, torch.nan)  # must not be read
    streams = (rollout.log_probs, old, rollout.old, rollout.mask, weights)
    names = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask", "loss_weights")
    one_by_one = torch.zeros(())
    for row in zip(*streams, strict=True):
        inputs = dict(zip(names, row, strict=True))
        inputs["loss_mask"] = inputs["loss_mask"] & (inputs["loss_weights"] != 0)
        one_by_one = one_by_one + prime_rl.delta_l_loss(SimpleNamespace(**inputs)).loss
    log_probs, old, advantages, mask, weights = map(list, streams)
    packed, _ = prime_rl.make_compute_loss()(
        log_probs, old, None, advantages, mask, weights, None, None, None, 7, 1, 1
    )
    torch.testing.assert_close(packed * 7, one_by_one, **THEIRS)


def test_counts_what_the_trainer_counts() -> None:
    """rl_weights of 0 take a token out; advantages may be missing only where nothing counts."""
    sample = SimpleNamespace(mask=[True] * 3, advantages=[1.0] * 3, rl_weights=[1.0, 0.0, 2.0])
    other = SimpleNamespace(mask=[True], advantages=None, rl_weights=[0.0])
    prime_rl.weight_samples([sample, other], alpha=1.0, max_length=10)
    assert sample.advantages == pytest.approx([2 / 10] * 3)  # x = 1/10, N = 2
    other.rl_weights = None
    with pytest.raises(ValueError, match="no advantages"):
        prime_rl.weight_samples([sample, other], alpha=1.0, max_length=10)


def test_refuses_other_components(rollout: Rollout) -> None:
    with pytest.raises(ValueError, match="ce_weights"):
        prime_rl.make_compute_loss()(
            *[[torch.ones(2)]] * 2,
            None,
            [torch.ones(2)],
            [torch.ones(2).bool()],
            None,
            [torch.ones(2)],
            *[None] * 2,
            *[1] * 3,
        )


def test_real(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    """prime-rl's compute_loss with the hook from its configuration, and ours in its place."""

    @dataclass
    class CustomLossConfig:
        import_path: str
        kwargs: dict[str, Any] = field(default_factory=dict)

    module = lift(
        "prime-rl/src/prime_rl/trainer/rl/loss.py",
        "LossInputs",
        "LossOutputs",
        "setup_rl_loss_fn",
        "compute_loss",
        keep=("LossInputs", "LossOutputs"),
        dataclass=dataclass,
        field=field,
        CustomLossConfig=CustomLossConfig,
        import_object=lift(
            "prime-rl/src/prime_rl/utils/utils.py", "import_object", importlib=importlib
        ).import_object,
    )
    check_hook(module.compute_loss, "prime-rl compute_loss")
    fake(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=module.LossOutputs)
    samples = prime_samples(rollout)
    prime_rl.weight_samples(samples, alpha=ALPHA, max_length=M)
    count = int(rollout.mask.sum())
    micro_batches = ([0, 1, 2], [3, 4, 5])
    config = CustomLossConfig("dl_norm.integrations.prime_rl.delta_l_loss", CLIP)
    functions = module.compute_loss, prime_rl.make_compute_loss(**CLIP)
    for compute_loss in functions:
        total = torch.zeros(())
        for rows in micro_batches:
            streams = {
                "trainer_logprobs": rollout.log_probs,
                "inference_logprobs": rollout.old,
                "loss_mask": rollout.mask,
            }
            loss, metrics = compute_loss(
                **{
                    name: [stream[row, : LENGTHS[row]] for row in rows]
                    for name, stream in streams.items()
                },
                advantages=[torch.tensor(samples[row].advantages[1:]) for row in rows],
                **dict.fromkeys(("ref_logprobs", "rl_weights", "ce_weights", "ref_kl_weights")),
                rl_loss_fn=module.setup_rl_loss_fn(config),
                rl_scale=count,
                ce_scale=1,
                ref_kl_scale=1,
            )
            assert {"is_masked", "is_masked_low"} <= set(metrics)
            total = total + loss
        rollout.check(total)

    # A stream of rl weights, some of them 0, means the same to both.
    weights = (torch.rand(len(LENGTHS), T) * 2).floor() * 0.7
    streams = (rollout.log_probs, rollout.old, None, rollout.old, rollout.mask, weights)
    losses = [
        compute_loss(
            *(stream if stream is None else list(stream) for stream in streams),
            *[None] * 2,
            module.setup_rl_loss_fn(config),
            *[count, 1, 1],
        )[0]
        for compute_loss in functions
    ]
    torch.testing.assert_close(losses[0], losses[1], **THEIRS)
