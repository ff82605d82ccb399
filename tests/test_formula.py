"""Token losses from their formulas alone: trace, derivative, closed form, Triton function, errors.

`python tests/test_formula.py FILE` compiles the functions for GPUs that are not here, in a process
of its own, because the tests may interpret them.
"""

import copy
import functools
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

import dl_norm
from dl_norm._formula import FormulaSurrogate
from dl_norm.surrogates import KINDS, Surrogate, load

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 2e-6  # of the largest term


def clip(log_prob, ratio, advantage, eps_low=0.2, eps_high=0.2):
    clipped = torch.clamp(ratio, 1 - eps_low, 1 + eps_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def stop_gradient(log_prob, ratio, advantage, high):
    weight = ratio.clamp(max=high).detach()
    with torch.no_grad():
        truncated = ratio > high
    loss = -weight * advantage * log_prob
    return loss, {"truncated": truncated, "weight": weight}


def discontinuous(log_prob, ratio, advantage, *, left, right=1.7):
    outside = (ratio < left) | (ratio > right)
    slope = torch.where(advantage > 0, 0.5, 2.0)
    return -advantage * torch.where(outside, 0.25 * ratio, slope * ratio)


def likelihood(log_prob, ratio, advantage, floor):
    return -advantage * torch.maximum(log_prob, torch.full_like(log_prob, floor)).exp()


def smooth(log_prob, ratio, advantage, temperature, beta):
    x = (ratio - 1) / temperature
    barrier = F.softplus(beta * (ratio - 2)) / beta
    distance = torch.log1p(torch.square(ratio.log()))
    return (
        -advantage * temperature * torch.tanh(x) + 0.1 * barrier + distance * torch.expm1(-x) ** 2
    )


def both_ways(log_prob, ratio, advantage, power, sharpness):
    probability = log_prob.exp()
    gate = torch.sigmoid(sharpness * (probability - 0.5))
    loss = -advantage * ratio**power * gate - 0.01 * log_prob * probability
    return loss, {"gate": gate.detach(), "probability": probability}


FORMULAS = [
    (clip, {}),
    (stop_gradient, {"high": 1.5}),
    (discontinuous, {"left": 0.6}),
    (likelihood, {"floor": -2.0}),
    (smooth, {"temperature": 0.5, "beta": 3.0}),
    (both_ways, {"power": 1.3, "sharpness": 4.0}),
]

# One formula an operation, each both ways where it has two.
OPERATIONS = [
    lambda p, r, a: a * p.exp() + torch.exp(-r),
    lambda p, r, a: r.log() * a + torch.log(-p),
    lambda p, r, a: torch.log1p(r) * a + (1e-3 * r).log1p(),
    lambda p, r, a: torch.expm1(p) * a + (1e-3 * r).expm1(),
    lambda p, r, a: torch.sigmoid(40 * (r - 1)) * a + F.sigmoid(p),
    lambda p, r, a: torch.tanh(r) * a + (1e-3 * p).tanh(),
    lambda p, r, a: F.softplus(20 * p) + F.softplus(r, beta=2.0, threshold=3) * a,
    lambda p, r, a: F.logsigmoid(r - 1) * a,
    lambda p, r, a: F.relu(r - 1) * a + torch.relu(p + 1),
    lambda p, r, a: abs(r - 1) * a + torch.abs(p + 1) + torch.sign(r - 1) * p,
    lambda p, r, a: torch.sqrt(r) * a + torch.rsqrt(r) + torch.reciprocal(p),
    lambda p, r, a: r**2 * a + p**3 + r**-2 + r**0.5 + r**-0.5 + r**0 + r**5,
    lambda p, r, a: r**1.7 * a + torch.pow(r, -0.3) + p ** (a * 0 + 3) + 2**p,
    lambda p, r, a: torch.pow(r, a) + 1.5**r,
    lambda p, r, a: torch.minimum(r, 1 + a) + torch.maximum(p, -r) + torch.min(p, a * r),
    lambda p, r, a: torch.max(r * a, r.clamp(0.8, 1.2) * a) + p.clip(min=-1.0) + p.clamp_max(a),
    lambda p, r, a: r.clamp(1.2, 0.8) + p,  # PyTorch's answer is the upper bound
    lambda p, r, a: torch.where((a > 0) & (r < 1.2), r, p) + r.masked_fill(p < -1, 2.0) * a,
    lambda p, r, a: (~(r >= 1) | (p != a)) * r + (r <= 1).float() * p + ((r == a) ^ (p < -1)) * p,
    lambda p, r, a: torch.logical_not(r > 1) * p + torch.logical_or(r > 2, a > 0).to(r.dtype) * r,
    lambda p, r, a: (2 - r) * a + (1 / r) - (-p) / (1 - p) + torch.true_divide(p, r) + 3 * +r,
    lambda p, r, a: np.float32(0.3) * r + p * np.float64(0.7) + torch.tensor(2.0) - r * True,
    lambda p, r, a: torch.where(torch.isnan(r / r) | ~torch.isfinite(p), 0.0, r) * a,
    lambda p, r, a: torch.zeros_like(r) + torch.ones_like(p) * r + torch.full_like(a, 0.5) * p,
    lambda p, r, a: torch.special.expit(r).clone().type_as(p) * torch.neg(a) - r.negative() + p,
    lambda p, r, a: torch.where(r > 1, 1.05, 0.3) * p,
    lambda p, r, a: torch.log(r) / torch.log(2 + r) * (r / (1 + r)) * a,
]


@triton.jit
def tokens_kernel(
    LOG_PROB, RATIO, ADVANTAGE, OUT, N, surrogate, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr
):
    """OUT (OUTPUTS, N) from streams of N tokens. BLOCK 0: scalars, one token a program."""
    if BLOCK:
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    else:
        index = tl.program_id(0)
    log_prob = tl.load(LOG_PROB + index, mask=index < N, other=0.0)
    ratio = tl.load(RATIO + index, mask=index < N, other=0.0)
    advantage = tl.load(ADVANTAGE + index, mask=index < N, other=0.0)
    values = surrogate[0](log_prob, ratio, advantage, *surrogate[1])
    for row in tl.static_range(OUTPUTS):
        tl.store(OUT + row * N + index, values[row].to(tl.float32), mask=index < N)


@triton.jit
def clip_by_hand(log_prob, ratio, advantage, positive_high, negative_low, negative_high):
    """The built-in clip."""
    negative = advantage < 0
    low = tl.where(negative, negative_low, 0.0)
    high = tl.where(negative, negative_high, positive_high)
    below = ratio < low
    above = ratio > high
    loss = -advantage * tl.where(below, low, tl.where(above, high, ratio))
    return loss, tl.where(below | above, 0.0, loss), tl.zeros_like(loss), below, above


def run_kernel(function, settings, outputs, inputs, block=256):
    out = torch.full((outputs, inputs[0].numel()), math.nan, device=inputs[0].device)
    grid = (triton.cdiv(out.shape[1], block or 1),)
    surrogate = (function, settings)
    tokens_kernel[grid](*inputs, out, out.shape[1], surrogate, OUTPUTS=outputs, BLOCK=block)
    return out


def run(surrogate, inputs, **options):
    outputs = 5 + len(surrogate.extra_names)
    return run_kernel(surrogate.device(), surrogate.settings(), outputs, inputs, **options)


@pytest.fixture(scope="module")
def inputs(device):
    """log_prob, ratio, advantage. Ratios: most near 1, some from e^-4 to e^4."""
    random = torch.Generator().manual_seed(0)
    count = 1000
    log_prob = -3 * torch.rand(count, generator=random) - 1e-3
    spread = torch.where(torch.arange(count) % 4 > 0, 0.3, 2.0)
    log_ratio = (spread * torch.randn(count, generator=random)).clamp(-4, 4)
    advantage = torch.randn(count, generator=random)
    return [values.to(device) for values in (log_prob, log_ratio.exp(), advantage)]


def truth(formula, settings, inputs):
    """Loss, derivatives and extras by autograd in float64."""
    log_prob, ratio, advantage = (values.double().requires_grad_() for values in inputs)
    result = formula(log_prob, ratio, advantage, **settings)
    loss, extras = result if isinstance(result, tuple) else (result, {})
    past_ratio, by_ratio = torch.autograd.grad(
        loss, (log_prob, ratio), torch.ones_like(loss), materialize_grads=True
    )
    never = torch.zeros_like(loss)
    return [loss, by_ratio * ratio, past_ratio, never, never, *extras.values()]


def assert_agree(results, expected, budget):
    assert len(results) == len(expected)
    for result, exact in zip(results, expected, strict=True):
        scale = exact.double().abs().max().item() or 1.0
        error = (result.double() - exact.double()).abs().max().item()
        assert error <= budget * scale


def named(value):
    return getattr(value, "__name__", "")


@pytest.mark.parametrize(("formula", "settings"), FORMULAS, ids=named)
class TestFormulas:
    def test_triton(self, formula, settings, inputs):
        surrogate = dl_norm.surrogate(formula, **settings)
        results = run(surrogate, inputs)
        assert_agree(results, truth(formula, settings, inputs), BUDGET)
        few = [values[:60] for values in inputs]
        torch.testing.assert_close(run(surrogate, few, block=0), results[:, :60], rtol=0, atol=0)

    @pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, BUDGET), (torch.float64, 1e-13)])
    def test_closed_form(self, formula, settings, inputs, dtype, budget):
        surrogate = dl_norm.surrogate(formula, **settings)
        wide = [values.to(dtype) for values in inputs]
        results = surrogate.closed_form(*wide, *surrogate.settings())
        shapes = {(values.shape, values.dtype) for values in results[:3]}
        assert shapes == {(inputs[0].shape, dtype)}
        assert_agree(results, truth(formula, settings, wide), budget)
        assert len(surrogate.extra_names) == len(surrogate.extra_names) == len(results) - 5

    def test_closed_form_compiles(self, formula, settings, inputs):
        torch.compiler.reset()
        surrogate = dl_norm.surrogate(formula, **settings)
        compiled = torch.compile(surrogate.closed_form, fullgraph=True, backend="aot_eager")
        expected = surrogate.closed_form(*inputs, *surrogate.settings())
        for result, exact in zip(compiled(*inputs, *surrogate.settings()), expected, strict=True):
            torch.testing.assert_close(result, exact)

    def test_formula_is_the_formula(self, formula, settings, inputs):
        result = dl_norm.surrogate(formula, **settings).formula(*inputs)
        expected = formula(*inputs, **settings)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_closed_form_compiles_once_for_all_settings(inputs):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(fullgraph=True, backend=counter)(
        lambda surrogate, *tensors: surrogate.closed_form(*tensors, *surrogate.settings())[1]
    )
    for temperature in (0.5, 0.6, 0.7, 0.8):
        surrogate = dl_norm.surrogate(smooth, temperature=temperature, beta=3.0)
        expected = surrogate.closed_form(*inputs, *surrogate.settings())[1]
        torch.testing.assert_close(compiled(surrogate, *inputs), expected)
    assert counter.frame_count <= 2  # with a number, and then with a symbol


