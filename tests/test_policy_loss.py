"""The three implementations against a float64 truth, ties, NaN, poison and metrics.

The truth is the float64 reference, and the reference itself is held against the formulas of the
paper written out token by token in plain Python (``brute_force``).

Budgets. fp32: 2e-6 of the largest unclipped term of the gradient, and of the sum of the absolute
token losses. A log-ratio is a difference rounded once, exp is good to about 2 ulp, and three or
four products follow: about 8 roundings of 6e-8 each, 5e-7; 2e-6 leaves room for a device's exp and
would not let one wrong token through. bf16 and fp16: no worse than the same formula in plain
PyTorch in that dtype.
"""

from __future__ import annotations

import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import dl_norm
from dl_norm._keywords import CallOptions

IMPLEMENTATIONS = ("triton", "torch", "reference")
FP32_BUDGET = 2e-6
# Largest relative error of one rounding, and half of the spacing of subnormal numbers.
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUBNORMAL = {torch.bfloat16: 0.0, torch.float16: 2.0**-25}

# (lengths, width, reason). A tile holds 1024 tokens in fp32, 2048 in 16 bits.
SHAPES = {
    "one_token": ([1], 1),  # the smallest batch
    "one_masked_token": ([0], 1),  # nothing counts, one position
    "odd_width": ([7, 13, 1], 13),  # rows start off any vector boundary
    "width_16": ([16, 5, 32], 32),  # T % 16 == 0, the case Triton would specialise on
    "one_row": ([37], 40),  # B = 1
    "one_token_rows": ([1] * 40, 1),  # T = 1: many sequences in a tile
    "empty_rows": ([0, 5, 0, 0, 9, 0], 9),  # first, in the middle, twice in a row, last
    "all_masked": ([0, 0, 0], 11),  # loss 0, gradient 0, no 0/0
    "one_tile": ([1024], 1024),  # rows, tiles and the stream end together
    "tile_and_one": ([1025, 1023], 1025),  # a tile boundary one token off the row's
    "last_lane": ([2047, 5], 2047),  # a row begins on the last token of a tile of either size
    "long_odd_row": ([2500], 2501),  # a row over three tiles
    "boundary_in_rows": ([1500, 3, 1024], 1500),  # tiles begin inside rows, in both tile sizes
    "tiles_of_padding": ([10, 10], 5000),  # tiles in which nothing counts between those that do
}

# Every option alone; the combinations are in test_options_in_combination.
OPTIONS = {
    "defaults": ({}, {}),
    "clip_higher": ({}, {"eps_low": 0.2, "eps_high": 0.28}),
    "no_clip_range": ({}, {"eps_low": 0.0, "eps_high": 0.0}),
    "all_the_way_down": ({}, {"eps_low": 1.0, "eps_high": 5.0}),
    "dual_clip": ({}, {"dual_clip": 1.5}),
    "dual_clip_inside_range": ({}, {"dual_clip": 1.2, "eps_high": 0.6}),
    "delta": ({}, {"delta": 1.6}),
    "delta_inside_range": ({}, {"delta": 1.2, "eps_high": 0.6}),
    "delta_above_dual_clip": ({}, {"delta": 1.8, "dual_clip": 1.4}),
    "log_ratio_clamp": ({}, {"log_ratio_clamp": 0.3, "eps_low": 0.9, "eps_high": 3.0}),
    "no_log_ratio_clamp": ({}, {"log_ratio_clamp": None}),
    "kl": ({"ref": True}, {"beta": 0.3}),
    "ref_without_beta": ({"ref": True}, {"beta": 0.0}),
    "rollout_per_sequence": ({"rollout": "sequence"}, {}),
    "rollout_per_token": ({"rollout": "token"}, {}),
    "advantages_per_token": ({"advantages": "token"}, {}),
    "no_old": ({"old": False}, {}),
    "no_old_kl_rollout": ({"old": False, "ref": True, "rollout": "token"}, {"beta": 0.1}),
    "mask_int64": ({"mask_dtype": torch.int64}, {}),
    "mask_float": ({"mask_dtype": torch.float32}, {}),
    "mask_uint8": ({"mask_dtype": torch.uint8}, {}),
    "mask_bfloat16": ({"mask_dtype": torch.bfloat16}, {}),
    "grpo": ({"method": "grpo"}, {}),
    "dapo": ({"method": "dapo"}, {}),
    "dr_grpo": ({"method": "dr_grpo"}, {}),
}


