r"""Bias and variance of every loss aggregation, in closed form, from the lengths alone (numpy).

The model of arXiv:2509.07558, with its exponent left free: the gradients g_i of the summed token
losses of G sequences are independent, have one mean E[g_i] = grad J and the variance
Var(g_i) = V L_i^beta (the paper: beta = 1). A batch gradient sum_i x_i g_i then has

    E = (sum_i x_i) grad J,    Var = V sum_i x_i^2 L_i^beta,    CV = sqrt(Var) / |E|.

Everything here is in the model's units, so that nothing about the policy has to be known: E in
grad J, Var in V, CV in sqrt(V) / |grad J|. A sequence of length 0 is left out of every sum and of
G, as in :func:`dl_norm.sequence_weights`. All arithmetic is float64.

What the model leaves out: a mean gradient that differs with the length, and for "balanced" that its
weights depend on the signs of the advantages, on which the g_i depend too. It is for this coupling
of sign and length that "balanced" was made, and the model cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._aggregations import METHODS as METHODS
from ._aggregations import Aggregation, Method, aggregation

Floats = NDArray[np.float64]
# More groups than these are merged at random before they are resampled: the sums over 4096 parts
# give the width of an interval within 1.1 %, 1 / sqrt(2 * 4096), in a time that does not grow.
MAX_UNITS = 4096


@dataclass(frozen=True)
class AggregationStatistics:
    """Mean and noise of a batch gradient, in the units of the model."""

    expectation: float  # E / grad J: the factor on the true gradient
    variance: float  # Var / V
    cv: float  # CV |grad J| / sqrt(V): noise over signal, free of the method's scale


@dataclass(frozen=True)
class ScaleSwing:
    """How much the factor on the true gradient changes from batch to batch."""

    ratio: float  # largest over smallest expectation
    cv: float  # their standard deviation over their mean


@dataclass(frozen=True)
class ExponentEstimate:
    """The exponent of Var(g_i) ~ L_i^beta with a bootstrap interval."""

    beta: float
    low: float
    high: float
    confidence: float
    sequences: int  # that could be used: L > 0 and a positive squared norm
    groups: int  # resampled units; equal to ``sequences`` without group ids


def sequence_weights(
    lengths: ArrayLike,
    method: Method = "delta_l",
    *,
    alpha: float = 1.0,
    max_length: float = 1.0,
    groups: ArrayLike | None = None,
    advantages: ArrayLike | None = None,
    keep: ArrayLike | None = None,
) -> Floats:
    """(G,) float64 weights of :func:`dl_norm.sequence_weights`. Arguments that a method does not
    have do not matter to it here; ``groups`` are ids of any kind, words too."""
    row = aggregation(method)
    p, q = row.exponents(_checked(alpha, "alpha"))
    batch = _batch(lengths, row, groups, advantages, keep)
    constant = _checked_max_length(max_length) ** row.m
    weights = np.zeros(batch.full.shape)
    if batch.counts.size:
        ratio, shortest = batch.ratio, batch.shortest
        sums = batch.sums(ratio**q)[batch.cell]
        scale = batch.share[batch.cell] * shortest ** (p - q) / constant
        weights[batch.full] = scale * ratio**p / sums
    return weights


def aggregation_statistics(weights: ArrayLike, variances: ArrayLike) -> AggregationStatistics:
    """Statistics of sum_i x_i g_i for any weights x_i and any Var(g_i) / V.

    E = sum x_i, Var = sum x_i^2 Var(g_i), CV = sqrt(Var) / E. The paper's model is
    ``variances = lengths``; :func:`power_law`, :func:`ar1` and :func:`compound_symmetric` give
    others.

    Raises:
        ValueError: the two are not of one length, or not finite and >= 0.
    """
    x, v = _vector(weights, "weights"), _vector(variances, "variances")
    if x.shape != v.shape:
        raise ValueError(
            f"weights and variances must be one per sequence, got {x.size} and {v.size}"
        )
    return _statistics(float(x.sum()), float((x * x * v).sum()))


def method_statistics(
    lengths: ArrayLike,
    method: Method = "delta_l",
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    max_length: float = 1.0,
    groups: ArrayLike | None = None,
    advantages: ArrayLike | None = None,
    keep: ArrayLike | None = None,
) -> AggregationStatistics:
    r"""Statistics of a method under Var(g_i) = V L_i^beta, as closed forms in sums of powers of L.

    A method is a row of :data:`dl_norm._aggregations.AGGREGATIONS`, x_i = s_c L_i^p / (M^m S_c(q)).
    With S_c(e) the sum of L_i^e over the sequences of cell c with L_i > 0,

        E = sum_c s_c S_c(p) / (M^m S_c(q)),
        Var = sum_c s_c^2 S_c(beta + 2p) / (M^m S_c(q))^2.

    A method whose cell is the whole batch has one term and s_c = 1. E does not depend on the
    lengths, and the method is unbiased up to a constant, exactly where p = q.

    Args:
        groups, advantages, keep: as for :func:`sequence_weights`.

    Source: arXiv:2509.07558, table 1, which has beta = 1 and the whole batch.
    """
    row = aggregation(method)
    p, q = row.exponents(_checked(alpha, "alpha"))
    b, constant = _checked(beta, "beta"), _checked_max_length(max_length) ** row.m
    batch = _batch(lengths, row, groups, advantages, keep)
    if batch.counts.size == 0:
        return AggregationStatistics(0.0, 0.0, math.nan)
    ratio, shortest = batch.ratio, batch.shortest
    sums = constant * batch.sums(ratio**q)
    # This order gives 1/M without a rounding where p = q: such a method shows no swing.
    expectation = (batch.share * (constant * batch.sums(ratio**p) / sums)).sum() / constant
    expectation *= shortest ** (p - q)
    variance = (batch.share**2 * batch.sums(ratio ** (b + 2 * p)) / sums**2).sum()
    return _statistics(float(expectation), float(variance * shortest ** (b + 2 * p - 2 * q)))


def optimal_alpha(beta: float) -> float:
    """The alpha of least variance under Var(g_i) ~ L_i^beta: beta itself.

    sum x_i^2 L_i^beta subject to sum x_i = 1/M is least at x_i ~ L_i^-beta. ``dl_norm`` takes
    0 <= alpha <= 16, and the result is clipped to that.
    """
    return min(max(_checked(beta, "beta"), 0.0), 16.0)


def excess_variance(lengths: ArrayLike, alpha: float, beta: float) -> float:
    """Var(DeltaL at alpha) / Var(DeltaL at beta) >= 1 for these lengths: what a wrong alpha costs.

    S(b - 2a) S(-b) / S(-a)^2, 1 at alpha = beta.
    """
    chosen = method_statistics(lengths, alpha=alpha, beta=beta)
    best = method_statistics(lengths, alpha=beta, beta=beta)
    return chosen.variance / best.variance if best.variance else math.nan


def lognormal_excess_variance(sigma: float, alpha: float, beta: float) -> float:
    """:func:`excess_variance` of many lognormal lengths: exp(sigma^2 (alpha - beta)^2)."""
    return math.exp((sigma * (alpha - beta)) ** 2)


def effective_sequences(weights: ArrayLike) -> float:
    """(sum x)^2 / sum x^2: the number of equally weighted sequences with the same concentration.

    G for equal weights, near 1 when one sequence decides the gradient (Kish's effective sample
    size). 0 for no weight at all.
    """
    x = _vector(weights, "weights")
    squares = float((x * x).sum())
    return float(x.sum()) ** 2 / squares if squares else 0.0


def scale_swing(expectations: Sequence[float] | Floats) -> ScaleSwing:
    """Swing of the expectations E / grad J of several batches; a batch of E = 0 is left out.

    1 and 0 for an unbiased method: "delta_l" and "dr_grpo" have E = 1/M in every batch.
    """
    factors = _vector(expectations, "expectations")
    factors = factors[factors > 0]
    if factors.size == 0:
        return ScaleSwing(math.nan, math.nan)
    return ScaleSwing(float(factors.max() / factors.min()), float(factors.std() / factors.mean()))


def power_law(lengths: ArrayLike, beta: float) -> Floats:
    """L_i^beta, and 0 for an empty sequence."""
    counts = checked_lengths(lengths)
    powers = np.zeros_like(counts)
    powers[counts > 0] = counts[counts > 0] ** _checked(beta, "beta")
    return powers


def ar1(lengths: ArrayLike, rho: float) -> Floats:
    """Variance of a sum of L stationary AR(1) token noises of variance 1 and correlation rho^k.

    L (1 + rho)/(1 - rho) - 2 rho (1 - rho^L)/(1 - rho)^2: like L for long sequences, so beta = 1
    with another V.
    """
    if not -1 < rho < 1:
        raise ValueError(f"rho must lie in (-1, 1), got {rho}")
    counts = checked_lengths(lengths)
    return counts * (1 + rho) / (1 - rho) - 2 * rho * (1 - rho**counts) / (1 - rho) ** 2


def compound_symmetric(lengths: ArrayLike, rho: float) -> Floats:
    """Variance of a sum of L token noises of variance 1, any two with correlation rho >= 0.

    L + rho L (L - 1): from beta = 1 towards beta = 2 as sequences grow beyond 1/rho tokens.
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho must lie in [0, 1], got {rho}")
    counts = checked_lengths(lengths)
    return counts + rho * counts * (counts - 1)