@pytest.mark.parametrize(
    ("function", "lowest", "highest"),
    [(torch.log1p, -1, 1e6), (torch.expm1, -1e6, 80), (torch.tanh, -1e6, 1e6)],
    ids=("log1p", "expm1", "tanh"),
)
def test_functions_that_triton_lacks(function, lowest, highest, device):
    """Relative to the value itself, however small it is."""
    magnitude = torch.logspace(-12, 6, 2000)
    x = torch.cat([magnitude, -magnitude])
    x = x[(x > lowest) & (x < highest)].to(device)
    values = run(dl_norm.surrogate(lambda log_prob, ratio, advantage: function(ratio)), [x] * 3)[0]
    torch.testing.assert_close(values.double(), function(x.double()), rtol=3e-7, atol=0)


def test_power(device):
    surrogate = dl_norm.surrogate(lambda log_prob, ratio, advantage: torch.pow(ratio, log_prob))
    x, y = torch.meshgrid(
        torch.tensor([-3.0, -1, -0.5, 0, 0.5, 2]), torch.arange(-6.0, 7), indexing="ij"
    )
    x, y = x.reshape(-1).to(device), y.reshape(-1).to(device)
    torch.testing.assert_close(run(surrogate, [y, x, x])[0], x**y, rtol=1e-6, atol=0)
    assert run(surrogate, [y + 0.5, -abs(x) - 1, x])[0].isnan().all()
    x = torch.logspace(-8, 8, 999, device=device)
    error = run(surrogate, [x * 0 + 1.3, x, x])[0].double() / x.double() ** 1.3 - 1
    assert (error.abs() <= 1.2e-7 * (2 + (1.3 * x.log()).abs())).all()