def brute_force(batch, **given) -> SimpleNamespace:
    """spec: -min(min(r, delta) A, clip(r) A), dual clip, rollout weight, k3, token by token."""
    defaults = {
        "eps_low": 0.2, "eps_high": 0.2, "dual_clip": None, "delta": None,
        "log_ratio_clamp": 20.0, "beta": 0.0,
    }  # fmt: skip
    o = SimpleNamespace(**{**defaults, **given})
    wide = batch.map(lambda tensor: tensor.double())
    columns = [
        wide.counted(), wide.log_probs, wide.old_log_probs, wide.spread(wide.advantages),
        wide.spread(wide.weights), wide.ref_log_probs,
        None if wide.rollout_weights is None else wide.spread(wide.rollout_weights),
    ]  # fmt: skip
    size = batch.log_probs.numel()
    columns = [[None] * size if c is None else c.reshape(-1).tolist() for c in columns]
    loss, grads = 0.0, []
    names = ("clip_fraction_low", "clip_fraction_high", "clip_fraction_dual", "ratio_mean",
             "kl_old_k1", "kl_old_k3", "kl_ref", "tokens", "ratio_max")  # fmt: skip
    sums = dict.fromkeys(names, 0.0)
    for counted, log_prob, old, advantage, weight, ref, rollout in zip(*columns, strict=True):
        if not counted:
            grads.append(0.0)
            continue
        raw = 0.0 if old is None else log_prob - old
        clamp = math.inf if o.log_ratio_clamp is None else o.log_ratio_clamp
        log_ratio = min(max(raw, -clamp), clamp)
        ratio = math.exp(log_ratio)
        slope = 0.0 if abs(raw) > clamp else ratio
        # (value, derivative) of each branch
        delta = math.inf if o.delta is None else o.delta
        unclipped = (min(ratio, delta) * advantage, advantage * slope * (ratio <= delta))
        inside = 1 - o.eps_low <= ratio <= 1 + o.eps_high
        bounded = min(max(ratio, 1 - o.eps_low), 1 + o.eps_high)
        clipped = (bounded * advantage, advantage * slope * inside)
        value, derivative = min(unclipped, clipped, key=lambda branch: branch[0])
        value, derivative = -value, -derivative
        dual = False
        if o.dual_clip is not None and advantage < 0 and value > -o.dual_clip * advantage:
            value, derivative, dual = -o.dual_clip * advantage, 0.0, True
        factor = 1.0 if rollout is None else rollout
        value, derivative = value * factor, derivative * factor
        difference = 0.0 if ref is None else ref - log_prob
        k3 = math.exp(difference) - difference - 1
        loss += weight * (value + o.beta * k3)
        grads.append(weight * (derivative + o.beta * (1 - math.exp(difference))))
        sums["tokens"] += 1
        sums["clip_fraction_low"] += advantage < 0 and ratio < 1 - o.eps_low
        sums["clip_fraction_high"] += advantage > 0 and ratio > min(1 + o.eps_high, delta)
        two_sided = advantage < 0 and ratio > max(delta, 1 + o.eps_high)
        sums["clip_fraction_dual"] += dual or two_sided
        sums["ratio_mean"] += ratio
        sums["kl_old_k1"] -= log_ratio
        sums["kl_old_k3"] += ratio - 1 - log_ratio
        sums["kl_ref"] += k3
        sums["ratio_max"] = max(sums["ratio_max"], ratio)
    keep = ("tokens", "ratio_max")
    summary = {n: v if n in keep else v / max(sums["tokens"], 1) for n, v in sums.items()}
    summary["sequences"] = float((batch.weights != 0).sum())
    return SimpleNamespace(loss=loss, grad=grads, summary=summary)


