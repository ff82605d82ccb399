"""The loss of one token and its derivative, shared by every kernel of the package."""

import triton
import triton.language as tl


@triton.jit
def clamped_ratio(raw, log_ratio_clamp, HAS_OLD: tl.constexpr):
    """exp of the log-ratio clamped to +-log_ratio_clamp, or exactly 1; NaN passes through.

    Returns clamped log-ratio, ratio, outside (of the clamp: no derivative).
    """
    if HAS_OLD:
        outside = tl.abs(raw) > log_ratio_clamp
        log_ratio = tl.where(outside, tl.where(raw > 0, log_ratio_clamp, -log_ratio_clamp), raw)
        ratio = tl.exp(log_ratio)
    else:
        log_ratio = tl.zeros_like(raw)
        ratio = log_ratio + 1.0
        outside = ratio < 0.0
    return log_ratio, ratio, outside


@triton.jit
def token_surrogate(
    log_prob,
    ratio,
    outside,
    advantage,
    positive_high,
    negative_low,
    negative_high,
    sapo_temperature_pos,
    sapo_temperature_neg,
    CISPO: tl.constexpr,
    SAPO: tl.constexpr,
):
    """The policy term of a token at a ratio, and its derivative with respect to log_prob.

    clip (neither flag): -A clip(r). min, clip, dual clip and the two-sided bound only ever clamp
    the ratio, to [0, positive_high] where A >= 0 and to [negative_low, negative_high] where A < 0
    (see dl_norm/options.py). The bounds belong to the unclipped branch, as in torch.clamp.
    CISPO: -A clip(r) log_prob where the clipped ratio is a constant, with one clip for both signs.
    SAPO: -A 4 / temperature * sigmoid(temperature (r - 1)), with no clip.

    Returns loss, derivative, below (clipped at the low end), above.
    """
    negative = advantage < 0
    if SAPO:
        below = ratio < 0.0
        above = below
        temperature = tl.where(advantage > 0, sapo_temperature_pos, sapo_temperature_neg)
        logit = temperature * (ratio - 1.0)
        # exp of what is not positive: no overflow, and no cancellation in 1 - sigmoid.
        exp = tl.exp(-tl.abs(logit))
        larger = 1.0 / (1.0 + exp)
        smaller = exp * larger
        gate = tl.where(logit < 0, smaller, larger)
        loss = -advantage * gate * (4.0 / temperature)
        derivative = tl.where(outside, 0.0, -advantage * (4.0 * larger * smaller) * ratio)
    else:
        low = tl.where(negative, negative_low, 0.0)
        if CISPO:
            low = negative_low
        high = tl.where(negative, negative_high, positive_high)
        below = ratio < low
        above = ratio > high
        clipped = tl.where(below, low, tl.where(above, high, ratio))
        loss = -advantage * clipped
        if CISPO:
            derivative = loss
            loss = loss * log_prob
        else:
            # d(-A r)/d log_prob = -A r: where no bound is hit the derivative is the loss itself.
            derivative = tl.where(outside | below | above, 0.0, loss)
    return loss, derivative, below, above


@triton.jit
def token_loss(
    log_prob,
    old_log_prob,
    advantage,
    positive_high,
    negative_low,
    negative_high,
    log_ratio_clamp,
    HAS_OLD: tl.constexpr,
):
    """The clip surrogate at the token's own ratio.

    Returns loss, derivative, clamped log-ratio, ratio, below, above.
    """
    log_ratio, ratio, outside = clamped_ratio(log_prob - old_log_prob, log_ratio_clamp, HAS_OLD)
    loss, derivative, below, above = token_surrogate(
        log_prob, ratio, outside, advantage, positive_high, negative_low, negative_high,
        1.0, 1.0, False, False,
    )  # fmt: skip
    return loss, derivative, log_ratio, ratio, below, above


@triton.jit
def token_kl(log_prob, ref_log_prob):
    """k3 estimate of KL(policy || reference), exp(d) - d - 1 with d = ref - log_prob, and its
    derivative 1 - exp(d) with respect to log_prob."""
    difference = ref_log_prob - log_prob
    exp_difference = tl.exp(difference)
    return exp_difference - difference - 1.0, 1.0 - exp_difference
