"""Device code of rollout correction: the weight of a token, and of its sequence.

Its host side is in dl_norm/_rollout.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .surrogates import clamped

# Of rollout_metrics.
NUM_ROLLOUT_METRICS = tl.constexpr(9)
LOG_BOUND = tl.constexpr(20.0)
FINITE = tl.constexpr(1e6)


class RolloutTerms(NamedTuple):
    """What is None is not compiled."""

    bound: Any  # (truncate or mask, its bounds)
    TOKEN: Any  # a token has a weight of its own
    log_weight: Any  # total or mean: that of a sequence
    token_bounds: Any  # of log-ratio (low and high), k2 and k3: beyond them a token is dropped
    sequence_bounds: Any  # a sequence, by those of the sum, the mean and the max
    unscored: Any  # what rollout log-probs hold where there is none, beside NaN


@triton.jit
def truncate(raw, low, high):
    """Weight, whether truncated, whether masked."""
    weight = tl.minimum(tl.maximum(raw, low), high)
    outside = (raw < low) | (raw > high)
    return weight, outside, raw < 0.0


@triton.jit
def mask(raw, low, high):
    outside = (raw < low) | (raw > high)
    return tl.where(outside, 0.0, raw), raw < 0.0, outside


@triton.jit
def total(log_ratios, length):
    return log_ratios


@triton.jit
def mean(log_ratios, length):
    return log_ratios / length


@triton.jit
def rollout_log_ratio(terms, old_log_prob, rollout_log_prob):
    """Log of the ratio of the old policy to the one that sampled, 0 where it is not known; and
    where that is."""
    difference = old_log_prob - rollout_log_prob
    unscored = difference != difference
    if terms.unscored is not None:
        unscored = unscored | (rollout_log_prob == terms.unscored)
    finite = tl.minimum(tl.maximum(difference, -FINITE), FINITE)
    return tl.where(unscored, 0.0, finite), unscored


@triton.jit
def bounded_weight(terms, log_weight):
    raw = tl.exp(clamped(log_weight, LOG_BOUND)[0])
    return terms.bound[0](raw, *terms.bound[1])


@triton.jit
def divergences(log_ratio):
    """k2 and k3."""
    bounded = clamped(log_ratio, LOG_BOUND)[0]
    return 0.5 * bounded * bounded, tl.exp(bounded) - 1.0 - bounded


@triton.jit
def is_outside(k1, k2, k3, low, high, k2_high, k3_high):
    return (k1 < low) | (k1 > high) | (k2 > k2_high) | (k3 > k3_high)


@triton.jit
def rollout_of_token(terms, log_ratio, unscored):
    """Weight, whether truncated, whether masked; without what the token's sequence adds."""
    never = log_ratio != log_ratio
    weight, truncated, masked = tl.zeros_like(log_ratio) + 1.0, never, never
    if terms.TOKEN is not None:
        weight, truncated, masked = bounded_weight(terms, log_ratio)
        scored = unscored == 0
        weight = tl.where(scored, weight, 1.0)
        truncated, masked = truncated & scored, masked & scored
    if terms.token_bounds is not None:
        k2, k3 = divergences(log_ratio)
        rejected = is_outside(log_ratio, k2, k3, *terms.token_bounds)
        weight = tl.where(rejected, 0.0, weight)
        masked = masked | rejected
    return weight, truncated, masked


@triton.jit
def rollout_of_sequence(terms, length, sums, lowest, highest):
    """Factor of the weights of all tokens, and a code of what became of them: the sum of 1 if
    truncated, 2 if masked and 4 if vetoed. ``sums``: of log-ratio, k2 and k3."""
    never = length < 0.0
    weight, truncated, masked, vetoed = length * 0.0 + 1.0, never, never, never
    if terms.log_weight is not None:
        weight, truncated, masked = bounded_weight(terms, terms.log_weight(sums[0], length))
    if terms.sequence_bounds is not None:
        low, high, k2_high, k3_high = (
            terms.sequence_bounds[8], terms.sequence_bounds[9],
            terms.sequence_bounds[10], terms.sequence_bounds[11],
        )  # fmt: skip
        rejected = is_outside(
            sums[0], sums[1], sums[2], terms.sequence_bounds[0], terms.sequence_bounds[1],
            terms.sequence_bounds[2], terms.sequence_bounds[3],
        )  # fmt: skip
        rejected |= is_outside(
            sums[0] / length, sums[1] / length, sums[2] / length, terms.sequence_bounds[4],
            terms.sequence_bounds[5], terms.sequence_bounds[6], terms.sequence_bounds[7],
        )  # fmt: skip
        # Both divergences are largest at one of the extremes.
        k2_lowest, k3_lowest = divergences(lowest)
        k2_highest, k3_highest = divergences(highest)
        rejected |= tl.maximum(k2_lowest, k2_highest) > k2_high
        rejected |= tl.maximum(k3_lowest, k3_highest) > k3_high
        vetoed = (lowest < low) | (highest > high)
        masked = masked | rejected
        weight = tl.where(rejected | vetoed, 0.0, weight)
    code = tl.where(truncated, 1.0, 0.0) + tl.where(masked, 2.0, 0.0) + tl.where(vetoed, 4.0, 0.0)
    return weight, code


@triton.jit
def rollout_metrics(counted, weight, truncated, masked, vetoed, unscored, log_ratio):
    """The addends of a token to RolloutMetrics, in the order of its fields; the last is combined by
    maximum. 0 where the token is not counted."""
    weight = tl.where(counted, weight, 0.0)
    k1 = -clamped(log_ratio, LOG_BOUND)[0]
    return (
        weight,
        weight * weight,
        tl.where(counted & truncated, 1.0, 0.0),
        tl.where(counted & masked, 1.0, 0.0),
        tl.where(counted & vetoed, 1.0, 0.0),
        tl.where(counted & unscored, 1.0, 0.0),
        tl.where(counted, k1, 0.0),
        tl.where(counted, divergences(log_ratio)[1], 0.0),
        weight,
    )