def same_dtype_pytorch(batch, upstream: float = 1.0, **given) -> SimpleNamespace:
    """The usual trainer code, every tensor and every step in the dtype of the log-probs."""
    o = SimpleNamespace(**{"eps_low": 0.2, "eps_high": 0.2, "beta": 0.0, **given})
    narrow = batch.map(lambda tensor: tensor.to(batch.log_probs.dtype))
    log_probs = narrow.log_probs.detach().requires_grad_()
    mask = narrow.counted()
    old = log_probs.detach() if narrow.old_log_probs is None else narrow.old_log_probs
    ratio = torch.exp((log_probs - old).masked_fill(~mask, 0.0).clamp(-20, 20))
    advantages = narrow.spread(narrow.advantages)
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - o.eps_low, 1 + o.eps_high) * advantages)
    if narrow.rollout_weights is not None:
        loss = loss * narrow.spread(narrow.rollout_weights)
    if o.beta:
        difference = (narrow.ref_log_probs - log_probs).masked_fill(~mask, 0.0)
        loss = loss + o.beta * (difference.exp() - difference - 1)
    total = (loss * narrow.spread(narrow.weights) * mask).sum()
    (grad,) = torch.autograd.grad(total, log_probs, torch.full_like(total, upstream))
    return SimpleNamespace(loss=total.detach(), grad=grad)


def largest(values: torch.Tensor) -> float:
    return values.abs().amax().item() if values.numel() else 0.0


def check(impl, batch, got, true, upstream: float = 1.0, **options) -> None:
    dtype = batch.log_probs.dtype
    assert got.loss.dtype == torch.float32 and got.loss.shape == ()
    assert got.grad.dtype == dtype and got.grad.shape == batch.log_probs.shape
    counted = batch.counted()
    assert torch.equal(got.grad[~counted], torch.zeros_like(got.grad[~counted]))
    loss_error = (got.loss.double() - true.loss).abs().item()
    grad_error = largest(got.grad.double() - true.grad)
    loss_budget = FP32_BUDGET * true.loss_scale
    grad_budget = FP32_BUDGET * true.grad_scale
    if dtype != torch.float32:
        eager = same_dtype_pytorch(batch, upstream, **options)
        eager_loss_error = (eager.loss.double() - true.loss).abs().item()
        eager_grad_error = largest(eager.grad.double() - true.grad)
        loss_budget = max(loss_budget, eager_loss_error)
        # On a handful of tokens eager code may be right by luck: the result has to be rounded to
        # the dtype at least once, and once more when it is scaled after it was stored.
        roundings = 1 if upstream == 1.0 else 2
        if impl == "triton" and dtype == torch.bfloat16 and not got.grad.is_cuda:
            roundings *= 2  # Triton's interpreter truncates to bf16 where a GPU rounds
        rounding = roundings * (HALF_ULP[dtype] * true.grad_scale + SUBNORMAL[dtype])
        grad_budget += max(eager_grad_error, rounding)
    assert loss_error <= loss_budget, f"loss off by {loss_error:.3g}, budget {loss_budget:.3g}"
    assert grad_error <= grad_budget, f"grad off by {grad_error:.3g}, budget {grad_budget:.3g}"


