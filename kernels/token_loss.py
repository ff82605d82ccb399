"""The loss of one token and its derivative, shared by every kernel of the package."""

import triton
import triton.language as tl


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
    """PPO-clip token loss -A * clip(r) and its derivative with respect to log_prob.

    min, clip, dual clip and the two-sided bound only ever clamp the ratio, to [0, positive_high]
    where A >= 0 and to [negative_low, negative_high] where A < 0 (see dl_norm/options.py).
    The bounds belong to the unclipped branch, as in torch.clamp; NaN passes through.

    Returns loss, derivative, clamped log-ratio, ratio, below (clipped at the low end), above.
    """
    if HAS_OLD:
        raw = log_prob - old_log_prob
        outside = tl.abs(raw) > log_ratio_clamp
        log_ratio = tl.where(outside, tl.where(raw > 0, log_ratio_clamp, -log_ratio_clamp), raw)
        ratio = tl.exp(log_ratio)
    else:
        log_ratio = tl.zeros_like(advantage)
        ratio = log_ratio + 1.0
        outside = ratio < 0.0
    negative = advantage < 0
    low = tl.where(negative, negative_low, 0.0)
    high = tl.where(negative, negative_high, positive_high)
    below = ratio < low
    above = ratio > high
    clipped = tl.where(below, low, tl.where(above, high, ratio))
    loss = -advantage * clipped
    # d(-A r)/d log_prob = -A r: where no bound is hit the derivative is the loss itself.
    derivative = tl.where(outside | below | above, 0.0, loss)
    return loss, derivative, log_ratio, ratio, below, above


@triton.jit
def token_kl(log_prob, ref_log_prob):
    """k3 estimate of KL(policy || reference), exp(d) - d - 1 with d = ref - log_prob, and its
    derivative 1 - exp(d) with respect to log_prob."""
    difference = ref_log_prob - log_prob
    exp_difference = tl.exp(difference)
    return exp_difference - difference - 1.0, 1.0 - exp_difference
