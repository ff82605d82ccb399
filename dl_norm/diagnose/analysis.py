"""The numbers of a diagnosis, from responses to one dataclass."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import theory
from .._aggregations import AGGREGATIONS, Method
from .columns import DEFAULTS, RolloutError
from .rollouts import Rollouts
from .values import MAX_LENGTH

# With lengths and M of 1 to MAX_LENGTH every formula is finite for these.
BETA_RANGE = (-16.0, 16.0)
PAPER_ALPHAS = (0.75, 1.0)  # of arXiv:2509.07558, for mathematics and for CountDown
SHOWN = ("length", "batch", "group", "reward", "advantage", "norm")  # kinds of column
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class LengthSummary:
    """Distribution of the lengths that are not 0."""

    responses: int
    empty: int
    batches: int
    smallest: int
    quantiles: dict[float, float]
    largest: int
    mean: float
    harmonic_mean: float
    log_deviation: float  # sigma, were they lognormal


@dataclass(frozen=True)
class MethodSummary:
    """One aggregation; means over the batches."""

    method: Method
    alpha: float | None  # of "delta_l"
    expectation: float  # E / grad J
    scaled_expectation: float  # M E / grad J
    swing: theory.ScaleSwing | None  # of the expectation, from batch to batch; None: one batch
    variance: float  # Var / V
    cv: float  # CV |grad J| / sqrt(V)
    excess_noise: float  # its CV over that of DeltaL at alpha = beta
    effective_sequences: float

    @property
    def name(self) -> str:
        """As in papers."""
        label = AGGREGATIONS[self.method].label
        return label if self.alpha is None else f"{label}({self.alpha:.2f})"


@dataclass(frozen=True)
class Exponent:
    """beta of Var(g_i) ~ L_i^beta, and where it comes from."""

    beta: float
    source: str  # "given", "estimated" or "assumed"
    estimate: theory.ExponentEstimate | None = None


@dataclass(frozen=True)
class AdvantageSummary:
    """How the signal lies over the lengths."""

    without_signal: float  # share of responses with advantage 0
    rank_correlation: float  # Spearman's, of length and advantage, where there is a signal
    mean_length_positive: float
    mean_length_negative: float


@dataclass(frozen=True)
class Diagnosis:
    """Everything that is printed, drawn or written as JSON."""

    lengths: LengthSummary
    max_length: float
    exponent: Exponent
    best_alpha: float
    methods: list[MethodSummary]
    advantages: AdvantageSummary | None
    sources: dict[str, str | None]  # kind of column -> where it came from; None: not there
    unused_columns: tuple[str, ...]
    notes: list[str]  # what was assumed or left out

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, which has no NaN: None instead."""
        return _without_nan(asdict(self))