@pytest.mark.parametrize("options", OPTIONS)
def test_reference_is_the_formula(options, make_batch, truth):
    """Two float64 evaluations: 1e-12 is some thousand roundings."""
    kind, given = OPTIONS[options]
    batch = make_batch([5, 0, 9, 3, 17], holes=True, **kind)
    true, brute = truth(batch, **given), brute_force(batch, **given)
    assert true.loss.item() == pytest.approx(brute.loss, rel=1e-12, abs=1e-15)
    grad = torch.tensor(brute.grad, dtype=torch.float64).reshape(true.grad.shape)
    torch.testing.assert_close(true.grad.cpu(), grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed", "packed_mask"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, layout, dtype, impl, make_batch, run_loss, truth):
    lengths, width = SHAPES[shape]
    batch = make_batch(lengths, width, layout=layout, dtype=dtype, holes=layout == "packed_mask")
    check(impl, batch, run_loss(impl, batch), truth(batch))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["padded", "packed", "packed_mask"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, layout, impl, make_batch, run_loss, truth):
    kind, given = OPTIONS[options]
    # Two tiles, holes, an empty sequence, sequences that begin inside a tile.
    batch = make_batch([60, 0, 399, 3, 350], 400, layout=layout, holes=True, **kind)
    upstream = -1.7
    got = run_loss(impl, batch, upstream=upstream, **given)
    check(impl, batch, got, truth(batch, upstream=upstream, **given), upstream)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", ["kl", "rollout_per_token", "advantages_per_token", "no_old"])
def test_options_in_16_bits(options, dtype, impl, make_batch, run_loss, truth):
    kind, given = OPTIONS[options]
    batch = make_batch([600, 0, 399, 703, 500], 703, dtype=dtype, holes=True, **kind)
    for upstream in (1.0, 0.37):
        got = run_loss(impl, batch, upstream=upstream, **given)
        check(impl, batch, got, truth(batch, upstream=upstream, **given), upstream, **given)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_options_in_combination(impl, make_batch, run_loss, truth):
    """The product of the options, on one small batch."""
    choices = itertools.product(
        ["padded", "packed_mask"],
        [{"dual_clip": None}, {"dual_clip": 1.4}],
        [{"delta": None}, {"delta": 1.5}],
        [{"log_ratio_clamp": 0.45}, {"log_ratio_clamp": 20.0}],
        [({}, {}), ({"ref": True}, {"beta": 0.2})],
        [{"rollout": None}, {"rollout": "sequence"}, {"rollout": "token"}],
        [{"advantages": "sequence"}, {"advantages": "token"}],
    )
    for seed, (layout, dual, delta, clamp, (ref, beta), rollout, advantages) in enumerate(choices):
        batch = make_batch(
            [3, 0, 8, 5], 8, layout=layout, holes=True, seed=seed, **ref, **rollout, **advantages
        )
        given = {"eps_low": 0.3, "eps_high": 0.25, **dual, **delta, **clamp, **beta}
        check(impl, batch, run_loss(impl, batch, **given), truth(batch, **given))


def sliced(tensor: torch.Tensor) -> torch.Tensor:
    """The values of ``tensor`` as the inner columns of a wider one, as in log_probs[:, 1:-1]."""
    if tensor.ndim == 1:
        wide = tensor.new_full((2 * tensor.shape[0] + 1,), float("nan"))
        wide[1::2] = tensor
        return wide[1::2]
    wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 2), float("nan"))
    wide[:, 1:-1] = tensor
    return wide[:, 1:-1]


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t() if tensor.ndim == 2 else sliced(tensor)