@pytest.mark.parametrize("index", range(len(OPERATIONS)))
def test_operations(index, inputs):
    surrogate = dl_norm.surrogate(OPERATIONS[index])
    expected = truth(OPERATIONS[index], {}, inputs)
    assert_agree(surrogate.closed_form(*inputs), expected, BUDGET)
    assert_agree(run(surrogate, inputs), expected, BUDGET)


def test_the_clip_is_the_built_in_one(inputs):
    surrogate = dl_norm.surrogate(clip, eps_low=0.2, eps_high=0.28)
    assert surrogate.settings() == (1 - 0.2, 1 + 0.28)
    expected = run_kernel(clip_by_hand, (1 + 0.28, 1 - 0.2, math.inf), 3, inputs)
    assert expected[1].eq(0).float().mean() > 0.1
    torch.testing.assert_close(run(surrogate, inputs)[:3], expected, rtol=0, atol=0)


def test_the_clip_at_its_ties(inputs):
    """At a bound the derivative is the unclipped one, as in the built-in clip."""
    ratio = torch.tensor([0.8, 1.2, 1.0, 0.8, 1.2, 1.0, 1.2, 0.8], device=inputs[0].device)
    advantage = torch.tensor([-1.0, 2.0, 3.0, 1.0, -2.0, -3.0, 0.0, 0.0], device=ratio.device)
    tied = [-ratio, ratio, advantage]
    results = run(dl_norm.surrogate(clip), tied)[:3]
    assert torch.equal(results, run_kernel(clip_by_hand, (1.2, 0.8, math.inf), 3, tied))


