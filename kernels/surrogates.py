"""The token losses on the device, and what every kernel does around them.

A token loss is a function of one token's log-prob, ratio and advantage, and of its settings. It
returns the loss, its derivative by the log of the ratio, its derivative by the log-prob past the
ratio, and whether the ratio was clipped at its low and at its high end; a token loss of a user may
return further values, which are summed over the tokens. All have the shape of the ratio: a scalar
or a block. Its host side, of the same name, is in dl_norm/surrogates/.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Of token_metrics. Rows of PARTIALS are the loss, these, and the further values of a token loss.
NUM_METRICS = tl.constexpr(9)


class KLTerms(NamedTuple):
    """The KL term. What is None is not compiled."""

    beta: Any
    estimator: Any  # k1, absolute, k2 or k3, of d = ref_log_prob - log_prob
    clamps: Any  # (of d, of the estimate)
    grad_estimator: Any  # whose derivative is taken in the place of the estimator's
    WEIGHTED_GRAD: Any  # the derivative alone times the ratio
    CORRECTED: Any  # the whole term times the ratio, whose derivative counts


class TokenTerms(NamedTuple):
    """What is computed of a token. A function stands in a pair with its settings."""

    surrogate: Any  # (token loss, its settings)
    log_ratio_clamp: Any
    token_clip: Any  # bounds of a token's log-ratio in the mean of its sequence, or None


@triton.jit
def clip(log_prob, ratio, advantage, positive_high, negative_low, negative_high):
    """-A clip(r). min, clip, dual clip and the two-sided bound only ever clamp the ratio, to
    [0, positive_high] where A >= 0 and to [negative_low, negative_high] where A < 0. A bound
    belongs to the branch that has a gradient."""
    negative = advantage < 0
    low = tl.where(negative, negative_low, 0.0)
    high = tl.where(negative, negative_high, positive_high)
    below = ratio < low
    above = ratio > high
    loss = -advantage * tl.where(below, low, tl.where(above, high, ratio))
    # d(-A r)/d log r = -A r: where no bound is hit the derivative is the loss itself.
    through_ratio = tl.where(below | above, 0.0, loss)
    return loss, through_ratio, tl.zeros_like(loss), below, above


@triton.jit
def policy_gradient(
    log_prob, ratio, advantage, positive_low, positive_high, negative_low, negative_high
):
    """-A clip(r) log_prob, where the clipped ratio is a constant; a clip for each sign of A."""
    negative = advantage < 0
    low = tl.where(negative, negative_low, positive_low)
    high = tl.where(negative, negative_high, positive_high)
    below = ratio < low
    above = ratio > high
    past_ratio = -advantage * tl.where(below, low, tl.where(above, high, ratio))
    loss = past_ratio * log_prob
    return loss, tl.zeros_like(loss), past_ratio, below, above


@triton.jit
def sapo(log_prob, ratio, advantage, temperature_pos, temperature_neg):
    """-A 4 / temperature * sigmoid(temperature (r - 1)), with no clip."""
    temperature = tl.where(advantage > 0, temperature_pos, temperature_neg)
    logit = temperature * (ratio - 1.0)
    # exp of what is not positive: no overflow, and no cancellation in 1 - sigmoid.
    exp = tl.exp(-tl.abs(logit))
    larger = 1.0 / (1.0 + exp)
    smaller = exp * larger
    loss = -advantage * tl.where(logit < 0, smaller, larger) * (4.0 / temperature)
    through_ratio = -advantage * (4.0 * larger * smaller) * ratio
    never = ratio < 0.0
    return loss, through_ratio, tl.zeros_like(loss), never, never


@triton.jit
def _probabilities(log_prob, ratio):
    """Of the token under the policy and, from the ratio, under the old one; not above 1."""
    new = tl.exp(log_prob)
    old = new / ratio
    return tl.where(new > 1.0, 1.0, new), tl.where(old > 1.0, 1.0, old)


@triton.jit
def _in_trust_region(
    divergence, log_prob, ratio, advantage, positive_low, positive_high, negative_low,
    negative_high, ratio_cap,
):  # fmt: skip
    """-A r where the divergence, which has a sign, is within its bounds, else 0. With a finite
    ratio_cap -A min(r, ratio_cap) log_prob, where the ratio is a constant."""
    negative = advantage < 0
    below = divergence < tl.where(negative, negative_low, positive_low)
    above = divergence > tl.where(negative, negative_high, positive_high)
    weight = -advantage * tl.where(ratio > ratio_cap, ratio_cap, ratio)
    weight = tl.where(below | above, 0.0, weight)
    capped = ratio_cap < float("inf")
    loss = tl.where(capped, weight * log_prob, weight)
    loss = tl.where(below | above, 0.0, loss)
    return loss, tl.where(capped, 0.0, weight), tl.where(capped, weight, 0.0), below, above


@triton.jit
def dppo_tv(
    log_prob, ratio, advantage, positive_low, positive_high, negative_low, negative_high, ratio_cap
):
    """The divergence is the change of the token's probability."""
    new, old = _probabilities(log_prob, ratio)
    return _in_trust_region(
        new - old, log_prob, ratio, advantage, positive_low, positive_high, negative_low,
        negative_high, ratio_cap,
    )  # fmt: skip