STREAMS = ("log_probs", "old_log_probs", "ref_log_probs", "advantages", "rollout_weights", "mask")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["padded", "packed", "packed_mask"])
@pytest.mark.parametrize("restride", [sliced, transposed])
def test_strides(restride, layout, impl, make_batch, run_loss, truth):
    """One stream strided among contiguous ones, and all of them, over two tiles."""
    batch = make_batch(
        [600, 3, 599], 603, layout=layout, holes=True, ref=True, advantages="token",
        rollout="token", mask_dtype=torch.float32,
    )  # fmt: skip
    true = truth(batch, beta=0.1)
    names = [name for name in STREAMS if getattr(batch, name) is not None]
    for chosen in (*((name,) for name in names), names):
        changed = batch.replace(**{name: restride(getattr(batch, name)) for name in chosen})
        assert not getattr(changed, chosen[0]).is_contiguous()
        check(impl, changed, run_loss(impl, changed, beta=0.1), true)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides_of_per_sequence_tensors(impl, make_batch, run_loss):
    """Columns of a table of metadata, and cu_seqlens every other entry of something."""
    for layout in ("padded", "packed"):
        batch = make_batch([6, 2, 9], layout=layout, rollout="sequence")
        expected = run_loss(impl, batch)
        changed = batch.replace(
            **{name: torch.stack([getattr(batch, name)] * 2, 1)[:, 1]
               for name in ("advantages", "weights", "rollout_weights")}
        )  # fmt: skip
        if batch.cu_seqlens is not None:
            offsets = torch.stack([batch.cu_seqlens, torch.full_like(batch.cu_seqlens, -5)], 1)
            changed = changed.replace(cu_seqlens=offsets[:, 0])
        got = run_loss(impl, changed)
        assert torch.equal(got.loss, expected.loss)
        assert torch.equal(got.grad, expected.grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_expanded_constants(impl, make_batch, run_loss, truth):
    """Stride 0 along either axis, of constants and of the log-probs themselves."""
    batch = make_batch([600, 3, 599], 603, rollout="token")
    shape = batch.log_probs.shape
    for changed in (
        batch.replace(advantages=batch.advantages[:, None].expand(shape)),
        batch.replace(rollout_weights=batch.rollout_weights[:1].expand(shape)),
        batch.replace(old_log_probs=batch.old_log_probs[0, 0].expand(shape)),
        batch.replace(mask=batch.mask[:1].expand(shape)),
        batch.replace(log_probs=batch.log_probs[:1].expand(shape)),
    ):
        check(impl, changed, run_loss(impl, changed), truth(changed))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_random_upstream_gradients(impl, make_batch, run_loss, truth):
    batch = make_batch([30, 7, 0, 55], holes=True)
    for upstream in torch.randn(5, generator=torch.Generator().manual_seed(0)).tolist():
        got = run_loss(impl, batch, upstream=upstream)
        check(impl, batch, got, truth(batch, upstream=upstream), upstream)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_ratios(impl, make_batch, run_loss, truth):
    """Ratios up to the clamp at e^20 and past it, on both sides."""
    batch = make_batch([50, 50], 50)
    shifts = torch.linspace(-40, 40, 100, device=batch.log_probs.device).reshape(2, 50)
    batch = batch.replace(old_log_probs=batch.log_probs - shifts)
    for given in ({}, {"dual_clip": 3.0}, {"log_ratio_clamp": 5.0}):
        check(impl, batch, run_loss(impl, batch, **given), truth(batch, **given))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_mask_counts_where_it_is_not_zero(impl, make_batch, run_loss):
    """A float mask of 0.5 or 7 counts once: it is no weight."""
    batch = make_batch([20, 5], 20, holes=True)
    expected = run_loss(impl, batch)
    for value in (0.5, 7.0):
        got = run_loss(impl, batch.replace(mask=batch.mask.float() * value))
        assert torch.equal(got.loss, expected.loss)
        assert torch.equal(got.grad, expected.grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_value_each_is_per_sequence(impl, make_batch, run_loss, device):
    """A packed stream with as many tokens as sequences: (G,) and (N,) look alike."""
    batch = make_batch([2, 0, 1], layout="packed", rollout="sequence")
    assert batch.log_probs.shape == batch.advantages.shape
    spread = torch.tensor([0, 0, 2], device=device)
    brute = brute_force(
        batch.replace(
            log_probs=batch.log_probs[:, None],
            old_log_probs=batch.old_log_probs[:, None],
            advantages=batch.advantages[spread],
            rollout_weights=batch.rollout_weights[spread],
            weights=batch.weights[spread],
            cu_seqlens=None,
        )
    )
    got = run_loss(impl, batch)
    assert got.loss.item() == pytest.approx(brute.loss, rel=2e-6)
    torch.testing.assert_close(got.grad.cpu(), torch.tensor(brute.grad), rtol=2e-6, atol=0)


# -- no tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("lengths", "width", "layout"),
    [([], 0, "padded"), ([], 7, "padded"), ([0, 0], 0, "padded"), ([], 0, "packed"),
     ([0, 0, 0], 0, "packed"), ([0, 0], 5, "packed_mask"), ([0, 0], 3000, "padded")],
)  # fmt: skip
def test_nothing_counts(lengths, width, layout, impl, make_batch, run_loss, poison_empty):
    batch = make_batch(lengths, width, layout=layout, ref=True, rollout="sequence")
    got = run_loss(impl, batch, beta=0.1, return_metrics=True)
    assert got.loss.item() == 0.0
    assert torch.equal(got.grad, torch.zeros_like(batch.log_probs))
    assert all(value.item() == 0.0 for value in got.metrics.summary().values())


# -- ties ------------------------------------------------------------------------------------


def one_token(make_batch, log_ratio: float, advantage: float):
    batch = make_batch([1], 1, max_length=1)
    return batch.replace(
        log_probs=torch.full_like(batch.log_probs, -1.0),
        old_log_probs=torch.full_like(batch.log_probs, -1.0 - log_ratio),
        advantages=torch.full_like(batch.advantages, advantage),
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "option"),
    [(0.25, 1.0, "eps_high"), (-0.25, -1.0, "eps_low"), (0.25, 1.0, "delta"),
     (0.5, -1.0, "delta"), (0.5, -1.0, "dual_clip")],
)  # fmt: skip
def test_a_ratio_on_the_bound_has_a_gradient(
    log_ratio, advantage, option, impl, make_batch, run_loss
):
    """torch.clamp's subgradient: a bound belongs to the branch with a gradient, and the next
    float beyond it does not. The ratio is the implementation's own, so the tie is exact."""
    batch = one_token(make_batch, log_ratio, advantage)
    wide_open = {"eps_low": 0.9, "eps_high": 3.0}
    if option == "delta" and advantage < 0:
        wide_open["eps_high"] = 0.1  # else max(delta, 1 + eps_high) is not delta
    open_run = run_loss(impl, batch, **wide_open, return_metrics=True)
    ratio = open_run.metrics.ratio_max.cpu()
    beyond = torch.nextafter(ratio, torch.tensor(1.0))  # the bound one ulp nearer to 1

    def bound(value: torch.Tensor) -> dict[str, float]:
        offset = {"eps_high": value.double() - 1, "eps_low": 1 - value.double()}
        return {**wide_open, option: offset.get(option, value.double()).item()}

    on = run_loss(impl, batch, **bound(ratio))
    assert on.grad.item() == pytest.approx(-advantage * ratio.item(), rel=1e-6)
    past = run_loss(impl, batch, **bound(beyond))
    assert past.grad.item() == 0.0
    assert past.loss.item() == pytest.approx(-advantage * beyond.item(), rel=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_ratio_one_with_no_clip_range(advantage, impl, make_batch, run_loss):
    """eps = 0 and equal log-probs: the ratio lies on both bounds at once."""
    for old in (True, False):
        batch = one_token(make_batch, 0.0, advantage)
        batch = batch if old else batch.replace(old_log_probs=None)
        got = run_loss(impl, batch, eps_low=0.0, eps_high=0.0)
        assert (got.loss.item(), got.grad.item()) == (-advantage, -advantage)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("sign", "advantage"), [(1, -1.0), (-1, 1.0)])