def diagnose(
    rollouts: Rollouts,
    *,
    beta: float | None = None,
    max_length: float | None = None,
    batch_size: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Diagnosis:
    """Lengths, the exponent, and what every aggregation makes of them.

    Args:
        beta: exponent of Var(g_i) ~ L_i^beta. None: estimated from the gradient norms
            (:func:`dl_norm.theory.estimate_exponent`; divided by the squared advantages where
            these are known, resampled by group), or 1, the paper's, if there are none. -16 to 16.
        max_length: the constant M, 1 to 10^9 tokens. None: the longest response.
        batch_size: cut the responses into batches of this many, in order. None: the batches of
            the file, or one batch.
        confidence, seed: of the bootstrap interval of beta.

    Raises:
        RolloutError: batches that cannot be made, norms that allow no estimate, a number out of
            its range.
    """
    if max_length is not None and not 1 <= max_length <= MAX_LENGTH:
        raise RolloutError(f"max_length must lie in 1 to {MAX_LENGTH:,} tokens, got {max_length:g}")
    if seed < 0:
        raise RolloutError(f"seed must be >= 0, got {seed}")
    full = rollouts.lengths[rollouts.lengths > 0]
    if not len(full) or not full.max() <= MAX_LENGTH:
        raise RolloutError(f"lengths must lie in 0 to {MAX_LENGTH:,} tokens, not all of them 0")
    batches = [_take(rollouts, rows) for rows in batch_rows(rollouts, batch_size)]
    constant = float(full.max()) if max_length is None else float(max_length)
    exponent = _exponent(rollouts, beta, confidence, seed)
    best = theory.optimal_alpha(exponent.beta)
    # A paper's alpha that reads like the best one would be the same row twice.
    alphas = sorted([best, *(a for a in PAPER_ALPHAS if f"{a:.2f}" != f"{best:.2f}")])
    others = _methods_without_alpha(rollouts)
    methods = [_method(batches, m, None, exponent.beta, constant) for m in others]
    methods += [_method(batches, "delta_l", a, exponent.beta, constant) for a in alphas]
    least = next(row.cv for row in methods if row.alpha == best)
    sources = {kind: (rollouts.sources or {}).get(kind) for kind in SHOWN}
    if batch_size is not None:
        sources["batch"] = f"every {batch_size} responses"
    return Diagnosis(
        _length_summary(rollouts.lengths, len(batches)),
        constant,
        exponent,
        best,
        [replace(row, excess_noise=row.cv / least) for row in methods],
        _advantage_summary(rollouts),
        sources,
        rollouts.unused,
        [*rollouts.notes, *_notes(rollouts, batches, batch_size, exponent.beta, best)],
    )


def split_batches(rollouts: Rollouts, batch_size: int | None = None) -> list[NDArray[np.float64]]:
    """The lengths of each rollout batch; a batch without a token is left out."""
    return [rollouts.lengths[rows] for rows in batch_rows(rollouts, batch_size)]


def batch_rows(rollouts: Rollouts, batch_size: int | None = None) -> list[NDArray[np.intp]]:
    """Which responses each rollout batch has; a batch without a token is left out."""
    rows = np.arange(len(rollouts))
    if batch_size is not None:
        if batch_size < 1:
            raise RolloutError(f"the batch size must be at least 1, got {batch_size}")
        batch_size = min(batch_size, len(rows))
        ends = np.arange(batch_size, len(rows), batch_size)
        batches = np.split(rows, ends)
        if len(batches) > 1 and len(batches[-1]) < batch_size:
            batches.pop()  # a remainder is no batch: its expectation would look like a swing
    elif rollouts.batches is not None:
        order = np.argsort(rollouts.batches, kind="stable")
        batches = np.split(order, np.cumsum(np.bincount(rollouts.batches))[:-1])
    else:
        batches = [rows]
    batches = [batch for batch in batches if (rollouts.lengths[batch] > 0).any()]
    if not batches:
        raise RolloutError(f"no batch of {batch_size} responses has a token")
    return batches


def squared_norms(rollouts: Rollouts) -> NDArray[np.float64] | None:
    """|g_i|^2 / A_i^2 where there are norms, and 0 where the advantage is 0; without advantages
    |g_i|^2."""
    if rollouts.norms is None:
        return None
    squares = rollouts.norms**2
    if rollouts.advantages is None:
        return squares
    signal = _signal(rollouts.advantages)
    return np.where(signal, squares / np.where(signal, rollouts.advantages, 1.0) ** 2, 0.0)


def _signal(advantages: NDArray[np.float64]) -> NDArray[np.bool_]:
    # A mean over a group leaves rounding where every reward is the same.
    return np.abs(advantages) > 1e-9


def _exponent(rollouts: Rollouts, beta: float | None, confidence: float, seed: int) -> Exponent:
    low, high = BETA_RANGE
    if beta is not None:
        if not low <= beta <= high:
            raise RolloutError(f"beta must lie in {low:g} to {high:g}, got {beta:g}")
        return Exponent(float(beta), "given")
    squares = squared_norms(rollouts)
    if squares is None:
        return Exponent(1.0, "assumed")
    try:
        estimate = theory.estimate_exponent(
            rollouts.lengths, squares, rollouts.groups, confidence=confidence, seed=seed
        )
    except ValueError as error:
        raise RolloutError(f"{error}, or give the exponent with --beta") from None
    if not low <= estimate.beta <= high:
        raise RolloutError(
            f"the gradient norms give beta = {estimate.beta:.3g}, which lies outside {low:g} to "
            f"{high:g}: the lengths are too alike, or the norms are not those of single responses. "
            "Give the exponent with --beta"
        )
    return Exponent(estimate.beta, "estimated", estimate)


def _notes(
    rollouts: Rollouts,
    batches: list[Rollouts],
    batch_size: int | None,
    beta: float,
    best: float,
) -> list[str]:
    """What was assumed, and what was left out."""
    sources = rollouts.sources or {}
    total, kept = len(rollouts), sum(map(len, batches))
    notes = []
    if batch_size is None and rollouts.batches is None and sources.get("batch") is None:
        notes.append(
            f"No batch column ({', '.join(DEFAULTS['batch'])}): all {total:,} responses are taken "
            "for one rollout batch. Name it with --batch-column, or cut it with --batch-size."
        )
    if batch_size is not None and batch_size > total:
        notes.append(f"The one batch has {total:,} responses, fewer than --batch-size.")
    if kept < total:
        notes.append(
            f"{total - kept:,} responses are in no batch: they do not fill one, or theirs is empty."
        )
    signal = rollouts.rewards is not None or rollouts.norms is not None
    if signal and rollouts.groups is None and sources.get("group") is None:
        notes.append(
            f"No group column ({', '.join(DEFAULTS['group'])}): rewards give no advantages, and "
            "each response is taken to be independent. Name it with --group-column."
        )
    if rollouts.norms is not None and rollouts.advantages is None:
        notes.append("No advantages are known: the gradient norms are not divided by them.")
    if best != beta:
        notes.append(f"The best alpha would be beta, {beta:.3g}; alpha lies in 0 to 16.")
    return notes


def _take(rollouts: Rollouts, rows: NDArray[np.intp]) -> Rollouts:
    """What the weights of these responses may depend on."""
    groups, advantages = rollouts.groups, rollouts.advantages
    if advantages is not None:
        advantages = np.where(_signal(advantages), advantages, 0.0)[rows]
    groups = None if groups is None else groups[rows]
    return Rollouts(rollouts.lengths[rows], groups=groups, advantages=advantages)


def _methods_without_alpha(rollouts: Rollouts) -> list[Method]:
    """Those for which the file has what they need."""
    return [
        name
        for name, row in AGGREGATIONS.items()
        if not row.takes_alpha
        and not (row.takes_groups and rollouts.groups is None)
        and not (row.takes_advantages and rollouts.advantages is None)
    ]


def _method(
    batches: list[Rollouts],
    method: Method,
    alpha: float | None,
    beta: float,
    max_length: float,
) -> MethodSummary:
    exponent = 1.0 if alpha is None else alpha
    statistics = [
        theory.method_statistics(
            batch.lengths,
            method,
            alpha=exponent,
            beta=beta,
            max_length=max_length,
            groups=batch.groups,
            advantages=batch.advantages,
        )
        for batch in batches
    ]
    effective = [
        theory.effective_sequences(
            theory.sequence_weights(
                batch.lengths,
                method,
                alpha=exponent,
                groups=batch.groups,
                advantages=batch.advantages,
            )
        )
        for batch in batches
    ]
    expectations = np.array([s.expectation for s in statistics])
    return MethodSummary(
        method,
        alpha,
        float(expectations.mean()),
        float(expectations.mean() * max_length),
        theory.scale_swing(expectations) if len(batches) > 1 else None,
        float(np.mean([s.variance for s in statistics])),
        float(np.mean([s.cv for s in statistics])),
        math.nan,
        float(np.mean(effective)),
    )


def _length_summary(lengths: NDArray[np.float64], batches: int) -> LengthSummary:
    full = lengths[lengths > 0]
    quantiles = zip(QUANTILES, np.quantile(full, QUANTILES).tolist(), strict=True)
    return LengthSummary(
        len(lengths),
        len(lengths) - len(full),
        batches,
        int(full.min()),
        dict(quantiles),
        int(full.max()),
        float(full.mean()),
        float(1 / (1 / full).mean()),
        float(np.log(full).std()),
    )


def _advantage_summary(rollouts: Rollouts) -> AdvantageSummary | None:
    if rollouts.advantages is None:
        return None
    advantages, lengths = rollouts.advantages, rollouts.lengths
    signal = _signal(advantages) & (lengths > 0)
    positive, negative = signal & (advantages > 0), signal & (advantages < 0)
    return AdvantageSummary(
        float(1 - signal.mean()),
        _rank_correlation(lengths[signal], advantages[signal]),
        float(lengths[positive].mean()) if positive.any() else math.nan,
        float(lengths[negative].mean()) if negative.any() else math.nan,
    )


def _rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's: the correlation of ranks, ties sharing the mean of theirs."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, ids, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[ids]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
