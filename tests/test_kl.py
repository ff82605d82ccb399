"""Estimates of the KL term: the implementations against the float64 reference, and that against the
estimates of verl and OpenRLHF."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

import dl_norm
from bench.lift import NotInstalled, lift
from dl_norm import KL
from dl_norm._kl import token_kl

LENGTHS = [60, 0, 397, 3, 350, 0]
BUDGET = 3e-6
VERL = "verl.trainer.ppo.core_algos"
OPENRLHF = Path(__file__).resolve().parents[1] / ".venv-trainers" / "openrlhf" / "models"
KINDS = {
    "k1": "k1",
    "abs": "abs",
    "k2": KL("k2"),
    "k3 as verl has it": KL("k3", log_ratio_clamp=0.5, clamp=0.1),
    "k3+": KL("k3", "k2"),
    "k1, unbiased": KL("k1", "unbiased", clamp=0.2),
    "abs, clamped": KL("abs", log_ratio_clamp=0.3),
}
# With the clip, and where the ratio is not the token's own or corrects the estimate.
OTHERS = (
    {},
    {"ratio_level": "sequence", "surrogate": "cispo"},
    {"bias_corrected_kl": True, "log_ratio_clamp": 0.3},
)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("layout", ["padded", "packed_mask"])
@pytest.mark.parametrize("kind", KINDS)
def test_estimates(kind, layout, impl, make_batch, run_loss):
    """The KL term alone: advantages are 0, so that nothing hides its error."""
    batch = make_batch(LENGTHS, 401, layout=layout, holes=True, ref=True)
    batch = batch.replace(advantages=torch.zeros_like(batch.advantages))
    wide = batch.map(torch.Tensor.double)
    log_ratio = wide.log_probs - wide.old_log_probs
    difference = (wide.ref_log_probs - wide.log_probs).masked_fill(~wide.counted(), 0.0)
    largest = (log_ratio.exp().clamp(min=1) * (difference.abs().exp() + 1) * wide.counted()).amax()
    for others in OTHERS:
        if "bias_corrected_kl" in others and getattr(KINDS[kind], "gradient", "own") != "own":
            continue
        options = {"beta": 0.3, "kl": KINDS[kind], **others, "return_metrics": True}
        true = run_loss("reference", wide, **options)
        got = run_loss(impl, batch, **options)
        scale = 0.3 * largest * wide.weights.amax()
        assert true.grad.abs().amax() > 0.01 * scale  # not all of it beyond a clamp
        assert (got.grad.double() - true.grad).abs().amax() <= BUDGET * scale
        assert abs(got.loss - true.loss) <= BUDGET * scale * wide.counted().sum()
        torch.testing.assert_close(got.metrics.kl_ref, true.metrics.kl_ref, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("kind", ["k1, unbiased", "k3 as verl has it"])
def test_from_logits(kind, impl, make_batch, run_loss):
    """The row kernel's estimate is that of the log-probs."""
    batch = make_batch([3, 5, 0], 6, ref=True)
    random = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 6, 17, generator=random).to(batch.log_probs.device)
    ids = torch.randint(17, (3, 6), generator=random).to(logits.device)
    options = {"beta": 0.3, "kl": KINDS[kind], "ref_log_probs": batch.ref_log_probs}
    rest = batch.old_log_probs, batch.advantages, batch.mask, batch.weights
    grads = []
    for function in (
        lambda z: dl_norm.logits_policy_loss(z, ids, *rest, impl=impl, **options),
        lambda z: dl_norm.reference.policy_loss(
            z.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0],
            *(None if t is None else t for t in rest), **options,
        ),
    ):  # fmt: skip
        leaf = logits.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(leaf), leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)


def differences() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 1.5, 60, dtype=torch.float64)
    log_prob = -torch.rand(60, generator=random).double()
    ref = log_prob + scale * torch.randn(60, generator=random).sign()
    return log_prob, ref, log_prob - 0.3 * torch.randn(60, generator=random).double()


def value_and_grad(function, log_prob):
    log_prob = log_prob.clone().requires_grad_()
    value = function(log_prob)
    return value.detach(), torch.autograd.grad(value.sum(), log_prob)[0]