def test_log_ratio_on_the_clamp(sign, advantage, impl, make_batch, run_loss):
    """-1 - (-21) is exactly 20 in fp32: the bound itself has a gradient, the next float none."""
    batch = one_token(make_batch, 20.0 * sign, advantage)
    ratio = math.exp(20.0 * sign)
    on = run_loss(impl, batch)
    assert on.grad.item() == pytest.approx(-advantage * ratio, rel=2e-6)
    far = torch.full_like(batch.old_log_probs, -math.inf * sign)
    beyond = batch.replace(old_log_probs=torch.nextafter(batch.old_log_probs, far))
    assert abs((beyond.log_probs - beyond.old_log_probs).item()) > 20
    past = run_loss(impl, beyond)
    assert past.grad.item() == 0.0
    assert past.loss.item() == pytest.approx(-advantage * ratio, rel=2e-6)
    unclamped = run_loss(impl, beyond, log_ratio_clamp=None)
    assert unclamped.grad.item() == pytest.approx(-advantage * ratio, rel=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_zero_advantage(impl, make_batch, run_loss):
    """No policy term on either side of either clip, and the KL term untouched."""
    batch = make_batch([40, 9], 40, ref=True)
    batch = batch.replace(advantages=torch.zeros_like(batch.advantages))
    got = run_loss(impl, batch, return_metrics=True)
    assert got.loss.item() == 0.0
    assert torch.equal(got.grad, torch.zeros_like(got.grad))
    assert got.metrics.clipped_low.item() == got.metrics.clipped_high.item() == 0.0
    with_kl = run_loss(impl, batch, beta=0.5)
    assert with_kl.grad[0].abs().min() > 0


# -- NaN and poison --------------------------------------------------------------------------

NANS = {
    "log_probs": {},
    "old_log_probs": {},
    "advantages": {"advantages": "sequence"},
    "advantages_per_token": {"advantages": "token"},
    "rollout_weights": {"rollout": "sequence"},
    "rollout_weights_per_token": {"rollout": "token"},
    "ref_log_probs": {"ref": True},
    "weights": {},
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", NANS)
def test_a_nan_that_counts_is_not_hidden(name, layout, impl, make_batch, run_loss):
    """Clips and maxima must not swallow it: max(NaN, 0) is 0 in some instruction sets."""
    options = {"beta": 0.1} if name == "ref_log_probs" else {}
    field = name.removesuffix("_per_token")
    for given in ({}, {"dual_clip": 3.0, "delta": 2.0, "log_ratio_clamp": 5.0}):
        batch = make_batch([6, 4], 9, layout=layout, **NANS[name])
        tensor = getattr(batch, field).clone()
        tensor[(0,) * tensor.ndim] = math.nan
        got = run_loss(impl, batch.replace(**{field: tensor}), **options, **given)
        assert got.loss.isnan().item()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 500.0])
