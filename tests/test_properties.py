"""Hypothesis: any shape, mask and options give the truth, and any poison the same bits.

Log-ratios come from a grid of multiples of 1/16 and bounds lie off that grid's exponentials, so no
ratio is so near a bound that float32 and float64 would fall on different sides; ties are in
test_policy_loss.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dl_norm

QUICK = settings(
    max_examples=60,
    deadline=None,  # interpreted Triton
    derandomize=True,  # the same examples every run
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
POISONS = [math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0, -7.0]

option_sets = st.fixed_dictionaries(
    {
        "eps_low": st.sampled_from([0.0101, 0.2, 0.9]),
        "eps_high": st.sampled_from([0.0101, 0.28, 2.0]),
        "dual_clip": st.sampled_from([None, 1.1, 3.0]),
        "delta": st.sampled_from([None, 1.15, 2.5]),
        "log_ratio_clamp": st.sampled_from([None, 0.4, 20.0]),
        "beta": st.sampled_from([0.0, 0.3]),
    }
)


@st.composite
def problems(draw):
    """(lengths, width, keyword arguments of make_batch, seed, extra holes)."""
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    width = max(lengths) + draw(st.integers(0, 9))
    if draw(st.booleans()) and draw(st.booleans()):
        width += 1000  # past a tile
    kind = {
        "layout": draw(st.sampled_from(["padded", "packed_mask"])),
        "holes": draw(st.booleans()),
        "old": draw(st.booleans()),
        "ref": True,
        "advantages": draw(st.sampled_from(["sequence", "token"])),
        "rollout": draw(st.sampled_from([None, "sequence", "token"])),
        "method": draw(st.sampled_from(["delta_l", "grpo", "dapo", "dr_grpo"])),
        "mask_dtype": draw(st.sampled_from([torch.bool, torch.uint8, torch.float32])),
        "seed": draw(st.integers(0, 2**20)),
    }
    return lengths, max(width, 1), kind


def on_grid(batch):
    """The batch with log-ratios rounded to multiples of 1/16 and log-probs to 1/1024, exact in
    float32."""
    log_probs = (batch.log_probs * 1024).round() / 1024
    if batch.old_log_probs is None:
        return batch.replace(log_probs=log_probs)
    ratios = ((log_probs - batch.old_log_probs) * 16).round() / 16
    return batch.replace(log_probs=log_probs, old_log_probs=log_probs - ratios)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_any_problem(impl, make_batch, run_loss, truth, poison_empty):
    @QUICK
    @given(problem=problems(), options=option_sets, poison=st.sampled_from(POISONS))
    def check(problem, options, poison):
        lengths, width, kind = problem
        batch = on_grid(make_batch(lengths, width, **kind))
        got = run_loss(impl, batch, **options, return_metrics=True)
        true = truth(batch, **options)
        assert abs(got.loss.item() - true.loss.item()) <= 2e-6 * true.loss_scale
        assert (got.grad - true.grad).abs().amax().item() <= 2e-6 * true.grad_scale
        ignored = ~batch.counted()
        assert got.metrics.tokens.item() == batch.counted().sum().item()

        poisoned = {
            name: tensor.masked_fill(ignored, poison)
            for name, tensor in vars(batch).items()
            if tensor is not None
            and name not in ("mask", "cu_seqlens")
            and tensor.shape == ignored.shape
        }
        again = run_loss(impl, batch.replace(**poisoned), **options, return_metrics=True)
        assert torch.equal(again.loss, got.loss)
        assert torch.equal(again.grad, got.grad)
        for name, value in again.metrics.summary().items():
            assert torch.equal(value, got.metrics.summary()[name]), name

    check()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_any_cut(impl, make_batch, run_loss, truth):
    """Any cut into two micro-batches adds up, to the bit for the gradient."""

    @QUICK
    @given(problem=problems(), where=st.floats(0, 1))
    def check(problem, where):
        lengths, width, kind = problem
        batch = make_batch(lengths, width, **{**kind, "layout": "padded"})
        cut = round(where * len(lengths))
        whole = run_loss(impl, batch)
        parts = [run_loss(impl, batch.rows(rows)) for rows in (slice(cut), slice(cut, None))]
        difference = parts[0].loss + parts[1].loss - whole.loss
        assert difference.abs().item() <= 1e-6 * truth(batch).loss_scale
        assert torch.equal(torch.cat([part.grad for part in parts]), whole.grad)

    check()


@settings(deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 1_000_000), min_size=1, max_size=50),
    alpha=st.floats(0, 3),
    max_length=st.integers(1, 1_000_000),
)
def test_any_lengths(lengths, alpha, max_length):
    """Unbiased: the weights sum to 1/M; longer never weighs more; empty weighs nothing."""
    tensor = torch.tensor(lengths)
    weights = dl_norm.sequence_weights(tensor, alpha=alpha, max_length=max_length)
    assert ((weights == 0) | (tensor > 0)).all()
    if not any(lengths):
        assert weights.sum().item() == 0
        return
    assert weights.double().sum().item() == pytest.approx(1 / max_length, rel=1e-7)
    by_length = weights[tensor.argsort()][(tensor == 0).sum() :]
    assert (by_length.diff() <= 0).all()
    factors = dl_norm.reweight_advantages(torch.ones(len(lengths)), tensor, alpha=alpha)
    counted = (tensor > 0).sum().item()
    expected = weights.double() * max_length * counted
    torch.testing.assert_close(factors.double(), expected, rtol=2e-7, atol=0)


@settings(deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 10_000), min_size=1, max_size=20), data=st.data())
def test_no_weights_have_less_variance(lengths, data):
    """alpha = 1 minimises sum x^2 L among weights of the same sum: try any others."""
    counts = torch.tensor(lengths, dtype=torch.float64)
    best = dl_norm.sequence_weights(torch.tensor(lengths), max_length=1).double()
    noise = data.draw(st.lists(st.floats(0.01, 10), min_size=len(lengths), max_size=len(lengths)))
    other = best * torch.tensor(noise, dtype=torch.float64)
    other = other * best.sum() / other.sum()
    least = (best.square() * counts).sum().item()
    assert (other.square() * counts).sum().item() >= least * (1 - 1e-6)