@pytest.mark.parametrize("name", ["k1", "abs", "k2", "k3", "k1+", "abs+", "k3+"])
def test_verl(name):
    """``kl_penalty`` of verl's own source."""
    try:
        forward = lift(VERL, "kl_penalty_forward", {"torch": torch})
        penalty = lift(VERL, "kl_penalty", {"torch": torch, "kl_penalty_forward": forward})
    except NotInstalled as error:
        pytest.skip(str(error))
    bounds = {"log_ratio_clamp": 20, "clamp": 10} if name.startswith("k3") else {}
    ours = KL(name.removesuffix("+"), "k2" if name.endswith("+") else "own", **bounds)
    log_prob, ref, _ = differences()
    expected = value_and_grad(lambda x: penalty(x, ref, name), log_prob)
    got = value_and_grad(lambda x: token_kl(ours, ref - x, torch.ones_like(x)), log_prob)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_openrlhf(name, unbiased, monkeypatch):
    """``compute_approx_kl`` of OpenRLHF's own source, which caps the estimate at 10."""
    if not OPENRLHF.exists():
        pytest.skip("OpenRLHF's files are not there: bash ci/trainers_env.sh")
    import sys
    from types import ModuleType

    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    spec = importlib.util.spec_from_file_location("openrlhf_utils", OPENRLHF / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    log_prob, ref, old = differences()
    # Its arithmetic is float32, and a sum of the loss's and its negative leaves the rounding.
    ours = KL(name, "unbiased" if unbiased else "own", clamp=10)
    expected = value_and_grad(
        lambda x: utils.compute_approx_kl(x, ref, old, name, unbiased_gradient=unbiased), log_prob
    )
    got = value_and_grad(lambda x: token_kl(ours, ref - x, (x - old).exp()), log_prob)
    torch.testing.assert_close(got[0].float(), expected[0].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].float(), expected[1].float(), rtol=1e-5, atol=1e-5)


def test_the_old_policy_may_be_the_reference(make_batch, run_loss):
    """k2 to the old policy is the quadratic drift penalty."""
    batch = make_batch([5, 9, 3], 9).map(torch.Tensor.double)
    batch = batch.replace(ref_log_probs=batch.old_log_probs)
    with_drift = run_loss("reference", batch, beta=0.4, kl="k2")
    without = run_loss("reference", batch)
    drift = 0.4 * (batch.log_probs - batch.old_log_probs) * batch.weights[:, None] * batch.counted()
    torch.testing.assert_close(with_drift.grad - without.grad, drift)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: KL("k4"), ValueError, "the estimator of a KL must be one of 'k1', 'abs'"),
        (lambda: KL("k3", "k1"), ValueError, "the gradient of a KL must be one of 'own'"),
        (lambda: KL(clamp=0), ValueError, "clamp of a KL must be > 0"),
        (lambda: KL(clamp=None), TypeError, "clamp of a KL must be a number, got None"),
        (lambda: KL(log_ratio_clamp=float("nan")), ValueError, "log_ratio_clamp of a KL"),
        (lambda: loss(kl="low_var_kl"), ValueError, "kl must be one of"),
        (lambda: loss(kl=3), TypeError, "kl must be a name or a dl_norm.KL"),
        (lambda: loss(kl=KL(gradient="k2"), bias_corrected_kl=True), ValueError, "has no effect"),
        (lambda: loss(kl="k1", ref_log_probs=None), ValueError, "needs ref_log_probs"),
    ],
)  # fmt: skip
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_numbers_of_numpy_are_numbers():
    assert KL(clamp=np.float32(2.0)) == KL(clamp=np.int64(2)) == KL(clamp=2)
    correction = dl_norm.RolloutCorrection(high=np.float32(2.0), veto=np.float32(0.5))
    assert correction == dl_norm.RolloutCorrection(high=2, veto=0.5)


def loss(**options):
    ones = torch.ones(2, 3)
    given = {"beta": 0.1, "ref_log_probs": ones, **options}
    return dl_norm.policy_loss(ones, None, ones[:, 0], ones, ones[:, 0], **given)