def test_ref_without_beta_is_a_metric_alone(value, impl, make_batch, run_loss):
    """0 * NaN and 0 * exp(500) are NaN: with beta = 0 neither may reach the loss."""
    batch = make_batch([6, 4], 9, ref=True)
    expected = run_loss(impl, batch.replace(ref_log_probs=None))
    ref = batch.ref_log_probs.clone()
    ref[0, 0] = value
    for return_metrics in (False, True):
        got = run_loss(
            impl, batch.replace(ref_log_probs=ref), beta=0.0, return_metrics=return_metrics
        )
        assert torch.equal(got.loss, expected.loss)
        assert torch.equal(got.grad, expected.grad)
    assert not got.metrics.kl_ref.isfinite().item()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_without_old_the_ratio_is_one(impl, make_batch, run_loss):
    """Exactly, whatever the log-probs hold: their values are not read."""
    batch = make_batch([6, 4], 9, old=False)
    expected = run_loss(impl, batch)
    log_probs = batch.log_probs.clone()
    log_probs[0, :2] = torch.tensor([math.nan, -math.inf])
    got = run_loss(impl, batch.replace(log_probs=log_probs), return_metrics=True)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got.grad, expected.grad)
    assert got.metrics.ratio_max.item() == 1.0 and got.metrics.ratio.item() == 10.0


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["padded", "packed_mask"])
@pytest.mark.parametrize("width", [9, 1])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_positions_may_hold_anything(
    poison, width, layout, impl, make_batch, run_loss, poison_empty
):
    """Alone and all together, in every token stream: the bits of zeros there."""
    fields = ("log_probs", "old_log_probs", "ref_log_probs", "advantages", "rollout_weights")
    for seed in range(2):
        batch = make_batch(
            [min(width, n) for n in (9, 0, 4, 6)], width, layout=layout, holes=True, ref=True,
            advantages="token", rollout="token", seed=seed,
        )  # fmt: skip
        ignored = ~batch.counted()
        zeroed = batch.replace(
            **{name: getattr(batch, name).masked_fill(ignored, 0.0) for name in fields}
        )
        expected = run_loss(impl, zeroed, beta=0.1, return_metrics=True)
        for names in (*((name,) for name in fields), fields):
            poisoned = zeroed.replace(
                **{name: getattr(zeroed, name).masked_fill(ignored, poison) for name in names}
            )
            got = run_loss(impl, poisoned, beta=0.1, return_metrics=True)
            assert got.loss.isfinite().item(), names
            assert torch.equal(got.loss, expected.loss), names
            assert torch.equal(got.grad, expected.grad), names
            for key, value in got.metrics.summary().items():
                assert torch.equal(value, expected.metrics.summary()[key]), (names, key)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", ["padded", "packed_mask"])
def test_an_empty_sequence_may_have_any_advantage(layout, poison, impl, make_batch, run_loss):
    """A group's standard deviation of rewards may be NaN; without tokens it cannot matter."""
    batch = make_batch([5, 0, 3], 8, layout=layout, rollout="sequence")
    expected = run_loss(impl, batch)
    for name in ("advantages", "rollout_weights"):
        values = getattr(batch, name).clone()
        values[1] = poison
        got = run_loss(impl, batch.replace(**{name: values}))
        assert torch.equal(got.loss, expected.loss)
        assert torch.equal(got.grad, expected.grad)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_every_output_is_written(impl, make_batch, run_loss, poison_empty):
    """torch.empty holds NaN: each output position has to be written, padding too."""
    for lengths, width in (([3, 0, 5], 7), ([1025, 0, 7], 1300), ([10], 3000)):
        for dtype in (torch.float32, torch.float16):
            batch = make_batch(lengths, width, dtype=dtype, holes=True)
            got = run_loss(impl, batch, return_metrics=True)
            assert got.loss.isfinite().item()
            assert got.grad.isfinite().all()
            assert all(value.isfinite().item() for value in got.metrics.summary().values())


