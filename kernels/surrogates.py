"""The token losses on the device, and what every kernel does around them.

A token loss is a function of one token's log-prob, ratio and advantage, and of its settings. It
returns the loss, its derivative by the log of the ratio, its derivative by the log-prob past the
ratio, and whether the ratio was clipped at its low and at its high end; a token loss of a user may
return further values, which are summed over the tokens. All have the shape of the ratio: a scalar
or a block. Its host side, of the same name, is in dl_norm/surrogates.py.
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
    kl: Any  # KLTerms; None: no reference
    rollout: Any = None  # RolloutTerms of rollout.py; None: no rollout log-probs


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
def cispo(log_prob, ratio, advantage, low, high):
    """-A clip(r) log_prob, where the clipped ratio is a constant; one clip for both signs of A."""
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
def token_terms(terms, log_prob, ratio, outside, advantage, policy_weight, ref_log_prob):
    """The policy term of a token and its KL term. ``terms``: of :class:`TokenTerms`;
    policy_weight may be None, and without terms.kl ref_log_prob is not looked at.

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
    if terms.kl is not None:
        kl, kl_grad = token_kl(terms.kl, ref_log_prob - log_prob, ratio)
        # Where the reference is read for its metric alone, not 0 * inf.
        asked_for = terms.kl.beta > 0
        if terms.kl.CORRECTED is not None:
            kl *= ratio
            kl_grad *= ratio
            through_ratio += tl.where(asked_for & (outside == 0), terms.kl.beta * kl, 0.0)
        loss += tl.where(asked_for, terms.kl.beta * kl, 0.0)
        past_ratio += tl.where(asked_for, terms.kl.beta * kl_grad, 0.0)
    return loss, through_ratio, past_ratio, term[3], term[4], kl, term[5:]


@triton.jit
def token_metrics(counted, advantage, log_ratio, ratio, below, above, kl):
    """The addends of a token to PolicyLossMetrics, in the order of its fields; the last is combined
    by maximum. 0 where the token is not counted."""
    return (
        tl.where(counted, 1.0, 0.0),
        tl.where(counted & below & (advantage != 0), 1.0, 0.0),
        tl.where(counted & above & (advantage > 0), 1.0, 0.0),
        tl.where(counted & above & (advantage < 0), 1.0, 0.0),
        tl.where(counted, ratio, 0.0),
        tl.where(counted, -log_ratio, 0.0),
        tl.where(counted, ratio - 1.0 - log_ratio, 0.0),
        tl.where(counted, kl, 0.0),
        tl.where(counted, ratio, 0.0),
    )
