"""Token losses that the package does not know, from this file alone, in every implementation.

One is a class with a device function of its own, the others are formulas. All of them, from
log-probs, logits and hidden states, have the loss and gradient of float64 autograd of the formula.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pickle
import subprocess
import sys
import typing

import pytest
import torch
import triton
import triton.language as tl

import dl_norm
from dl_norm._options import RATIO_LEVELS
from dl_norm.surrogates import (
    SURROGATES,
    Clip,
    DppoKL,
    DppoTV,
    Drift,
    Gmpo,
    ImportanceSampling,
    Ipo,
    Nll,
    PolicyGradient,
    Vespo,
    load,
)

IMPLEMENTATIONS = ("triton", "torch")


@triton.jit
def drift(log_prob, ratio, advantage, tau):
    log_ratio = tl.log(ratio)
    loss = -advantage * log_prob + 0.5 * tau * log_ratio * log_ratio
    never = ratio < 0.0
    return loss, tau * log_ratio, tl.zeros_like(loss) - advantage, never, never


@dataclasses.dataclass(frozen=True)
class Penalised(dl_norm.Surrogate):
    """Policy gradient with a quadratic penalty on the log-ratio."""

    tau: float = 0.3

    def formula(self, log_prob, ratio, advantage):
        return -advantage * log_prob + 0.5 * self.tau * ratio.log() ** 2

    @staticmethod
    def device():
        return drift


@dataclasses.dataclass(frozen=True)
class Cubed(dl_norm.Surrogate):
    """A class with a formula alone."""

    scale: float = 0.5

    def formula(self, log_prob, ratio, advantage):
        return -advantage * self.scale * (ratio**3 - 1) / 3


def truncated(log_prob, ratio, advantage, bound):  # a stop-gradient
    return -advantage * log_prob * torch.clamp(ratio, max=bound).detach()


def huber(log_prob, ratio, advantage, delta):  # a derivative discontinuity
    error = ratio - 1
    size = error.abs()
    return torch.where(size < delta, 0.5 * error**2 - advantage * ratio, delta * size)


def likelihood(log_prob, ratio, advantage):  # log-probs alone
    return -log_prob * torch.sigmoid(log_prob)


def soft_clip(log_prob, ratio, advantage, temperature):
    gate = torch.tanh((ratio - 1) / temperature)
    return -advantage * temperature * gate, {"saturated": gate.abs() > 0.1, "gate": gate}


def clip(log_prob, ratio, advantage, eps_low=0.2, eps_high=0.28):
    clipped = torch.clamp(ratio, 1 - eps_low, 1 + eps_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


SOFT_CLIP = dl_norm.surrogate(soft_clip, temperature=0.5)
CASES = {
    "drift": Penalised(),
    "cubed": Cubed(0.7),
    "truncated": dl_norm.surrogate(truncated, bound=1.1),
    "huber": dl_norm.surrogate(huber, delta=0.25),
    "likelihood": dl_norm.surrogate(likelihood),
    "soft_clip": SOFT_CLIP,
    "clip": dl_norm.surrogate(clip),
}
# The package's, and sums
OWN = {
    "topr": PolicyGradient(negative_low=0),
    "unclipped": ImportanceSampling(),
    "dppo_tv": DppoTV(0.05, 0.08),
    "dppo_tv, cap": DppoTV(0.05, 0.08, ratio_cap=1.1),
    "dppo_kl": DppoKL(0.02, 0.01),
    "ipo + drift": Ipo(0.1) + Drift(0.5),
    "clip + nll": Clip() + Nll(0.3),
    # A class and two formulas, with further quantities
    "three": Cubed(0.7) + SOFT_CLIP + dl_norm.surrogate(truncated, bound=1.1),
}
OF_SEQUENCES = {"vespo": Vespo(), "gmpo": Gmpo(0.1, 0.15)}
LAYOUTS = ("padded", "packed")
LEVELS = ("token", "sequence", "sequence_token")
ARRANGED = [
    *itertools.product(CASES, LEVELS, LAYOUTS),
    *itertools.product(OWN, LEVELS[:1], LAYOUTS[:1]),
    *itertools.product(("topr", "clip + nll", "three"), LEVELS[1:2], LAYOUTS[1:]),
    *itertools.product(("vespo", "topr"), ("sequence_sum",), LAYOUTS),
    *itertools.product(("gmpo",), LEVELS[1:], LAYOUTS),
]
CASES |= OWN | OF_SEQUENCES


def case(layout, seed=0):
    """Arguments of a loss of four sequences, one of them empty; ratios stay off the kinks."""
    generator = torch.Generator().manual_seed(seed)
    lengths, width = torch.tensor([7, 0, 19, 3]), 23
    mask = torch.arange(width) < lengths[:, None]
    log_probs = -0.1 - torch.rand(4, width, generator=generator)
    steps = torch.randint(-6, 7, (4, width), generator=generator) / 16
    tensors = {
        "log_probs": log_probs,
        "old_log_probs": log_probs - steps - 0.003,
        "advantages": torch.randn(4, width, generator=generator),
        "mask": mask,
    }
    if layout == "packed":
        tensors = {name: tensor.flatten() for name, tensor in tensors.items()}
        tensors["cu_seqlens"] = torch.arange(5) * width
    tensors["weights"] = dl_norm.sequence_weights(lengths, max_length=width)
    return tensors


def gradient(function, tensors, **options):
    leaf = tensors["log_probs"].clone().requires_grad_()
    result = function(**{**tensors, "log_probs": leaf}, **options)
    loss = result[0] if isinstance(result, tuple) else result
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad, result[1] if isinstance(result, tuple) else None


def in_double(tensors):
    return {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def assert_near(got, true, unit=2e-6):
    scale = true.abs().max().clamp(min=1e-30)
    assert ((got.double() - true).abs().max() / scale).item() <= unit


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "level", "layout"), ARRANGED)
def test_log_probs(name, level, layout, impl):
    tensors = case(layout)
    options = {"surrogate": CASES[name], "ratio_level": level, "return_metrics": True}
    loss, grad, metrics = gradient(dl_norm.policy_loss, tensors, impl=impl, **options)
    true, true_grad, expected = gradient(
        dl_norm.reference.policy_loss, in_double(tensors), **options
    )
    assert_near(grad, true_grad)
    terms = tensors["mask"].sum()
    assert abs(loss.item() - true.item()) <= 2e-6 * terms * true_grad.abs().max().clamp(min=1e-3)
    assert list(metrics.extras) == list(expected.extras)
    for key, value in metrics.summary().items():
        torch.testing.assert_close(value, expected.summary()[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(  # one layout each: rows are flat before a token loss sees them
    ("name", "layout"), list({n: (n, w) for n, level, w in ARRANGED if level == "token"}.values())
)
def test_heads(name, layout, impl):
    """From hidden states and from logits, with what it returns beside the loss."""
    tensors = case(layout)
    generator = torch.Generator().manual_seed(1)
    shape = tensors.pop("log_probs").shape
    hidden = torch.randn(*shape, 8, generator=generator)
    head = torch.randn(11, 8, generator=generator) / 3
    ids = torch.randint(11, shape, generator=generator)
    tensors["old_log_probs"] = dl_norm.token_log_probs(hidden, ids, head) - (
        torch.randint(-6, 7, shape, generator=generator) / 16 + 0.003
    )
    options = {"surrogate": CASES[name], "return_metrics": True}
    wide = hidden.double().requires_grad_()
    log_probs = (wide @ head.double().T).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    true, expected = dl_norm.reference.policy_loss(
        log_probs=log_probs, **in_double(tensors), **options
    )
    true.backward()
    leaf = hidden.clone().requires_grad_()
    loss, outputs = dl_norm.linear_policy_loss(leaf, head, ids, **tensors, **options, impl=impl)
    loss.backward()
    assert_near(leaf.grad, wide.grad, 4e-6)
    for key, value in outputs.metrics.summary().items():
        torch.testing.assert_close(value, expected.summary()[key], rtol=1e-5, atol=1e-5)
    logits = (hidden @ head.T).requires_grad_()
    again = dl_norm.logits_policy_loss(logits, ids, **tensors, surrogate=CASES[name], impl=impl)
    again.backward()
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-7)
    assert_near(logits.grad.double() @ head.double(), wide.grad, 4e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_clip_as_a_formula_is_the_clip(layout, impl):
    tensors = case(layout)
    loss, grad, _ = gradient(
        dl_norm.policy_loss, tensors, impl=impl, surrogate="clip", eps_high=0.28
    )
    mine, my_grad, _ = gradient(dl_norm.policy_loss, tensors, impl=impl, surrogate=CASES["clip"])
    torch.testing.assert_close(my_grad, grad, rtol=2**-23, atol=0)  # 1 ulp
    torch.testing.assert_close(mine, loss, rtol=2**-22, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "name", ["drift", "cubed", "soft_clip", "ipo + drift", "dro", "dppo_kl", "gmpo", "vespo"]
)
def test_torch_compile(name, impl):
    tensors = case("padded")

    def step(log_probs):
        level = {"gmpo": "sequence", "vespo": "sequence_sum"}.get(name, "token")
        given = {**tensors, "log_probs": log_probs, "ratio_level": level}
        return dl_norm.policy_loss(**given, surrogate=CASES.get(name, name), impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for function in (step, compiled):
        leaf = tensors["log_probs"].clone().requires_grad_()
        loss = function(leaf)
        loss.backward()
        if function is step:
            expected = loss, leaf.grad
    torch.testing.assert_close((loss, leaf.grad), expected, rtol=1e-5, atol=1e-8)


def test_a_setting_may_change_without_another_kernel():
    from dl_norm.kernels.policy_loss import policy_loss_fwd_kernel

    tensors = case("padded")
    surrogates = [dl_norm.surrogate(soft_clip, temperature=t) for t in (0.4, 0.5, 0.6)]
    assert len({each.kind for each in surrogates}) == 1
    assert len({each.device() for each in surrogates}) == 1
    losses = {dl_norm.policy_loss(**tensors, surrogate=s, impl="triton").item() for s in surrogates}
    assert len(losses) == 3
    del policy_loss_fwd_kernel


def test_a_name_is_an_import_path(monkeypatch):
    module = type(sys)("some_package_losses")
    module.soft_clip = functools.partial(soft_clip, temperature=0.5)
    module.plain = likelihood
    module.Cubed, module.instance = Cubed, Cubed(0.7)
    monkeypatch.setitem(sys.modules, "some_package_losses", module)
    tensors = case("padded")
    for name, same in (
        ("some_package_losses:plain", CASES["likelihood"]),
        ("some_package_losses:Cubed", Cubed()),
        ("some_package_losses:instance", CASES["cubed"]),
    ):
        got = dl_norm.policy_loss(**tensors, surrogate=name)
        assert torch.equal(got, dl_norm.policy_loss(**tensors, surrogate=same))
    with pytest.raises(ValueError, match=r"there is no surrogate 'clipp'.*import path"):
        dl_norm.policy_loss(**tensors, surrogate="clipp")
    with pytest.raises(ValueError, match=r"dual_clip=3.0 has no effect with surrogate="):
        dl_norm.policy_loss(**tensors, surrogate=CASES["drift"], dual_clip=3.0)
    assert load("sapo") == SURROGATES["sapo"]()


def test_a_string_may_bring_options_and_be_a_sum():
    """As a configuration of text writes it."""
    for text, same in (
        ("dppo_tv(delta_high=0.15)", DppoTV(delta_high=0.15)),
        ("policy_gradient(0, inf, negative_high=2)", PolicyGradient(0, math.inf, 1.0, 2)),
        ("cispo(eps_high=-0.1)", SURROGATES["cispo"](eps_high=-0.1)),
        ("clip(dual_clip=None)+nll( weight = 2e-1 )", Clip() + Nll(0.2)),
        ("dro(0.3)", PolicyGradient() + Drift(0.3)),
        ("dro + ipo", PolicyGradient() + Drift() + Ipo()),
    ):
        assert load(text) == same and hash(load(text)) == hash(same)
        assert pickle.loads(pickle.dumps(same)) == same
    assert load("clip + nll") != load("clip + nll(0.2)") != Clip()
    for text, error, message in (
        ("clip + ppo", ValueError, "ppo is none. The losses are clip, cispo"),
        ("dppo_tv(delta_high=__import__)", ValueError, "__import__ is no number"),
        ("dppo_tv(True)", ValueError, "True is no number"),
        ("clip + (nll", ValueError, "is no sum of losses such as"),
        ("os.system('ls') + clip", ValueError, "is none"),
        ("clip - nll(1)", ValueError, "clip - nll(1) is none"),
        ("dppo_tv(eps=1)", TypeError, "eps"),
        ("dppo_tv(delta_low=-1)", ValueError, "expected delta_low >= 0"),
        ("dppo_kl(ratio_cap=0)", ValueError, "ratio_cap > 0 (or None)"),
        ("policy_gradient(2)", ValueError, "expected positive_high >= positive_low"),
        ("policy_gradient(-1)", ValueError, "expected positive_low >= 0"),
        ("drift(-1)", ValueError, "expected tau >= 0"),
        ("nll(inf)", ValueError, "expected weight >= 0 and finite"),
    ):
        with pytest.raises(error) as raised:
            load(text)
        assert message in str(raised.value)


def test_what_makes_no_sense_together():
    tensors = case("padded")
    for given, error, message in (
        ({"surrogate": "dppo_tv + nll", "ratio_level": "sequence"}, ValueError,
         "has a meaning with ratio_level='token' alone, got 'sequence'"),
        ({"surrogate": "vespo"}, ValueError, "ratio_level='sequence_sum' alone, got 'token'"),
        ({"surrogate": "gmpo"}, ValueError, "'sequence' or 'sequence_token' alone, got 'token'"),
        ({"surrogate": "gmpo", "eps_low": 0.3, "ratio_level": "sequence"}, ValueError,
         "eps_low=0.3 has no effect"),
        ({"ratio_level": "sequence_sum"}, ValueError, "has a derivative through the ratio"),
        ({"ratio_level": "sequence_sum", "surrogate": CASES["drift"]}, ValueError, "derivative"),
        ({"ratio_level": "sequence_sum", "surrogate": "cispo", "bias_corrected_kl": True},
         ValueError, "bias_corrected_kl has a derivative"),
        ({"surrogate": Ipo(), "delta": 2.0}, ValueError, "delta=2.0 has no effect"),
    ):  # fmt: skip
        for function in (dl_norm.policy_loss, dl_norm.reference.policy_loss):
            with pytest.raises(error, match=message):
                function(**tensors, **given)
    with pytest.raises(TypeError, match="bring their options along"):
        dl_norm.DeltaLLoss(max_length=8, surrogate="dppo_tv", delta_low=0.1)
    for text in ("gmpo + drift", "vespo + dppo_tv"):
        with pytest.raises(ValueError, match=r"is no part of a sum|ratios of different levels"):
            load(text)
    with pytest.raises(ValueError, match="must have names of their own"):
        SOFT_CLIP + SOFT_CLIP
    with pytest.raises(TypeError):
        Clip() + 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl", "ipo"])
def test_past_the_clamp_a_probability_is_that_times_the_ratio(name, impl):
    """Ratios to e^40 either way: nothing that is not a number, and next to no gradient where the
    clamp makes a token count as kept."""
    tensors = case("padded")
    shifts = torch.linspace(-40, 40, tensors["mask"].numel()).view(tensors["mask"].shape)
    tensors["old_log_probs"] = torch.full_like(shifts, -0.05)
    tensors["log_probs"] = (-0.05 + shifts).clamp(max=-1e-3)
    tensors["old_log_probs"] = tensors["log_probs"] - shifts
    for clamp in (20.0, None):
        for surrogate in (name, f"{name}(ratio_cap=20)" if name != "ipo" else name):
            _, grad, _ = gradient(
                dl_norm.policy_loss, tensors, impl=impl, surrogate=surrogate, log_ratio_clamp=clamp
            )
            true = gradient(
                dl_norm.reference.policy_loss, in_double(tensors), surrogate=surrogate,
                log_ratio_clamp=clamp,
            )[1]  # fmt: skip
            assert grad.isfinite().all()
            assert_near(grad, true, 5e-6)  # float32 knows a log-ratio of 40 to 2e-6
            fallen = shifts < -20
            assert (grad[fallen].abs() <= 3e-9 * tensors["weights"].max() * 4).all()


def test_metrics_of_two_surrogates_do_not_add_up():
    tensors = case("padded")
    options = {"return_metrics": True}
    _, mine = dl_norm.policy_loss(**tensors, surrogate=CASES["soft_clip"], **options)
    _, other = dl_norm.policy_loss(**tensors, **options)
    twice = (mine + mine).summary()
    torch.testing.assert_close(twice["saturated"], mine.summary()["saturated"])
    with pytest.raises(ValueError, match="metrics of two surrogates"):
        mine + other


def test_a_second_process_finds_the_generated_function(tmp_path):
    """The file is named by its text: a process that makes the same one does not write it again."""
    code = (
        "import os, sys; os.environ['TRITON_INTERPRET'] = '1'; import dl_norm\n"
        "def mine(log_prob, ratio, advantage, power):\n    return -advantage * ratio * power\n"
        "s = dl_norm.surrogate(mine, power=2.0); s.device(); print(s.kind)"
    )
    environment = {"DL_NORM_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    kinds, times = [], []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        kinds.append(run.stdout)
        times.append([path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*.py"))])
    assert kinds[0] == kinds[1] and times[0] == times[1] and len(times[0]) == 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_named_constant_ratio_losses(impl):
    """GPG and REINFORCE, -A log pi, and a truncated weight, -sg(min(r, c)) A log pi, are CISPO."""
    tensors = case("padded")
    for bounds, function in (
        ({"eps_low": 0.0, "eps_high": 0.0}, lambda lp, r, a: -a * lp),
        ({"eps_low": 1.0, "eps_high": 0.0}, lambda lp, r, a: -a * lp * r.clamp(0, 1).detach()),
        ({"eps_low": 0.9, "eps_high": 9.0}, lambda lp, r, a: -a * lp * r.clamp(0.1, 10).detach()),
    ):
        leaf = tensors["log_probs"].double().requires_grad_()
        ratio = (leaf - tensors["old_log_probs"]).exp()
        loss = function(leaf, ratio, tensors["advantages"]) * tensors["weights"][:, None]
        (true,) = torch.autograd.grad(loss[tensors["mask"]].sum(), leaf)
        _, grad, _ = gradient(dl_norm.policy_loss, tensors, impl=impl, surrogate="cispo", **bounds)
        assert_near(grad, true)


def test_every_name_is_a_keyword_for_type_checkers():
    assert set(typing.get_args(dl_norm._keywords.SurrogateName)) == set(SURROGATES)
    assert set(typing.get_args(dl_norm._keywords.RatioLevel)) == set(RATIO_LEVELS)