@triton.jit
def dppo_kl(
    log_prob, ratio, advantage, positive_low, positive_high, negative_low, negative_high, ratio_cap
):
    """The divergence is KL(old || new) of this token against all others, with the sign of the
    change of its probability."""
    new, old = _probabilities(log_prob, ratio)
    # Not 0 * inf where the old probability has underflowed.
    kl = tl.where(old > 0, -old * tl.log(ratio), 0.0)
    kl += (1.0 - old) * tl.log((1.0 - old + 1e-8) / (1.0 - new + 1e-8))
    return _in_trust_region(
        tl.where(new > old, kl, -kl), log_prob, ratio, advantage, positive_low, positive_high,
        negative_low, negative_high, ratio_cap,
    )  # fmt: skip


@triton.jit
def drift(log_prob, ratio, advantage, tau):
    """tau / 2 times the square of the log-ratio."""
    log_ratio = tl.log(ratio)
    through_ratio = tau * log_ratio
    never = ratio < 0.0
    zeros = tl.zeros_like(through_ratio)
    return 0.5 * through_ratio * log_ratio, through_ratio, zeros, never, never


@triton.jit
def abs_drift(log_prob, ratio, advantage, weight):
    """weight times the size of the log-ratio, whose derivative at 0 is 0."""
    log_ratio = tl.log(ratio)
    zeros = tl.zeros_like(log_ratio)
    through_ratio = tl.where(log_ratio > 0, zeros + weight, tl.where(log_ratio < 0, -weight, zeros))
    never = ratio < 0.0
    return weight * tl.abs(log_ratio), through_ratio, zeros, never, never


@triton.jit
def nll(log_prob, ratio, advantage, weight):
    """-weight log_prob where A > 0."""
    zeros = tl.zeros_like(ratio)
    past_ratio = tl.where(advantage > 0, zeros - weight, zeros)
    loss = tl.where(advantage > 0, past_ratio * log_prob, zeros)
    never = ratio < 0.0
    return loss, zeros, past_ratio, never, never


@triton.jit
def vespo(log_prob, ratio, advantage, k_pos, lambda_pos, k_neg, lambda_neg):
    """-phi(r) A log_prob, where phi(r) = e^lambda r^k e^(-lambda r) is a constant."""
    negative = advantage < 0
    k = tl.where(negative, k_neg, k_pos)
    scale = tl.where(negative, lambda_neg, lambda_pos)
    least = tl.where(ratio < 1e-8, 1e-8, ratio)
    # One exponent: the factors would overflow. Where the product is infinite phi is 0.
    phi = tl.exp(k * tl.log(least) - scale * (least - 1.0))
    past_ratio = -advantage * tl.where(least == float("inf"), 0.0, phi)
    loss = past_ratio * log_prob
    never = ratio < 0.0
    return loss, tl.zeros_like(loss), past_ratio, never, never


@triton.jit
def clipped_tokens(log_ratio, advantage, bounds):
    """Where a token's log-ratio counts in its sequence's mean as its lower or its upper bound."""
    return (log_ratio < bounds[0]) & (advantage < 0), (log_ratio > bounds[1]) & (advantage >= 0)


@triton.jit
def clamped(values, bound):
    """Values clamped to +-bound, NaN passes through; and which of them were outside."""
    clamped = tl.maximum(values, -bound, tl.PropagateNan.ALL)
    return tl.minimum(clamped, bound, tl.PropagateNan.ALL), tl.abs(values) > bound