@pytest.mark.parametrize(
    ("formula", "at_one"),
    [
        (lambda p, r, a: torch.minimum(r, torch.ones_like(r)) + 0 * p, 0.5),
        (lambda p, r, a: torch.maximum(torch.ones_like(r), 3 * r - 2), 1.5),
        (lambda p, r, a: torch.relu(r - 1), 0.0),
        (lambda p, r, a: abs(r - 1), 0.0),
        (lambda p, r, a: r.clamp(1.0, 2.0), 1.0),
        (lambda p, r, a: r.clamp(0.5, 1.0), 1.0),
        (lambda p, r, a: r.clamp_min(1.0), 1.0),
        (lambda p, r, a: torch.where(r > 1, 3 * r - 3, r - 1), 1.0),
    ],
)
def test_derivative_where_there_is_none(formula, at_one, inputs):
    """A ratio of 1 is every token's in an on-policy step. These are documented in surrogate()."""
    surrogate = dl_norm.surrogate(formula)
    ones = [torch.ones(3, device=inputs[0].device)] * 3
    for results in (surrogate.closed_form(*ones), run(surrogate, ones)):
        assert results[1].tolist() == [at_one] * 3


def test_nan_and_infinity(inputs):
    def trap(log_prob, ratio, advantage):
        return torch.where(ratio > 1e-3, ratio.log(), 1000 * ratio - 7.9) * advantage

    surrogate = dl_norm.surrogate(trap)
    zero = [torch.tensor([value], device=inputs[0].device) for value in (-1.0, 0.0, 2.0)]
    _, by_ratio, *_ = truth(trap, {}, zero)
    assert by_ratio.isnan()  # 0 * inf, of the branch that is not taken
    for results in (surrogate.closed_form(*zero), run(surrogate, zero)):
        assert results[1].item() == 0.0  # d / d log ratio of 1000 ratio - 7.9 at 0
    poison = [torch.full((2,), math.nan, device=inputs[0].device)] * 3
    clipped = dl_norm.surrogate(clip)
    for results in (clipped.closed_form(*poison, 0.8, 1.2), run(clipped, poison)):
        assert results[0].isnan().all() and results[1].isnan().all()