# -- metrics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["padded", "packed", "packed_mask"])
@pytest.mark.parametrize(
    "options",
    ["defaults", "dual_clip", "dual_clip_inside_range", "delta", "delta_inside_range",
     "delta_above_dual_clip", "log_ratio_clamp", "kl", "ref_without_beta", "no_old",
     "advantages_per_token"],
)  # fmt: skip
def test_metrics(options, layout, impl, make_batch, run_loss, poison_empty):
    kind, given = OPTIONS[options]
    batch = make_batch([5, 0, 9, 3, 17], 20, holes=True, layout=layout, seed=3, **kind)
    got = run_loss(impl, batch, **given, return_metrics=True).metrics.summary()
    expected = brute_force(batch, **given).summary
    assert set(got) == {*expected}
    for name, value in got.items():
        assert value.shape == () and value.device == batch.log_probs.device
        # Sums of some dozen fp32 numbers; k3 near 0 is a difference of numbers near 1.
        assert value.item() == pytest.approx(expected[name], rel=2e-6, abs=5e-7), name
    for name in ("tokens", "sequences"):
        assert got[name].item() == expected[name]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_metrics_add_up_over_micro_batches(impl, make_batch, run_loss):
    batch = make_batch([5, 0, 9, 3, 17, 1], 20, holes=True, ref=True)
    options = {"dual_clip": 1.3, "return_metrics": True}
    whole = run_loss(impl, batch, **options).metrics
    parts = [
        run_loss(impl, batch.rows(rows), **options).metrics
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    together = (parts[0] + parts[1] + parts[2]).summary()
    for name, value in whole.summary().items():
        assert together[name].item() == pytest.approx(value.item(), rel=1e-6, abs=1e-7), name
    assert whole.ratio_max.item() == max(part.ratio_max.item() for part in parts)
    assert (parts[0] + parts[2]).tokens.item() == parts[0].tokens.item() + parts[2].tokens.item()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_metrics_do_not_change_the_loss(impl, make_batch, run_loss):
    """Nor does grad mode change the metrics, and a metric has no gradient."""
    batch = make_batch([5, 1030, 9], 1100, holes=True)
    plain = run_loss(impl, batch)
    measured = run_loss(impl, batch, return_metrics=True)
    assert torch.equal(plain.loss, measured.loss)
    assert torch.equal(plain.grad, measured.grad)
    function = dl_norm.reference.policy_loss if impl == "reference" else dl_norm.policy_loss
    choice = {} if impl == "reference" else {"impl": impl}
    with torch.no_grad():
        loss, metrics = function(*batch.args(), **choice, return_metrics=True)
    assert torch.equal(loss, plain.loss) and not loss.requires_grad
    for name, value in metrics.summary().items():
        assert not value.requires_grad
        assert torch.equal(value, measured.metrics.summary()[name])


def test_ratio_max_finds_the_one_outlier(make_batch, run_loss):
    """In the last tile of several, masked outliers ignored."""
    batch = make_batch([3000], 3001)
    old = batch.old_log_probs.clone()
    old[0, 2999] = batch.log_probs[0, 2999] - 4.0
    old[0, 3000] = batch.log_probs[0, 3000] - 9.0  # masked
    for impl in IMPLEMENTATIONS:
        metrics = run_loss(impl, batch.replace(old_log_probs=old), return_metrics=True).metrics
        assert metrics.ratio_max.item() == pytest.approx(math.exp(4.0), rel=2e-6)


def test_typed_keywords_are_those_of_the_function():
    """For type checkers the options are named a second time."""
    parameters = inspect.signature(dl_norm.policy_loss).parameters.values()
    keywords = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    del keywords["return_metrics"]
    typed = {name: of.__forward_arg__ for name, of in CallOptions.__annotations__.items()}
    assert typed == keywords
