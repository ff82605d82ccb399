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

import dl_norm
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


@dataclass
class CustomLossConfig:
    import_path: str
    kwargs: dict[str, Any] = field(default_factory=dict)


class IPOLossConfig(SimpleNamespace):
    pass


def own_module() -> Any:
    """prime-rl's losses and what sums them up, alone."""
    return lift(
        "prime-rl/src/prime_rl/trainer/rl/loss.py",
        "LossInputs",
        "LossOutputs",
        "setup_rl_loss_fn",
        "_safe_mean",
        "compute_importance_ratio_and_mismatch_kl",
        "default_loss_fn",
        "ipo_loss_fn",
        "compute_loss",
        keep=("LossInputs", "LossOutputs"),
        dataclass=dataclass,
        field=field,
        CustomLossConfig=CustomLossConfig,
        IPOLossConfig=IPOLossConfig,
        import_object=lift(
            "prime-rl/src/prime_rl/utils/utils.py", "import_object", importlib=importlib
        ).import_object,
    )


def test_real(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    """prime-rl's compute_loss with the hook from its configuration, and ours in its place."""
    module = own_module()
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


OWN = {
    "default": SimpleNamespace(
        type="default", dppo_mask_low=0.1, dppo_mask_high=0.05, adv_tau=1.5, kl_tau=0.2
    ),
    "ipo": IPOLossConfig(type="ipo", ipo_threshold=0.1, adv_tau=1.0, kl_tau=0.1),
    "no drift": SimpleNamespace(
        type="default", dppo_mask_low=0.2, dppo_mask_high=0.2, adv_tau=1.0, kl_tau=0.0
    ),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["all tokens", "rl weights"])
@pytest.mark.parametrize("name", OWN)
def test_own_loss(
    rollout: Rollout, name: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """prime-rl's losses by its settings, under the weighted advantages: its compute_loss with its
    own function, with ours for it, and ours as a whole; value, gradient and metrics."""
    module = own_module()
    fake(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=module.LossOutputs)
    config = OWN[name]
    samples = prime_samples(rollout)
    prime_rl.weight_samples(samples, alpha=ALPHA, max_length=M)
    random = torch.Generator().manual_seed(4)
    streams = {
        "trainer_logprobs": rollout.cut(rollout.log_probs),
        "inference_logprobs": rollout.cut(rollout.old),
        "advantages": [torch.tensor(sample.advantages[1:]) for sample in samples],
        "loss_mask": rollout.cut(rollout.mask),
        "rl_weights": None,
    }
    if weighted:
        weights = (3 * torch.rand(rollout.mask.shape, generator=random)).floor() * 0.5
        streams["rl_weights"] = rollout.cut(weights)
    settings = {"own": vars(config)}
    hook = CustomLossConfig("dl_norm.integrations.prime_rl.delta_l_loss", settings)
    runs = {
        "theirs": (module.compute_loss, config),
        "hook": (module.compute_loss, hook),
        "ours": (prime_rl.make_compute_loss(own=config), hook),
        "kernel": (prime_rl.make_compute_loss(own=config, impl="triton"), hook),
    }
    results = {}
    for run, (compute_loss, loss_config) in runs.items():
        loss, metrics = compute_loss(
            **streams, **dict.fromkeys(("ref_logprobs", "ce_weights", "ref_kl_weights")),
            rl_loss_fn=module.setup_rl_loss_fn(loss_config), rl_scale=25, ce_scale=1,
            ref_kl_scale=1,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, rollout.log_probs)
        results[run] = loss, gradient, metrics
    loss, gradient, metrics = results["theirs"]
    assert gradient.abs().max() > 1e-3 and metrics["is_masked"].sum() > 0
    for run, (ours, our_gradient, seen) in results.items():
        torch.testing.assert_close(ours, loss, **THEIRS, msg=run)
        torch.testing.assert_close(our_gradient, gradient, **THEIRS, msg=run)
        for metric in {"is_masked", *seen} & set(metrics) if run == "hook" else ():
            torch.testing.assert_close(seen[metric].float(), metrics[metric].float(), **THEIRS)


@pytest.mark.parametrize(
    ("name", "surrogate"),
    [
        ("default", "dppo_tv(0.1, 0.05) + drift(tau=0.4)"),
        ("ipo", "ipo(0.1) + drift(tau=0.2)"),
        ("no drift", "dppo_tv"),
    ],
)
def test_own_loss_is_its_formula(rollout: Rollout, name: str, surrogate: str) -> None:
    """Over no code of prime-rl's: the surrogate of its settings, a plain sum of tokens."""
    config = OWN[name]
    streams = (rollout.log_probs, rollout.old, rollout.advantages[:, None] * rollout.mask)
    trainer, inference, advantages, mask = map(rollout.cut, (*streams, rollout.mask))
    loss, metrics = prime_rl.make_compute_loss(own=config)(
        trainer, inference, None, advantages, mask, *[None] * 4, 10, 1, 1
    )
    true = dl_norm.reference.policy_loss(
        *streams[:2], config.adv_tau * rollout.advantages, rollout.mask,
        torch.full((len(LENGTHS),), 0.1), surrogate=surrogate,
    )  # fmt: skip
    torch.testing.assert_close(loss, true, **THEIRS)
    gradients = [torch.autograd.grad(value, rollout.log_probs)[0] for value in (loss, true)]
    torch.testing.assert_close(*gradients, **THEIRS)
    assert set(metrics) == {"is_masked", "is_masked_low", "is_masked_high"}


def test_own_loss_refuses() -> None:
    with pytest.raises(ValueError, match="'default' or 'ipo', got 'custom'"):
        prime_rl.make_compute_loss(own={"type": "custom"})
    with pytest.raises(ValueError, match="a token loss already"):
        prime_rl.make_compute_loss(own={"type": "ipo"}, surrogate="sapo")
    with pytest.raises(ValueError, match="delta_high"):
        prime_rl.make_compute_loss(own={"dppo_mask_high": -1.0})