def test_log_ratio_of_any_ratio(inputs):
    ratio = torch.tensor([0.0, 1e-38, 1.0, math.inf], device=inputs[0].device)
    surrogate = dl_norm.surrogate(lambda log_prob, ratio, advantage: ratio.log())
    for results in (surrogate.closed_form(ratio, ratio, ratio), run(surrogate, [ratio] * 3)):
        assert results[1].tolist() == [1.0] * 4


def test_settings_are_run_time_numbers():
    one, other = (dl_norm.surrogate(smooth, temperature=t, beta=3) for t in (0.5, np.float32(0.7)))
    assert one.kind == other.kind and one.source() == other.source()
    assert one.device() is other.device()
    assert one.settings() != other.settings()
    assert KINDS[one.kind].closed_form is not None


def test_what_is_computed_of_settings_is_computed_in_float64():
    def formula(log_prob, ratio, advantage, scale, shift=1e-9):
        return ratio * (2 * scale + 1 - shift) ** 2 * advantage

    assert dl_norm.surrogate(formula, scale=0.1).settings() == pytest.approx(
        [(1.2 - 1e-9) ** 2], rel=1e-15
    )


def test_what_the_trace_knows():
    through = {formula: dl_norm.surrogate(formula, **settings) for formula, settings in FORMULAS}
    uses = {formula.__name__ for formula, made in through.items() if made.uses_log_prob}
    assert uses == {"both_ways"}
    scales = {formula.__name__ for formula, made in through.items() if made.scales_with_advantage}
    assert scales == {"clip", "stop_gradient", "discontinuous", "likelihood"}
    assert through[stop_gradient].extra_names == ("truncated", "weight")


def test_instances(inputs):
    surrogate = dl_norm.surrogate(clip, eps_high=0.28)
    assert repr(surrogate) == "surrogate(clip, eps_low=0.2, eps_high=0.28)"
    same = dl_norm.surrogate(clip, eps_low=0.2, eps_high=0.28)
    assert surrogate == same and hash(surrogate) == hash(same)
    assert surrogate != dl_norm.surrogate(clip)
    assert surrogate != dl_norm.surrogate(likelihood, floor=0.2)
    assert isinstance(surrogate, Surrogate)
    for copied in (pickle.loads(pickle.dumps(surrogate)), copy.deepcopy(surrogate)):
        assert copied == surrogate and copied.kind == surrogate.kind
    with torch.no_grad():
        assert dl_norm.surrogate(clip, eps_high=0.28).kind == surrogate.kind
    with torch.inference_mode():
        assert dl_norm.surrogate(clip, eps_high=0.28).kind == surrogate.kind
    partial = dl_norm.surrogate(functools.partial(clip, eps_low=0.2))
    torch.testing.assert_close(
        partial.closed_form(*inputs, *partial.settings()),
        surrogate.closed_form(*inputs, 0.8, 1.2),
    )


def test_numbers_from_outside_are_read_when_the_surrogate_is_made():
    bound = 1.5

    def formula(log_prob, ratio, advantage):
        return ratio.clamp(max=bound) * advantage

    before = dl_norm.surrogate(formula)
    bound = 2.5
    after = dl_norm.surrogate(formula)
    assert before.kind != after.kind and before != after
    assert "1.5" in before.source() and "2.5" in after.source()