def estimate_exponent(
    lengths: ArrayLike,
    squared_norms: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> ExponentEstimate:
    r"""The slope of log(squared norm) on log(length), with a percentile bootstrap interval.

    Args:
        lengths: (G,) token counts.
        squared_norms: (G,) squared norms of the sequence gradients, the advantage divided out:
            |g_i|^2 / A_i^2, better with the mean gradient subtracted from g_i. Without it the
            slope is that of the second moment, which is the variance where noise dominates.
        groups: (G,) ids of any kind, prompts say: sequences of one group are resampled together,
            as they are not independent. None: each sequence is a group.
        confidence, resamples, seed: of the bootstrap. More than 4096 groups are first merged at
            random into 4096.

    Sequences with L = 0 or a squared norm of 0 (no advantage) say nothing and are left out. The
    mean of a logarithm lies below the logarithm of the mean, by more the wider the norms are
    spread: where those of short sequences are spread wider than those of long ones, the slope is
    too steep.

    Raises:
        ValueError: arrays that do not fit, negative or not finite; fewer than two lengths or two
            groups left, where there is no slope or no interval.
    """
    counts = checked_lengths(lengths)
    norms = _vector(squared_norms, "squared_norms")
    if norms.shape != counts.shape:
        raise ValueError(
            f"squared_norms must be one per length, got {norms.size} for {counts.size}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    usable = (counts > 0) & (norms > 0)
    x, y = np.log(counts[usable]), np.log(norms[usable])
    if groups is None:
        ids = np.arange(x.size)
    else:
        ids = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
        if ids.shape != counts.shape:
            raise ValueError(f"groups must be one per length, got {ids.size} for {counts.size}")
        ids = np.unique(ids[usable], return_inverse=True)[1]
    units = int(ids.max()) + 1 if ids.size else 0
    if np.unique(x).size < 2 or units < 2:
        raise ValueError(
            f"an exponent needs two different lengths and two groups with a gradient, got "
            f"{np.unique(x).size} lengths in {units} groups: pass more sequences"
        )
    x, y = x - x.mean(), y - y.mean()  # the sums below then cancel nothing
    # The slope needs five sums, so a resample is a count per group, not a new data set.
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y])
    random = np.random.default_rng(seed)
    parts = units
    if units > MAX_UNITS:
        parts = MAX_UNITS
        ids = (random.permutation(units) % parts)[ids]
    sums = np.stack([np.bincount(ids, term, parts) for term in terms])
    draws = random.multinomial(parts, np.full(parts, 1 / parts), size=resamples)
    slopes = _slope(sums @ draws.T)
    slopes = slopes[np.isfinite(slopes)]  # a resample may hold one length only
    tail = (1 - confidence) / 2
    low, high = np.quantile(slopes, [tail, 1 - tail]) if slopes.size else (math.nan, math.nan)
    beta = float(_slope(sums.sum(1)))
    return ExponentEstimate(beta, float(low), float(high), confidence, x.size, units)


