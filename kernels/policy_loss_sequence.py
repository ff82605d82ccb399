"""Device code of what the policy loss asks of whole sequences before its tiles: the mean log-ratio,
what a log-prob changes through it, the weight of a rollout correction.

One program a sequence. Names are those of policy_loss.py.
"""

import triton
import triton.language as tl

from .policy_loss import OF_SEQUENCES, product
from .rollout import divergences, rollout_log_ratio, rollout_of_sequence, rollout_of_token
from .surrogates import clamped_ratio, clipped_tokens, token_terms, unit_ratio


@triton.jit(do_not_specialize=["N", "T"], do_not_specialize_on_alignment=OF_SEQUENCES)
def policy_loss_sequence_kernel(
    tokens,
    ADVANTAGES,
    POLICY_WEIGHTS,
    CU_SEQLENS,
    LOG_RATIO_MEANS,
    RATIO_GRADS,
    ROLLOUTS,
    N: tl.int64,
    T: tl.int64,
    terms,
    kl_terms,
    rollout_terms,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean log-ratio of sequence ``program_id`` (without MEAN the sum), and what a log-prob changes
    through it.

    With s the ratio of the sequence, RATIO_GRADS is (1/L) sum_t d(loss_t)/d(log s), or None. Where
    the terms of a sequence's tokens are all alike that mean is each token's own, and not asked for.
    The order of summation depends on the sequence alone, not on where in a batch it lies.
    """
    seq = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    first = seq * T
    end = first + T
    if CU_SEQLENS is not None:
        # Offsets that do not fit the stream must not be read at: the loss will be NaN.
        first = tl.minimum(tl.maximum(tl.load(CU_SEQLENS + seq).to(tl.int64), 0), N)
        end = tl.minimum(tl.load(CU_SEQLENS + seq + 1).to(tl.int64), N)

    if ROLLOUTS is not None:
        of_sequence, code = _rollout_of_sequence(tokens, rollout_terms, first, end, lane)
        tl.store(ROLLOUTS + seq, of_sequence)
        tl.store(ROLLOUTS + tl.num_programs(0) + seq, code)

    like = tl.zeros([BLOCK], tl.float32)
    lengths = like
    log_ratios = like
    position = first
    while position < end:
        counted = _counted(tokens.mask, position + lane, end)
        lengths += tl.where(counted, 1.0, 0.0)
        if tokens.old_log_probs is not None:
            log_prob = _load_counted(tokens.log_probs, position + lane, counted)
            log_ratio = log_prob - _load_counted(tokens.old_log_probs, position + lane, counted)
            if terms.token_clip is not None:
                if tokens.advantages is not None:
                    advantage = _load_counted(tokens.advantages, position + lane, counted)
                else:
                    advantage = like + tl.load(ADVANTAGES + seq).to(tl.float32)
                below, above = clipped_tokens(log_ratio, advantage, terms.token_clip)
                log_ratio = tl.where(below, terms.token_clip[0], log_ratio)
                log_ratio = tl.where(above, terms.token_clip[1], log_ratio)
            log_ratios += log_ratio
        position += BLOCK
    length = tl.maximum(tl.sum(lengths, axis=0), 1.0)
    mean = tl.sum(log_ratios, axis=0)
    if MEAN:
        mean /= length
    if LOG_RATIO_MEANS is not None:
        tl.store(LOG_RATIO_MEANS + seq, mean)

    if RATIO_GRADS is not None:
        if tokens.old_log_probs is not None:
            _, ratio, outside = clamped_ratio(like + mean, terms.log_ratio_clamp)
        else:
            _, ratio, outside = unit_ratio(like)
        grads = like
        position = first
        while position < end:
            counted = _counted(tokens.mask, position + lane, end)
            log_prob = _load_counted(tokens.log_probs, position + lane, counted)
            if tokens.advantages is not None:
                advantage = _load_counted(tokens.advantages, position + lane, counted)
            else:
                advantage = like + tl.load(ADVANTAGES + seq).to(tl.float32)
            policy_weight = None
            if tokens.policy_weights is not None:
                policy_weight = _load_counted(tokens.policy_weights, position + lane, counted)
            elif POLICY_WEIGHTS is not None:
                policy_weight = like + tl.load(POLICY_WEIGHTS + seq).to(tl.float32)
            if tokens.rollout_log_probs is not None:
                log_weight, unscored = _rollout_log_ratio(
                    tokens, rollout_terms, position + lane, counted
                )
                correction = rollout_of_token(rollout_terms, log_weight, unscored)[0]
                if ROLLOUTS is not None:
                    correction *= of_sequence
                policy_weight = product(policy_weight, correction)
            ref_log_prob = None
            if tokens.ref_log_probs is not None:
                ref_log_prob = _load_counted(tokens.ref_log_probs, position + lane, counted)
            term = token_terms(
                terms, kl_terms, log_prob, ratio, outside, advantage, policy_weight, ref_log_prob
            )
            grads += tl.where(counted, term[1], 0.0)
            position += BLOCK
        tl.store(RATIO_GRADS + seq, tl.sum(grads, axis=0) / length)


@triton.jit
def _rollout_of_sequence(tokens, terms, first, end, lane):
    """What rollout_of_sequence returns of the tokens from ``first`` to ``end``."""
    lengths = tl.zeros(lane.shape, tl.float32)
    log_ratios = tl.zeros(lane.shape, tl.float32)
    k2s = tl.zeros(lane.shape, tl.float32)
    k3s = tl.zeros(lane.shape, tl.float32)
    lowest = tl.zeros(lane.shape, tl.float32)
    highest = tl.zeros(lane.shape, tl.float32)
    position = first
    while position < end:
        counted = _counted(tokens.mask, position + lane, end)
        log_ratio, _ = _rollout_log_ratio(tokens, terms, position + lane, counted)
        lengths += tl.where(counted, 1.0, 0.0)
        log_ratios += log_ratio
        if terms.sequence_bounds is not None:
            k2, k3 = divergences(log_ratio)
            k2s += k2
            k3s += k3
            lowest = tl.minimum(lowest, log_ratio)
            highest = tl.maximum(highest, log_ratio)
        position += lane.numel
    sums = tl.sum(log_ratios, axis=0), tl.sum(k2s, axis=0), tl.sum(k3s, axis=0)
    length = tl.maximum(tl.sum(lengths, axis=0), 1.0)
    return rollout_of_sequence(terms, length, sums, tl.min(lowest, axis=0), tl.max(highest, axis=0))


@triton.jit
def _rollout_log_ratio(tokens, terms, position, counted):
    """What rollout_log_ratio returns; 0 where a token is not counted."""
    rollout = _load_counted(tokens.rollout_log_probs, position, counted)
    if tokens.old_log_probs is not None:
        behind = _load_counted(tokens.old_log_probs, position, counted)
    else:
        behind = _load_counted(tokens.log_probs, position, counted)
    return rollout_log_ratio(terms, behind, rollout)


@triton.jit
def _counted(MASK, position, end):
    counted = position < end
    if MASK is not None:
        counted = tl.load(MASK + position, mask=counted, other=0) != 0
    return counted


@triton.jit
def _load_counted(PTR, position, counted):
    return tl.load(PTR + position, mask=counted, other=0).to(tl.float32)