SOURCE = """\
# Generated by dl_norm.surrogate from
#
# def clip(log_prob, ratio, advantage, eps_low=0.2, eps_high=0.2):
#     clipped = torch.clamp(ratio, 1 - eps_low, 1 + eps_high)
#     return -torch.minimum(ratio * advantage, clipped * advantage)

import triton
import triton.language as tl


@triton.jit
def clip(log_prob, ratio, advantage, setting, setting_2):
    # setting: 1.0 - eps_low, computed by the caller
    # setting_2: 1.0 + eps_high, computed by the caller
    maximum = tl.maximum(ratio, setting, tl.PropagateNan.ALL)
    clipped = tl.minimum(maximum, setting_2, tl.PropagateNan.ALL)
    d_clipped = tl.where(setting_2 < maximum, 0.0, tl.where(setting > ratio, 0.0, ratio))
    mul = ratio * advantage
    mul_2 = advantage * clipped
    mul_3 = advantage * d_clipped
    where = tl.where(mul == mul_2, mul * 0.5 + mul_3 * 0.5, tl.where(mul_2 < mul, mul_3, mul))
    loss = -tl.minimum(mul, mul_2, tl.PropagateNan.ALL)
    through_ratio = -where
    never = ratio < 0.0
    past_ratio = tl.zeros_like(ratio)
    return loss, through_ratio, past_ratio, never, never
"""


def test_source_is_for_reading():
    assert dl_norm.surrogate(clip).source() == SOURCE


def test_source_takes_its_names_from_the_formula():
    def formula(log_prob, ratio, advantage, eps):
        lowest = 1 - eps
        tl = ratio - lowest
        lost = tl * advantage
        return lost * lost

    source = dl_norm.surrogate(formula, eps=0.1).source()
    for line in (
        "def formula(log_prob, ratio, advantage, lowest):",
        "# lowest: 1.0 - eps, computed by the caller",
        "tl_2 = ratio - lowest",
        "lost = advantage * tl_2",
        "d_lost = ratio * advantage",
        "loss = lost * lost",
    ):
        assert f"{line}\n" in source


def test_files_on_disk(tmp_path, monkeypatch):
    """One file a formula, in the chosen folder, which another process finds as it is."""

    def formula(log_prob, ratio, advantage):
        return 1.25 * ratio * advantage

    monkeypatch.setenv("DL_NORM_CACHE_DIR", str(tmp_path / "deep" / "folder"))
    surrogate = dl_norm.surrogate(formula)
    assert not list(tmp_path.rglob("*.py"))  # nothing before a kernel is wanted
    surrogate.device()
    (file,) = (path for path in tmp_path.rglob("*.*") if path.suffix != ".pyc")
    assert file.name == f"{surrogate.kind}.py" and file.read_text() == surrogate.source()

    (tmp_path / "elsewhere.py").write_text(OTHER_PROCESS)
    mine = run_elsewhere(tmp_path / "elsewhere.py")
    (path,) = set(tmp_path.rglob("*.py")) - {file, tmp_path / "elsewhere.py"}
    assert path.name == f"{mine}.py"
    written = path.stat().st_mtime_ns
    assert run_elsewhere(tmp_path / "elsewhere.py") == mine
    assert path.stat().st_mtime_ns == written


# A surrogate, its formula and its closed form want no Triton.
OTHER_PROCESS = """
import sys
sys.modules["triton"] = None
import torch, dl_norm

def formula(log_prob, ratio, advantage, scale=2.0):
    return scale * ratio * advantage

surrogate = dl_norm.surrogate(formula)
assert surrogate.closed_form(*[torch.ones(3)] * 3, 2.0)[1].tolist() == [2.0] * 3
del sys.modules["triton"]
surrogate.device()
print(surrogate.kind)
"""


def run_elsewhere(file):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


class OwnDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        (lambda p, r, a: (r * a).sum(), "sum is no operation"),
        (lambda p, r, a: torch.sin(r), "sin is no operation"),
        (lambda p, r, a: torch.stack([r, p]), "stack is no operation"),
        (lambda p, r, a: r * r.mean(), "mean is no operation"),
        (lambda p, r, a: r.shape[0] * r, "shape is no operation"),
        (lambda p, r, a: r.exp_(), "exp_ is no operation"),
        (lambda p, r, a: r * torch.rand_like(r), "rand_like is no operation"),
        (lambda p, r, a: torch.exp(r, out=p), "exp is used in a way"),
        (lambda p, r, a: r.max(), "max is used in a way"),
        (lambda p, r, a: r.double(), "double is no operation"),
        (lambda p, r, a: r.to(torch.bfloat16), "bfloat16"),
        (lambda p, r, a: r[0], "not subscriptable"),
        (lambda p, r, a: r if a > 0 else -r, "decides what Python does"),
        (lambda p, r, a: max(r, a), "decides what Python does"),
        (lambda p, r, a: r * math.exp(a), "is made a Python number"),
        (lambda p, r, a: r * torch.ones(3), "numbers"),
        (lambda p, r, a: r * "2", "numbers"),
        (lambda p, r, a: r.detach() * a, "no derivative"),
        (lambda p, r, a: r > 1, "no derivative"),
        (lambda p, r, a: a, "no derivative"),
        (lambda p, r, a: 1.0, "returns the loss"),
        (lambda p, r, a: None, "returns the loss"),
        (lambda p, r, a: [r, {}], "returns the loss"),
        (lambda p, r, a: (r, {"x": 1.0}), "returns the loss"),
        (lambda p, r, a: (r, {1: r}), "returns the loss"),
        (lambda p, r, a: (r, {"loss": r}), "loss, through_ratio, past_ratio, never are taken"),
        (lambda p, r, a: (r, p, a), "returns the loss"),
        (lambda p, r, a: r + 1e-40, "normal number"),
        (lambda p, r, a: r * (2.0 if isinstance(r, torch.Tensor) else 1.0), "the trace"),
        (lambda p, r, a: OwnDerivative.apply(r) * a + r, "the trace of .* is wrong: through_ratio"),
        (lambda p, r, a: r + ((r > 1) + (a > 0)), "the trace of .* is wrong: loss"),
    ],
)
def test_what_cannot_become_a_kernel(formula, words):
    with pytest.raises(ValueError, match=words):
        dl_norm.surrogate(formula)


def test_errors_name_the_line():
    def formula(log_prob, ratio, advantage, tau):
        weight = ratio / tau
        return weight / weight.sum()  # the line

    with pytest.raises(ValueError, match=r"formula cannot become .*sum is.*weight\.sum\(\)  # the"):
        dl_norm.surrogate(formula, tau=1.0)

    def of_setting(log_prob, ratio, advantage, tau):
        return ratio * math.log(tau)

    with pytest.raises(ValueError, match=r"Python number.*math\.log\(tau\)"):
        dl_norm.surrogate(of_setting, tau=1.0)

    def of_number(log_prob, ratio, advantage, tau):
        return ratio * torch.exp(tau)

    with pytest.raises(ValueError, match=r"run on tensors: .*must be Tensor.*torch\.exp"):
        dl_norm.surrogate(of_number, tau=1.0)


@pytest.mark.parametrize(
    ("formula", "settings", "error", "words"),
    [
        (likelihood, {}, TypeError, "floor"),
        (likelihood, {"floor": 0.1, "rof": 1.0}, TypeError, "rof"),
        (likelihood, {"floor": "0.1"}, TypeError, "must be a number, got str"),
        (likelihood, {"floor": True}, TypeError, "must be a number, got bool"),
        (likelihood, {"floor": torch.tensor(0.1)}, TypeError, "must be a number, got Tensor"),
        (likelihood, {"floor": math.nan}, ValueError, "finite"),
        (likelihood, {"floor": math.inf}, ValueError, "finite"),
        (likelihood, {"floor": 1e39}, ValueError, "finite float32"),
        (lambda p, r: p, {}, TypeError, "log_prob, ratio, advantage"),
        (lambda p, r, a, bound=None: p, {}, TypeError, "must be a number, got NoneType"),
        ("clip", {}, TypeError, "a formula is a function, got str"),
    ],
)
def test_settings_are_checked(formula, settings, error, words):
    with pytest.raises(error, match=words):
        dl_norm.surrogate(formula, **settings)