def checked_lengths(lengths: ArrayLike) -> Floats:
    """(G,) float64 lengths.

    Raises:
        ValueError: not one-dimensional, not finite, negative or not whole numbers.
    """
    counts = _vector(lengths, "lengths")
    if (counts != np.floor(counts)).any():
        wrong = int(np.argmax(counts != np.floor(counts)))
        raise ValueError(f"lengths must be whole numbers of tokens, got {counts[wrong]}")
    return counts


class _Batch(NamedTuple):
    """The sequences that count, and which cell each belongs to."""

    full: NDArray[np.bool_]  # (G,) of those with a token and kept
    counts: Floats  # (n,) their lengths
    cell: NDArray[np.intp]  # (n,)
    share: Floats  # (cells,)

    @property
    def shortest(self) -> float:
        return float(self.counts.min())

    @property
    def ratio(self) -> Floats:
        """Lengths relative to the shortest: the largest term of a sum is 1 where exponents are
        negative, so that no alpha can underflow it."""
        return self.counts / self.shortest

    def sums(self, values: Floats) -> Floats:
        """(cells,)"""
        return np.bincount(self.cell, values, len(self.share)).astype(np.float64)


def _batch(
    lengths: ArrayLike,
    row: Aggregation,
    groups: ArrayLike | None,
    advantages: ArrayLike | None,
    keep: ArrayLike | None,
) -> _Batch:
    counts = checked_lengths(lengths)
    full = counts > 0
    if keep is not None:
        kept = _per_sequence(keep, "keep", counts)
        if kept.dtype != np.bool_:
            raise ValueError(f"keep must be True or False per sequence, got {kept.dtype}")
        full &= kept
    counts = counts[full]
    if not row.takes_groups or counts.size == 0:
        return _Batch(full, counts, np.zeros(counts.shape, np.intp), np.ones(1))
    keys = [_ids(_needed(groups, "groups", row), "groups", full)]
    if row.takes_advantages:
        signs = np.sign(_per_sequence(_needed(advantages, "advantages", row), "advantages", full))
        if np.isnan(signs[full]).any():
            raise ValueError("advantages must have a sign where there are tokens, got nan")
        keys.append(signs[full].astype(np.intp))
    cell, sizes = np.unique(np.stack(keys), axis=1, return_inverse=True, return_counts=True)[1:]
    share = sizes / counts.size if row.share == "by size" else np.full(sizes.shape, 1 / sizes.size)
    return _Batch(full, counts, cell.reshape(-1), share)


