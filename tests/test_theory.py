"""Closed forms of bias and variance: the published vectors, identities, sampled gradients."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dl_norm
from dl_norm import theory

VECTOR = [10, 100, 1000]
WIDE = [7, 64, 512, 3072]
METHODS = theory.METHODS
BETAS = (0.5, 1.0, 1.5, 2.0)
# Float64 sums of a few terms: some roundings of 1.1e-16 each.
ROUNDING = 1e-13


def close(value):
    return pytest.approx(value, rel=ROUNDING, abs=0)


@pytest.mark.parametrize(
    ("lengths", "alpha", "variance"),
    [
        (VECTOR, 0.0, 123.33333333333331),
        (VECTOR, 0.5, 14.957363398172792),
        (VECTOR, 0.75, 9.681814370939643),
        (VECTOR, 1.0, 9.009009009009008),
        (WIDE, 1.0, 6.220422331501301),
        (WIDE, 0.75, 6.801186226344415),
    ],
)
def test_published_variances_of_delta_l(lengths, alpha, variance):
    found = theory.method_statistics(lengths, alpha=alpha)
    assert found == theory.AggregationStatistics(1.0, close(variance), close(math.sqrt(variance)))


def test_published_statistics_of_the_others():
    grpo = theory.method_statistics(VECTOR, "grpo")
    assert grpo.expectation == close(0.037)
    assert grpo.variance == close(0.012333333333333333)
    assert grpo.cv == close(3.0015011259383213)
    dapo = theory.method_statistics(VECTOR, "dapo")
    assert dapo.expectation == close(0.002702702702702703)
    assert dapo.variance == close(9.009009009009009e-4)
    assert dapo.cv == close(11.105554165971787)
    ratio = [theory.method_statistics(WIDE, m).variance for m in ("dr_grpo", "delta_l")]
    assert ratio[0] / ratio[1] == close(36.723792666480655)  # AM/HM


def test_published_weights():
    x = theory.sequence_weights(VECTOR, alpha=0.75, max_length=3072)
    expected = [2.6914766231879786e-4, 4.786197461616269e-5, 8.511196398372771e-6]
    assert x.tolist() == close(expected)
    assert theory.sequence_weights([1, 3072]).tolist() == close([3072 / 3073, 1 / 3073])


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_those_of_the_package(method):
    lengths = [0, 1, 5, 5, 40, 300, 0]
    options = {"max_length": 512} if method in ("delta_l", "dr_grpo") else {}
    for alpha in (0.0, 0.3, 1.0, 2.0) if method == "delta_l" else (1.0,):
        theirs = dl_norm.sequence_weights(torch.tensor(lengths), method, alpha=alpha, **options)
        ours = theory.sequence_weights(lengths, method, alpha=alpha, **options)
        # Theirs are rounded to float32.
        np.testing.assert_allclose(ours, theirs.double(), rtol=2**-24, atol=0)


lengths_strategy = st.lists(st.integers(0, 100_000), min_size=1, max_size=40).filter(any)


@given(
    lengths_strategy,
    st.sampled_from(METHODS),
    st.floats(0, 3),
    st.floats(-1, 3),
    st.floats(0.5, 1e5),
)
def test_closed_forms_are_those_of_the_weights(lengths, method, alpha, beta, max_length):
    alpha = alpha if method == "delta_l" else 1.0
    closed = theory.method_statistics(
        lengths, method, alpha=alpha, beta=beta, max_length=max_length
    )
    weights = theory.sequence_weights(lengths, method, alpha=alpha, max_length=max_length)
    direct = theory.aggregation_statistics(weights, theory.power_law(lengths, beta))
    # 40 powers with exponents up to 9 of 1e5: a few roundings times the exponents.
    for name in ("expectation", "variance", "cv"):
        assert getattr(closed, name) == pytest.approx(getattr(direct, name), rel=1e-12, abs=0)


@given(lengths_strategy, st.floats(0, 3))
def test_identities(lengths, beta):
    rows = {m: theory.method_statistics(lengths, m, beta=beta) for m in METHODS}
    assert rows["grpo"].cv == pytest.approx(rows["delta_l"].cv, rel=1e-12, abs=0)
    assert rows["dapo"].cv == pytest.approx(rows["dr_grpo"].cv, rel=1e-12, abs=0)
    assert rows["luspo"] == rows["dr_grpo"]  # M = 1
    none = theory.method_statistics(lengths, alpha=0.0, beta=beta)
    assert none.variance == pytest.approx(rows["dr_grpo"].variance, rel=1e-12, abs=0)


@given(lengths_strategy, st.floats(0, 3), st.floats(0, 3))
def test_alpha_equal_to_beta_has_least_variance(lengths, alpha, beta):
    assert theory.excess_variance(lengths, alpha, beta) >= 1 - 1e-12
    best = theory.optimal_alpha(beta)
    assert theory.excess_variance(lengths, best, beta) == pytest.approx(1, rel=1e-12, abs=0)


def test_optimal_alpha_stays_where_the_weights_are_defined():
    assert theory.optimal_alpha(0.8) == 0.8
    assert theory.optimal_alpha(-0.4) == 0.0
    assert theory.optimal_alpha(30.0) == 16.0


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(1.0, (1.17, 1.0, 1.17, 1.89)), (0.0, (1.17, 1.89, 4.16, 12.5))],
)
def test_cost_of_alpha_for_lognormal_lengths(alpha, expected):
    lengths = np.ceil(np.random.default_rng(0).lognormal(6, 0.8, 100_000))
    for beta, value in zip(BETAS, expected, strict=True):
        formula = theory.lognormal_excess_variance(0.8, alpha, beta)
        # The formula is for infinitely many lengths, whose heavy tail the last values hang on.
        assert formula == pytest.approx(value, rel=0.04)
        assert theory.excess_variance(lengths, alpha, beta) == pytest.approx(formula, rel=0.03)


def test_effective_sequences():
    assert theory.effective_sequences([0.2] * 5) == close(5)
    assert theory.effective_sequences([1.0, 0, 0]) == 1
    assert theory.effective_sequences([0.0, 0.0]) == 0
    assert theory.effective_sequences([1.0, 0.5]) == close(1.5**2 / 1.25)


def test_scale_swing():
    batches = [[10, 10], [20, 20], [40, 40]]
    factors = [theory.method_statistics(batch, "dapo").expectation for batch in batches]
    swing = theory.scale_swing(factors)
    assert swing.ratio == close(4)
    assert swing.cv == close(np.std([4, 2, 1]) / np.mean([4, 2, 1]))
    unbiased = [theory.method_statistics(batch).expectation for batch in batches]
    assert theory.scale_swing(unbiased) == theory.ScaleSwing(1.0, 0.0)
    assert math.isnan(theory.scale_swing([0.0]).ratio)


class TestEmpty:
    @pytest.mark.parametrize("method", METHODS)
    def test_empty_sequences_are_left_out(self, method):
        some = theory.method_statistics([0, 10, 0, 30], method, beta=1.3)
        assert some == theory.method_statistics([10, 30], method, beta=1.3)
        weights = theory.sequence_weights([0, 10, 0, 30], method)
        assert weights[[0, 2]].tolist() == [0, 0]

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("lengths", [[], [0, 0]])
    def test_a_batch_without_a_token(self, method, lengths):
        assert theory.sequence_weights(lengths, method).tolist() == [0.0] * len(lengths)
        found = theory.method_statistics(lengths, method)
        assert (found.expectation, found.variance) == (0.0, 0.0)
        assert math.isnan(found.cv)


class TestSampled:
    """Gradients drawn from the model. The full experiment: bench.experiments.synthetic."""

    @pytest.mark.parametrize("noise", ["beta=1.5", "ar1", "compound_symmetric"])
    def test_variance_and_mean(self, noise):
        random = np.random.default_rng(1)
        lengths = np.array([1, 3, 8, 8, 20, 60])
        draws = 120_000
        if noise == "beta=1.5":
            variances = theory.power_law(lengths, 1.5)
            sums = np.sqrt(variances)[:, None] * random.standard_normal((6, draws))
        else:
            rho = 0.6
            variances = getattr(theory, noise)(lengths, rho)
            sums = np.stack([self.token_sums(random, noise, n, rho, draws) for n in lengths])
        gradients = 1.0 + sums  # grad J = 1
        for method in METHODS:
            x = theory.sequence_weights(lengths, method, max_length=60)
            batch = x @ gradients
            expected = theory.aggregation_statistics(x, variances)
            error = math.sqrt(expected.variance / draws)
            assert abs(batch.mean() - expected.expectation) < 4 * error
            # sqrt(2 / draws) = 0.4 %: 1.6 % is 4 standard errors.
            assert batch.var() == pytest.approx(expected.variance, rel=0.016)

    def token_sums(self, random, noise, length, rho, draws):
        total = np.zeros(draws)
        token = common = random.standard_normal(draws)
        for _ in range(length):
            fresh = random.standard_normal(draws)
            if noise == "ar1":
                total += token
                token = rho * token + math.sqrt(1 - rho**2) * fresh
            else:
                total += math.sqrt(rho) * common + math.sqrt(1 - rho) * fresh
        return total


class TestCorrelatedTokens:
    def test_without_correlation_the_variance_is_the_length(self):
        for law in (theory.ar1, theory.compound_symmetric):
            assert law(VECTOR, 0.0).tolist() == VECTOR

    def test_two_tokens(self):
        assert theory.ar1([2], 0.3)[0] == close(2.6)
        assert theory.compound_symmetric([2], 0.3)[0] == close(2.6)

    def test_refused(self):
        with pytest.raises(ValueError, match=r"rho must lie in \(-1, 1\)"):
            theory.ar1([2], 1.0)
        with pytest.raises(ValueError, match=r"rho must lie in \[0, 1\]"):
            theory.compound_symmetric([2], -0.1)


class TestExponent:
    def sample(self, seed, beta, groups=60, size=8):
        """Squared norms with exponent ``beta``, in groups that share half of their deviation."""
        random = np.random.default_rng(seed)
        ids = np.repeat(np.arange(groups), size)
        lengths = np.ceil(random.lognormal(5, 0.7, groups * size))
        deviation = 0.4 * random.standard_normal(groups)[ids] + 0.4 * random.standard_normal(
            groups * size
        )
        return lengths, lengths**beta * np.exp(deviation), ids

    def test_exact_law(self):
        lengths = np.array([3, 17, 5, 200])
        found = theory.estimate_exponent(lengths, 0.1 * lengths**1.25)
        assert (found.beta, found.low, found.high) == (
            pytest.approx(1.25, rel=1e-9),
            pytest.approx(1.25, rel=1e-9),
            pytest.approx(1.25, rel=1e-9),
        )
        assert (found.sequences, found.groups) == (4, 4)

    def test_is_the_least_squares_slope(self):
        lengths, norms, _ = self.sample(0, 0.7)
        slope = np.polyfit(np.log(lengths), np.log(norms), 1)[0]
        assert theory.estimate_exponent(lengths, norms).beta == pytest.approx(slope, rel=1e-9)

    def test_interval_covers(self):
        hits = 0
        for seed in range(100):
            found = theory.estimate_exponent(*self.sample(seed, 1.3), resamples=300)
            hits += found.low <= 1.3 <= found.high
        # 95 expected of 100; fewer than 86 has probability 2e-4 (binomial).
        assert hits >= 86

    def test_interval_knows_of_groups(self):
        # All of a group alike: as many independent values as groups, so a wider interval.
        random = np.random.default_rng(0)
        ids = np.repeat(np.arange(40), 16)
        lengths = np.ceil(random.lognormal(5, 0.7, 40))[ids]
        norms = lengths * np.exp(random.standard_normal(40))[ids]
        alone = theory.estimate_exponent(lengths, norms)
        grouped = theory.estimate_exponent(lengths, norms, ids)
        assert grouped.beta == close(alone.beta)
        assert grouped.groups == 40
        # sqrt(16) = 4 times as wide.
        assert (grouped.high - grouped.low) / (alone.high - alone.low) == pytest.approx(4, rel=0.3)

    def test_silent_sequences_are_left_out(self):
        lengths, norms, ids = self.sample(0, 1.0)
        silent = np.array([0, 50])
        with_silent = theory.estimate_exponent(
            np.concatenate([silent, lengths]),
            np.concatenate([[3.0, 0.0], norms]),
            np.concatenate([[90, 91], ids]),
        )
        assert with_silent == theory.estimate_exponent(lengths, norms, ids)

    def test_same_seed_same_interval(self):
        data = self.sample(0, 1.0)
        assert theory.estimate_exponent(*data) == theory.estimate_exponent(*data)
        assert theory.estimate_exponent(*data).low != theory.estimate_exponent(*data, seed=1).low

    def test_many_groups_are_merged(self, monkeypatch):
        """As wide an interval as without, and the same exponent, in less memory."""
        found = {}
        for limit in (200, 4000):
            monkeypatch.setattr(theory, "MAX_UNITS", limit)
            found[limit] = theory.estimate_exponent(
                *self.sample(0, 1.0, groups=2000), resamples=800
            )
        merged, whole = found[200], found[4000]
        assert merged.beta == pytest.approx(whole.beta, abs=1e-12)
        assert merged.groups == whole.groups == 2000
        width = (merged.high - merged.low) / (whole.high - whole.low)
        assert width == pytest.approx(1, abs=0.2), "5 % by 200 parts, 5 % by 800 resamples of each"
        assert merged != whole

    def test_groups_of_words(self):
        lengths, norms, ids = self.sample(0, 1.0)
        named = theory.estimate_exponent(lengths, norms, [f"prompt {i:03}" for i in ids])
        assert named == theory.estimate_exponent(lengths, norms, ids)

    @pytest.mark.parametrize(
        ("lengths", "norms", "groups", "message"),
        [
            ([5, 5, 5], [1, 2, 3], None, "1 lengths in 3 groups"),
            ([5, 6], [1, 2], [0, 0], "2 lengths in 1 groups"),
            ([5, 6], [0, 0], None, "0 lengths in 0 groups"),
            ([5, 6], [1], None, "one per length, got 1 for 2"),
            ([5, 6], [1, 2], [1], "one per length, got 1 for 2"),
            ([5, 6], [1, math.nan], None, "squared_norms must be finite and >= 0, got nan"),
            ([5, 6], [1, -2], None, "got -2.0 at index 1"),
        ],
    )
    def test_refused(self, lengths, norms, groups, message):
        with pytest.raises(ValueError, match=message):
            theory.estimate_exponent(lengths, norms, groups)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.method_statistics([1.5]), "whole numbers of tokens, got 1.5"),
        (lambda: theory.method_statistics([3, -1]), "got -1.0 at index 1"),
        (lambda: theory.method_statistics([[3]]), "one-dimensional"),
        (lambda: theory.method_statistics([3], "mean"), "method must be one of delta_l"),
        (lambda: theory.method_statistics([3], beta=math.inf), "beta must be finite"),
        (lambda: theory.method_statistics([3], max_length=0), "max_length must be finite and > 0"),
        (lambda: theory.sequence_weights([3], "mean"), "method must be one of"),
        (lambda: theory.aggregation_statistics([1, 2], [1]), "one per sequence, got 2 and 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