MODULE = """
import dataclasses

import torch

import dl_norm
from dl_norm.surrogates import Surrogate

def loss(log_prob, ratio, advantage, scale=1.0):
    return -scale * ratio * advantage

@dataclasses.dataclass(frozen=True)
class Mine(Surrogate):
    bound: float = 1.0

    def formula(self, log_prob, ratio, advantage):
        return -advantage * torch.clamp(ratio, max=self.bound)

made = Mine(3.0)
of_formula = dl_norm.surrogate(loss, scale=2.0)
number = 3
"""


def test_load(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(MODULE)
    (tmp_path / "broken_losses.py").write_text("import no_such_package_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    formula = load("my_losses:loss", scale=0.5)
    assert repr(formula) == "surrogate(loss, scale=0.5)"
    assert pickle.loads(pickle.dumps(formula)) == formula
    assert load("my_losses:Mine", bound=2.0).bound == 2.0
    assert load("my_losses:made").bound == 3.0
    assert load("my_losses:of_formula").settings() == (-2.0,)
    assert load(formula) is formula
    assert isinstance(load(clip), FormulaSurrogate)
    for name, error, words in (
        ("clipp", ValueError, "no surrogate 'clipp'"),
        ("my_losses.loss", ValueError, "no surrogate 'my_losses.loss'"),
        ("my_lossen:loss", ValueError, "no module 'my_lossen'"),
        ("my_losses.more:loss", ValueError, "no module 'my_losses.more'"),
        ("my_losses:los", ValueError, "my_losses has no 'los'"),
        ("my_losses:loss.x", ValueError, "loss has no 'x'"),
        ("my_losses:number", TypeError, "'my_losses:number' is 3"),
        ("broken_losses:loss", ModuleNotFoundError, "no_such_package_at_all"),
        (3, TypeError, "3 is 3"),
        (dict, TypeError, "is <class 'dict'>"),
    ):
        with pytest.raises(error, match=words):
            load(name)
    with pytest.raises(ValueError, match="has its settings; bound cannot"):
        load("my_losses:made", bound=2.0)
    with pytest.raises(TypeError, match="bond"):
        load("my_losses:Mine", bond=2.0)


def machine_code():
    """{target: {function: what its machine code says}} of tokens_kernel around each function."""
    import codegen
    from machine_code import read_machine_code
    from triton.compiler import ASTSource

    functions = {"by hand": (clip_by_hand, 3, 5)}
    for formula, settings in FORMULAS:
        made = dl_norm.surrogate(formula, **settings)
        functions[formula.__name__] = made.device(), len(made.settings()), 5 + len(made.extra_names)
    asms = {}
    for target in codegen.TARGETS:
        for name, (function, settings, outputs) in functions.items():
            streams = dict.fromkeys(("LOG_PROB", "RATIO", "ADVANTAGE", "OUT"), "*fp32")
            source = ASTSource(
                tokens_kernel,
                {
                    **streams, "N": "i32", "surrogate": ("constexpr", ("fp32",) * settings),
                    "OUTPUTS": "constexpr", "BLOCK": "constexpr",
                },
                constexprs={(5, 0): function, (6,): outputs, (7,): 1024},
                attrs={(index,): [["tt.divisibility", 16]] for index in range(5)},
            )  # fmt: skip
            kernel = triton.compile(source, target=codegen.TARGETS[target])
            asms[target, name] = kernel.asm
    report = {}
    for (target, name), code in zip(asms, read_machine_code(list(asms.values())), strict=True):
        report.setdefault(target, {})[name] = code
    return report


def test_machine_code(tmp_path):
    """No float64, no spills, the loads and stores of the clip by hand and 4 registers more."""
    done = subprocess.run(
        [sys.executable, __file__, tmp_path / "report.json"],
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "ci"))),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for target, functions in report.items():
        assert len(functions) == 1 + len(FORMULAS)
        for name, code in functions.items():
            assert not code["fp64"] and not code["spill_bytes"], (target, name)
        by_formula, by_hand = functions["clip"], functions["by hand"]
        for key in ("loads", "stores"):
            assert by_formula[key] == by_hand[key], target
        if target != "gfx942":
            assert by_formula["registers"] <= by_hand["registers"] + 4


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(machine_code()))
