"""Sequence weights: published vectors, identities between the methods, empty batches, bad input.

The arithmetic is float64 and the result float32, so a vector is matched to half an ulp of float32
(6e-8), and 1e-7 is asked for. Identities between two results may differ by twice that.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dl_norm

FP32 = 1e-7  # half an ulp, 6e-8, and the float64 arithmetic behind it
METHODS = ("delta_l", "grpo", "dapo", "dr_grpo")
LENGTH_SETS = [[10, 100, 1000], [7, 64, 512, 3072], [1, 3072], [5], [8, 8, 8], [3, 0, 40, 0, 1]]

# Weights for lengths, alpha, M.
VECTORS = [
    ([10, 100, 1000], 0.0, 1, [1 / 3] * 3),
    ([10, 100, 1000], 0.0, 3072, [1.0850694444444444e-4] * 3),
    ([10, 100, 1000], 0.5, 1, [0.7061011116965423, 0.22328877713380335, 0.07061011116965424]),
    ([10, 100, 1000], 0.5, 3072,
     [2.2985062229705154e-4, 7.268514880657661e-5, 2.2985062229705155e-5]),
    ([10, 100, 1000], 0.75, 1, [0.826821618643347, 0.1470319860208518, 0.026146395335801154]),
    ([10, 100, 1000], 0.75, 3072,
     [2.6914766231879786e-4, 4.786197461616269e-5, 8.511196398372771e-6]),
    ([10, 100, 1000], 1.0, 1, [0.9009009009009009, 0.09009009009009009, 0.009009009009009009]),
    ([10, 100, 1000], 1.0, 3072,
     [2.93262012012012e-4, 2.93262012012012e-5, 2.93262012012012e-6]),
    ([7, 64, 512, 3072], 1.0, 1,
     [0.888631761643043, 0.09719409892970785, 0.01214926236621348, 0.00202487706103558]),
    ([7, 64, 512, 3072], 0.75, 1,
     [0.806060060724213, 0.1533048704416524, 0.03222837899883015, 0.008406689835304475]),
    ([1, 3072], 1.0, 1, [0.9996745850959975, 3.2541491400260335e-4]),
]  # fmt: skip

# Mean-1 factors of the official code for [10, 100, 1000].
FACTORS = {
    0.0: [1.0, 1.0, 1.0],
    0.5: [2.118303335089627, 0.66986633140141, 0.2118303335089627],
    0.75: [2.480464855930041, 0.4410959580625554, 0.07843918600740347],
    1.0: [2.7027027027027026, 0.2702702702702703, 0.02702702702702703],
}

# Variance of the weighted sum under Var(g_i) = L_i, M = 1.
VARIANCES = [
    ([10, 100, 1000], 0.0, 123.33333333333331),
    ([10, 100, 1000], 0.5, 14.957363398172792),
    ([10, 100, 1000], 0.75, 9.681814370939643),
    ([10, 100, 1000], 1.0, 9.009009009009008),
    ([7, 64, 512, 3072], 1.0, 6.220422331501301),
    ([7, 64, 512, 3072], 0.75, 6.801186226344415),
]


def weights_of(device, lengths, method="delta_l", **options) -> torch.Tensor:
    if method in ("delta_l", "dr_grpo"):
        options.setdefault("max_length", 1)
    return dl_norm.sequence_weights(torch.tensor(lengths, device=device), method, **options)


def same(got: torch.Tensor, expected, rel: float = FP32) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.double().cpu(), expected.cpu(), rtol=rel, atol=0)


@pytest.mark.parametrize(("lengths", "alpha", "max_length", "expected"), VECTORS)
def test_delta_l_vectors(lengths, alpha, max_length, expected, device):
    got = weights_of(device, lengths, alpha=alpha, max_length=max_length)
    assert got.dtype == torch.float32 and got.shape == (len(lengths),)
    assert got.device.type == device.type
    same(got, expected)


@pytest.mark.parametrize(("lengths", "alpha", "expected"), VARIANCES)
def test_variance_under_the_papers_model(lengths, alpha, expected, device):
    weights = weights_of(device, lengths, alpha=alpha).double().cpu()
    variance = (weights.square() * torch.tensor(lengths)).sum().item()
    assert variance == pytest.approx(expected, rel=2 * FP32)


def test_bias_and_variance_of_the_other_methods(device):
    lengths = torch.tensor([10, 100, 1000])
    known = {
        "grpo": (0.037, 0.012333333333333333, 3.0015011259383213),
        "dapo": (0.002702702702702703, 9.009009009009009e-4, 11.105554165971787),
        "dr_grpo": (1.0, 123.33333333333331, 11.105554165971787),
        "delta_l": (1.0, 9.009009009009008, 3.0015011259383213),
    }
    for method, (mean, variance, variation) in known.items():
        weights = weights_of(device, lengths.tolist(), method).double().cpu()
        got_mean, got_variance = weights.sum().item(), (weights.square() * lengths).sum().item()
        assert got_mean == pytest.approx(mean, rel=FP32), method
        assert got_variance == pytest.approx(variance, rel=2 * FP32), method
        assert math.sqrt(got_variance) / got_mean == pytest.approx(variation, rel=2 * FP32), method


@pytest.mark.parametrize("lengths", LENGTH_SETS)
def test_definitions(lengths, device):
    """The table of methods in plain Python floats."""
    counted = [n for n in lengths if n]
    for alpha in (0.0, 0.3, 1.0, 1.7):
        total = sum(n**-alpha for n in counted)
        expected = [n**-alpha / total / 50 if n else 0.0 for n in lengths]
        same(weights_of(device, lengths, alpha=alpha, max_length=50), expected)
    grpo = [1 / (len(counted) * n) if n else 0.0 for n in lengths]
    same(weights_of(device, lengths, "grpo"), grpo)
    dapo = [1 / sum(counted) if n else 0.0 for n in lengths]
    same(weights_of(device, lengths, "dapo"), dapo)
    dr_grpo = [1 / (len(counted) * 50) if n else 0.0 for n in lengths]
    same(weights_of(device, lengths, "dr_grpo", max_length=50), dr_grpo)


@pytest.mark.parametrize("lengths", LENGTH_SETS)
def test_identities_between_the_methods(lengths, device):
    counted = [n for n in lengths if n]
    mean = sum(counted) / len(counted)
    harmonic = len(counted) / sum(1 / n for n in counted)
    maximum = 3072
    delta_l = weights_of(device, lengths, max_length=maximum).double()
    grpo = weights_of(device, lengths, "grpo").double()
    dapo = weights_of(device, lengths, "dapo").double()
    dr_grpo = weights_of(device, lengths, "dr_grpo", max_length=maximum).double()
    same(delta_l, grpo * harmonic / maximum, 2 * FP32)
    same(dr_grpo, dapo * mean / maximum, 2 * FP32)
    same(dr_grpo, weights_of(device, lengths, alpha=0.0, max_length=maximum), 2 * FP32)
    lengths = torch.tensor(lengths, device=device)
    ratio = (dr_grpo.square() * lengths).sum() / (delta_l.square() * lengths).sum()
    assert ratio.item() == pytest.approx(mean / harmonic, rel=4 * FP32)
    assert ratio.item() >= 1 - 4 * FP32
    for weights in (delta_l, dr_grpo):
        assert weights.sum().item() == pytest.approx(1 / maximum, rel=FP32)


def test_published_ratio_of_means():
    lengths = [7, 64, 512, 3072]
    ratio = sum(lengths) / 4 / (4 / sum(1 / n for n in lengths))
    assert ratio == pytest.approx(36.723792666480655, rel=1e-14)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0, 2.0])
def test_equal_lengths_and_one_sequence(alpha, device):
    same(weights_of(device, [17] * 6, alpha=alpha, max_length=9), [1 / (6 * 9)] * 6)
    same(weights_of(device, [17], alpha=alpha, max_length=9), [1 / 9])


@pytest.mark.parametrize("method", METHODS)
def test_empty_sequences_are_left_out(method, device):
    with_empty = weights_of(device, [0, 5, 0, 9, 1, 0], method)
    without = weights_of(device, [5, 9, 1], method)
    assert torch.equal(with_empty[[1, 3, 4]], without)
    assert torch.equal(with_empty[[0, 2, 5]], torch.zeros(3, device=device))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lengths", [[0], [0, 0, 0], []])
def test_nothing_counts(method, lengths, device):
    constants = {"max_length": 1} if method in ("delta_l", "dr_grpo") else {}
    empty = torch.tensor(lengths, dtype=torch.int64, device=device)
    got = dl_norm.sequence_weights(empty, method, **constants)
    assert torch.equal(got, torch.zeros(len(lengths), device=device))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint8], ids=str)
def test_integer_dtypes(dtype, device):
    got = dl_norm.sequence_weights(
        torch.tensor([10, 100], dtype=dtype, device=device), max_length=1
    )
    same(got, [10 / 11, 1 / 11])


def test_sum_of_small_integers_does_not_wrap(device):
    lengths = torch.full((4,), 200, dtype=torch.uint8, device=device)
    same(dl_norm.sequence_weights(lengths, "dapo"), [1 / 800] * 4)


def test_a_million_tokens(device):
    """float32 powers would be good to 1e-6 or so at this length, and sums of them to less."""
    lengths = [1_000_000, 1, 999_999, 123_456]
    for alpha in (0.75, 1.0):
        total = math.fsum(n**-alpha for n in lengths)
        expected = [n**-alpha / total / 1_000_000 for n in lengths]
        same(weights_of(device, lengths, alpha=alpha, max_length=1_000_000), expected)
    total = sum(lengths) * 1000
    same(weights_of(device, lengths * 1000, "dapo"), [1 / total] * 4000)


def test_large_exponent_keeps_the_sum(device):
    """At the largest alpha and length no power underflows: the weights sum to 1 / M."""
    got = weights_of(device, [1_000_000, 1_000_000, 2_000_000], alpha=16.0, max_length=2)
    assert got.sum().item() == pytest.approx(0.5, rel=FP32)


# -- reweight_advantages: the official code's form ------------------------------------------------


@pytest.mark.parametrize("alpha", FACTORS)
def test_official_factors(alpha, device):
    lengths = torch.tensor([10, 100, 1000], device=device)
    got = dl_norm.reweight_advantages(torch.ones(3, device=device), lengths, alpha=alpha)
    same(got, FACTORS[alpha])
    assert got.mean().item() == pytest.approx(1.0, rel=2 * FP32)
    # r / (G M) is the weight at M.
    weights = weights_of(device, [10, 100, 1000], alpha=alpha, max_length=3072)
    same(got.double() / (3 * 3072), weights, 2 * FP32)


def test_official_code_over_two_mini_batches(device):
    """The factors are of the whole rollout; the official loss then averages each mini-batch."""
    lengths = torch.tensor([10, 100, 1000, 20, 200, 2000], device=device)
    got = dl_norm.reweight_advantages(torch.ones(6, device=device), lengths)
    expected = [3.6036036036036037, 0.36036036036036034, 0.036036036036036036,
                1.8018018018018018, 0.18018018018018017, 0.018018018018018018]  # fmt: skip
    same(got, expected)
    first_half = got[:3].double() / (3 * 3072)
    same(first_half, [3.91016016016016e-4, 3.91016016016016e-5, 3.91016016016016e-6])


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("per_token", [False, True])
def test_reweighted_advantages_give_the_delta_l_loss(alpha, per_token, make_batch, run_loss):
    """The identity through the loss itself: Dr. GRPO over reweighted advantages, with clips on."""
    options = {"dual_clip": 1.4, "eps_high": 0.28}
    kind = "token" if per_token else "sequence"
    batch = make_batch([5, 0, 9, 30, 17], 30, holes=True, advantages=kind)
    lengths = batch.mask.sum(1)
    weighted = batch.replace(weights=dl_norm.sequence_weights(lengths, alpha=alpha, max_length=30))
    reweighted = batch.replace(
        advantages=dl_norm.reweight_advantages(batch.advantages, lengths, alpha=alpha),
        weights=dl_norm.sequence_weights(lengths, "dr_grpo", max_length=30),
    )
    for impl in ("torch", "triton", "reference"):
        one, other = run_loss(impl, weighted, **options), run_loss(impl, reweighted, **options)
        # The loss is a sum of both signs: compare to the size of its terms, as for the gradient.
        scale = one.grad.abs().sum().item()
        assert abs(one.loss.item() - other.loss.item()) <= 1e-6 * scale
        torch.testing.assert_close(
            one.grad, other.grad, rtol=1e-6, atol=1e-7 * one.grad.abs().amax().item()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reweighted_advantages_keep_shape_and_dtype(dtype, device):
    lengths = torch.tensor([4, 0, 2], device=device)
    for shape in ((3,), (3, 5)):
        advantages = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        advantages = advantages.to(device, dtype)
        got = dl_norm.reweight_advantages(advantages, lengths)
        assert got.dtype == dtype and got.shape == shape
        assert torch.equal(got[1], torch.zeros_like(got[1]))
        # mean of 1/4 and 1/2 is 3/8
        expected = advantages.float() * torch.tensor([2 / 3, 0.0, 4 / 3], device=device).reshape(
            3, *[1] * (len(shape) - 1)
        )
        torch.testing.assert_close(got, expected.to(dtype))


def test_reweighting_an_empty_batch_gives_zeros(device):
    lengths = torch.zeros(3, dtype=torch.int64, device=device)
    got = dl_norm.reweight_advantages(torch.ones(3, 4, device=device), lengths)
    assert torch.equal(got, torch.zeros(3, 4, device=device))


def test_unknown_advantage_of_an_empty_sequence_stays_out_of_the_loss(make_batch, run_loss):
    """NaN * 0 is NaN: whatever reweighting leaves there, the loss may not see it."""
    batch = make_batch([5, 0, 3], 8)
    advantages = batch.advantages.clone()
    advantages[1] = math.nan
    reweighted = dl_norm.reweight_advantages(advantages, batch.mask.sum(1))
    for impl in ("torch", "triton", "reference"):
        assert run_loss(impl, batch.replace(advantages=reweighted)).loss.isfinite().item()


# -- sequence_lengths ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32], ids=str)
def test_lengths_are_counts_not_last_indices(dtype, device):
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]], device=device).to(dtype)
    assert dl_norm.sequence_lengths(mask).tolist() == [3, 0, 1]
    offsets = torch.tensor([0, 4, 8, 12], dtype=torch.int32, device=device)
    assert dl_norm.sequence_lengths(mask.reshape(-1), offsets).tolist() == [3, 0, 1]
    assert dl_norm.sequence_lengths(None, offsets).tolist() == [4, 4, 4]


def test_lengths_of_a_wide_uint8_mask_do_not_wrap(device):
    mask = torch.ones(2, 1000, dtype=torch.uint8, device=device)
    assert dl_norm.sequence_lengths(mask).tolist() == [1000, 1000]


BAD_MASKS = [
    (None, ValueError, "mask is required for padded input"),
    ([[1, 0]], TypeError, "mask must be a tensor, got list"),
    (torch.ones(2, 2, dtype=torch.complex64), TypeError, "bool, integer or floating point"),
    (torch.ones(5), ValueError, r"mask must be \(B, T\), or \(N,\) with cu_seqlens; got \(5,\)"),
    (torch.ones(2, 3, 1), ValueError, r"mask must be \(B, T\).*got \(2, 3, 1\)"),
    (torch.tensor([[0.0, -math.inf]]), ValueError, "got -inf: that is an additive attention mask"),
    (torch.tensor([[7, -100]]), ValueError, "got -100: that is labels.*labels != -100"),
    (torch.tensor([[1.0, math.nan]]), ValueError, "got nan: that is no mask"),
    (torch.tensor([[1, -1]], dtype=torch.int8), ValueError, "got -1: that is no mask"),
]


@pytest.mark.parametrize(("mask", "error", "message"), BAD_MASKS)
def test_sequence_lengths_refuses(mask, error, message):
    with pytest.raises(error, match=message):
        dl_norm.sequence_lengths(mask)
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        with pytest.raises(error, match=message):
            dl_norm.context_parallel_lengths(mask, "local")


def test_a_padded_mask_is_no_packed_one():
    with pytest.raises(ValueError, match=r"packed, \(N,\); got \(2, 3\).*reshape"):
        dl_norm.sequence_lengths(torch.ones(2, 3), torch.tensor([0, 1, 2]))


# -- how arguments lie in memory, and what a program sets around a call ---------------------------

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def laid_out(draw, tensor: torch.Tensor) -> torch.Tensor:
    """The values of ``tensor`` (with one or two dimensions) as one of the views users have."""
    layout = draw(st.sampled_from(["contiguous", "strided", "offset", "transposed", "expanded"]))
    if layout == "strided":
        return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]
    if layout == "offset":
        return torch.cat([torch.zeros_like(tensor[:1]), tensor])[1:]
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.ndim == 2 else tensor[:, None].contiguous()[:, 0]
    if layout == "expanded" and tensor.unique(dim=0).shape[0] == 1:
        return tensor[:1].expand_as(tensor)
    return tensor


@st.composite
def memory(draw):
    """Arguments in one layout and dtype each, and the same contiguous, in int64 and float64."""
    size = draw(st.integers(1, 6))
    row = st.integers(0, 120)
    constant = draw(st.booleans())  # can be an expanded view

    def values(elements):
        if constant:
            return [draw(elements)] * size
        return draw(st.lists(elements, min_size=size, max_size=size))

    plain = {
        "lengths": torch.tensor(values(row)),
        "groups": torch.tensor(values(st.integers(0, 3))),
        "advantages": torch.tensor(values(st.sampled_from([-2.0, 0.0, 0.5])), dtype=torch.float64),
        "keep": torch.tensor(values(st.booleans())),
        "mask": torch.tensor([values(st.integers(0, 1)) for _ in range(3)]).mT.contiguous(),
    }
    kinds = {"lengths": INTEGERS, "groups": INTEGERS, "keep": [torch.bool],
             "advantages": FLOATS, "mask": [*INTEGERS, *FLOATS, torch.bool]}  # fmt: skip
    views = {
        name: laid_out(draw, tensor.to(draw(st.sampled_from(kinds[name]))))
        for name, tensor in plain.items()
    }
    return plain, views


@given(memory())
def test_layouts_and_dtypes_change_no_bit(arguments):
    plain, views = arguments

    def results(lengths, groups, advantages, keep, mask):
        yield dl_norm.sequence_weights(lengths, alpha=0.75, max_length=9, keep=keep)
        yield dl_norm.sequence_weights(lengths, "prompt_mean", groups=groups)
        yield dl_norm.sequence_weights(lengths, "balanced", groups=groups, advantages=advantages)
        wide = advantages[:, None] * mask.to(advantages.dtype)
        yield dl_norm.reweight_advantages(advantages.float(), lengths)
        yield dl_norm.reweight_advantages(wide.float(), lengths)
        yield dl_norm.sequence_lengths(mask)
        yield dl_norm.context_parallel_lengths(mask, None)
        if bool((lengths > 0).any()):
            yield torch.tensor(dl_norm.reference_length(lengths))

    copies = {name: tensor.clone() for name, tensor in views.items()}
    for got, want in zip(results(**views), results(**plain), strict=True):
        assert got.dtype == want.dtype and got.equal(want)
    assert all(tensor.equal(copies[name]) for name, tensor in views.items())


@given(st.data())
def test_layouts_of_packed_masks(data):
    mask = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=6, max_size=6)))
    offsets = torch.tensor([0, 2, 2, 6])
    want = [int(mask[:2].sum()), 0, int(mask[2:].sum())]
    offsets = laid_out(
        data.draw, offsets.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    )
    mask = laid_out(data.draw, mask.to(data.draw(st.sampled_from([torch.bool, *FLOATS]))))
    assert dl_norm.sequence_lengths(mask, offsets).tolist() == want


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(dtype):
    def results():
        lengths, ids = torch.tensor([10, 100, 0, 1000]), torch.tensor([0, 0, 1, 2])
        advantages = torch.tensor([0.1, -0.3, 0.0, 2.0], dtype=torch.float32)
        for method in ("grpo", "dapo", "luspo"):
            yield dl_norm.sequence_weights(lengths, method)
        yield dl_norm.sequence_weights(lengths, alpha=0.75, max_length=3072)
        yield dl_norm.sequence_weights(lengths, "balanced", groups=ids, advantages=advantages)
        yield dl_norm.reweight_advantages(advantages, lengths, alpha=0.75)
        yield torch.tensor(dl_norm.reference_length(lengths), dtype=torch.float64)

    want = list(results())
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = list(results())
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and one.equal(other)


def test_numbers_of_numpy_are_numbers():
    got = dl_norm.sequence_weights(LENGTHS, alpha=np.float32(0.75), max_length=np.int64(3072))
    assert got.equal(dl_norm.sequence_weights(LENGTHS, alpha=0.75, max_length=3072))
    advantages = torch.ones(2)
    got = dl_norm.reweight_advantages(advantages, LENGTHS, alpha=np.int32(1))
    assert got.equal(dl_norm.reweight_advantages(advantages, LENGTHS))
    for wrong in (np.bool_(True), np.str_("1"), np.array([1.0])):
        with pytest.raises(TypeError, match=r"alpha must be a .*number"):
            dl_norm.sequence_weights(LENGTHS, alpha=wrong, max_length=8)


def test_gradients_pass_through_reweighted_advantages():
    advantages = torch.ones(3, requires_grad=True)
    lengths = torch.tensor([10, 100, 1000])
    dl_norm.reweight_advantages(advantages, lengths).sum().backward()
    factors = dl_norm.reweight_advantages(torch.ones(3), lengths)
    assert advantages.grad.equal(factors)
    weights = dl_norm.sequence_weights(
        lengths, "balanced", groups=torch.zeros(3, dtype=torch.int64), advantages=advantages
    )
    assert not weights.requires_grad


# -- errors --------------------------------------------------------------------------------------

LENGTHS = torch.tensor([3, 1])
BAD_WEIGHTS = [
    ({"lengths": [3, 1]}, TypeError, "lengths must be a tensor, got list"),
    ({"lengths": torch.tensor([3.0])}, TypeError,
     r"integer dtype, got torch.float32.*\(mask != 0\)"),
    ({"lengths": torch.tensor([True])}, TypeError, "integer dtype, got torch.bool"),
    ({"lengths": torch.ones(2, 3, dtype=torch.int64)}, ValueError,
     r"\(G,\), got \(2, 3\).*mask.sum"),
    ({"lengths": torch.tensor(3)}, ValueError, r"\(G,\), got \(\)"),
    ({"lengths": torch.tensor([3, -1])}, ValueError, "lengths must be >= 0, got a negative"),
    ({"method": "ppo"}, ValueError, "one of delta_l, grpo, dapo, .*balanced; got 'ppo'$"),
    ({"alpha": -0.1}, ValueError, "expected 0 <= alpha <= 16 and finite, got alpha=-0.1"),
    ({"alpha": 16.5}, ValueError, "expected 0 <= alpha <= 16 and finite, got alpha=16.5"),
    ({"alpha": math.nan}, ValueError, "finite, got alpha=nan"),
    ({"alpha": math.inf}, ValueError, "finite, got alpha=inf"),
    ({"alpha": "1"}, TypeError, "alpha must be a number, got str"),
    ({"alpha": True}, TypeError, "alpha must be a number, got bool"),
    ({"alpha": torch.tensor(1.0)}, TypeError, "alpha must be a number, got Tensor"),
    ({"max_length": None}, ValueError, "'delta_l' needs max_length.*not read off the padding"),
    ({"max_length": 0}, ValueError, "max_length > 0 and finite, got max_length=0"),
    ({"max_length": -5}, ValueError, "max_length > 0 and finite, got max_length=-5"),
    ({"max_length": math.inf}, ValueError, "max_length > 0 and finite, got max_length=inf"),
    ({"max_length": torch.tensor(5)}, TypeError, "max_length must be a number, got Tensor"),
    ({"method": "dr_grpo", "max_length": None}, ValueError, "'dr_grpo' needs max_length"),
    ({"method": "grpo"}, ValueError, "max_length=8 has no effect on method='grpo'"),
    ({"method": "dapo"}, ValueError, "max_length=8 has no effect on method='dapo'"),
    ({"method": "grpo", "max_length": None, "alpha": 0.5}, ValueError, "alpha=0.5 has no effect"),
    ({"method": "dr_grpo", "alpha": 0.0}, ValueError,
     "alpha=0.0 has no effect on method='dr_grpo'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD_WEIGHTS)
def test_sequence_weights_refuses(change, error, message):
    arguments = {"lengths": LENGTHS, "max_length": 8, **change}
    with pytest.raises(error, match=message):
        dl_norm.sequence_weights(arguments.pop("lengths"), **arguments)


@pytest.mark.parametrize(
    ("advantages", "lengths", "alpha", "error", "message"),
    [
        ([1.0], LENGTHS, 1.0, TypeError, "advantages must be a floating point tensor"),
        (torch.tensor([1, 2]), LENGTHS, 1.0, TypeError, r"floating point tensor.*\.float\(\)"),
        (torch.ones(3), LENGTHS, 1.0, ValueError, r"G = 2 as in lengths, got \(3,\)"),
        (torch.ones(2, 1, 1), LENGTHS, 1.0, ValueError, r"\(G, T\).*got \(2, 1, 1\)"),
        (torch.ones(2), [3, 1], 1.0, TypeError, "lengths must be a tensor, got list"),
        (torch.ones(2), LENGTHS, -1.0, ValueError, "0 <= alpha <= 16 and finite, got alpha=-1.0"),
        (torch.ones(2), LENGTHS.float(), 1.0, TypeError, "integer dtype, got torch.float32"),
    ],
)
def test_reweight_advantages_refuses(advantages, lengths, alpha, error, message):
    with pytest.raises(error, match=message):
        dl_norm.reweight_advantages(advantages, lengths, alpha=alpha)