def _needed(values: ArrayLike | None, name: str, row: Aggregation) -> ArrayLike:
    if values is None:
        raise ValueError(f"{row.label} needs {name}, one per sequence")
    return values


def _ids(values: ArrayLike, name: str, full: NDArray[np.bool_]) -> NDArray[np.intp]:
    ids = _per_sequence(values, name, full)[full]
    return np.unique(ids, return_inverse=True)[1].reshape(-1)


def _per_sequence(values: ArrayLike, name: str, like: NDArray) -> NDArray:
    array = np.asarray(values)
    if array.shape != like.shape:
        raise ValueError(f"{name} must be one per length, got {array.shape} for {like.shape}")
    return array


def _slope(sums: Floats) -> Floats:
    n, x, y, xx, xy = sums
    spread = n * xx - x * x
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 1e-12 * n * n, (n * xy - x * y) / spread, np.nan)


def _statistics(expectation: float, variance: float) -> AggregationStatistics:
    cv = math.sqrt(variance) / expectation if expectation else math.nan
    return AggregationStatistics(expectation, variance, cv)


def _vector(values: ArrayLike, name: str) -> Floats:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {vector.shape}")
    wrong = ~(np.isfinite(vector) & (vector >= 0))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"{name} must be finite and >= 0, got {vector[row]} at index {row}")
    return vector


def _checked(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _checked_max_length(max_length: float) -> float:
    constant = _checked(max_length, "max_length")
    if constant <= 0:
        raise ValueError(f"max_length must be finite and > 0, got {max_length}")
    return constant