@triton.jit
def clamped_ratio(raw, log_ratio_clamp):
    """Returns the log-ratio clamped to +-log_ratio_clamp, its exp, outside (of the clamp: no
    derivative)."""
    log_ratio, outside = clamped(raw, log_ratio_clamp)
    return log_ratio, tl.exp(log_ratio), outside


@triton.jit
def unit_ratio(like):
    """What clamped_ratio returns without an old policy: the ratio is exactly 1."""
    log_ratio = tl.zeros_like(like)
    ratio = log_ratio + 1.0
    return log_ratio, ratio, ratio < 0.0


@triton.jit
def k1(d):
    return -d, tl.zeros_like(d) + 1.0


@triton.jit
def absolute(d):
    # Without a derivative at 0.
    return tl.abs(d), tl.where(d > 0, -1.0, tl.where(d < 0, 1.0, 0.0))


@triton.jit
def k2(d):
    return 0.5 * d * d, -d


@triton.jit
def k3(d):
    exp = tl.exp(d)
    return exp - d - 1.0, 1.0 - exp


@triton.jit
def token_kl(kl, d, ratio):
    """An estimate of KL(policy || reference) from d = ref_log_prob - log_prob, and its derivative
    by the log-prob, as k1, absolute, k2 and k3 return them."""
    raw = d
    if kl.clamps is not None:
        d, outside = clamped(d, kl.clamps[0])
    value, grad = kl.estimator(d)
    if kl.clamps is not None:
        value, beyond = clamped(value, kl.clamps[1])
        grad = tl.where(outside | beyond, 0.0, grad)
    if kl.grad_estimator is not None:
        grad = kl.grad_estimator(raw)[1]
    if kl.WEIGHTED_GRAD is not None:
        grad *= ratio
    return value, grad


@triton.jit
def token_terms(terms, kl_terms, log_prob, ratio, outside, advantage, policy_weight, ref_log_prob):
    """The policy term of a token and its KL term. ``terms`` is a :class:`TokenTerms`, ``kl_terms``
    a :class:`KLTerms`; policy_weight and ref_log_prob may be None.

    Returns loss, derivative through the ratio, derivative past it, clipped low, clipped high, KL,
    and the further values of the token loss.
    """
    term = terms.surrogate[0](log_prob, ratio, advantage, *terms.surrogate[1])
    loss, through_ratio, past_ratio = term[0], tl.where(outside, 0.0, term[1]), term[2]
    if policy_weight is not None:
        # Weight 0 drops the term, whatever its factors are: not 0 * inf.
        kept = policy_weight != 0
        loss = tl.where(kept, policy_weight * loss, 0.0)
        through_ratio = tl.where(kept, policy_weight * through_ratio, 0.0)
        past_ratio = tl.where(kept, policy_weight * past_ratio, 0.0)
    kl = tl.zeros_like(loss)
    if ref_log_prob is not None:
        kl, kl_grad = token_kl(kl_terms, ref_log_prob - log_prob, ratio)
        # Where the reference is read for its metric alone, not 0 * inf.
        asked_for = kl_terms.beta > 0
        if kl_terms.CORRECTED is not None:
            kl *= ratio
            kl_grad *= ratio
            through_ratio += tl.where(asked_for & (outside == 0), kl_terms.beta * kl, 0.0)
        loss += tl.where(asked_for, kl_terms.beta * kl, 0.0)
        past_ratio += tl.where(asked_for, kl_terms.beta * kl_grad, 0.0)
    return loss, through_ratio, past_ratio, term[3], term[4], kl, term[5:]


@triton.jit
def token_metrics(counted, advantage, log_ratio, ratio, below, above, kl):
    """The addends of a token to PolicyLossMetrics, in the order of its fields; the last is combined
    by maximum. A token that is not counted has ratio 1 and adds 0."""
    k3 = ratio - 1.0 - log_ratio
    ratio = tl.where(counted, ratio, 0.0)
    return (
        tl.where(counted, 1.0, 0.0),
        tl.where(counted & below & (advantage != 0), 1.0, 0.0),
        tl.where(counted & above & (advantage > 0), 1.0, 0.0),
        tl.where(counted & above & (advantage < 0), 1.0, 0.0),
        ratio,
        -log_ratio,
        k3,
        tl.where(counted, kl, 0.0),
        ratio,
    )
