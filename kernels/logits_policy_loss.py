"""Device code of the policy loss over logits.

N tokens, one row of V logits each, one program a row: log-sum-exp in a first pass over the row,
the loss of the token, and the gradient at the logits in a second pass. A token's logit z is
logit / temperature, after an optional soft cap.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rollout import NUM_ROLLOUT_METRICS, rollout_log_ratio, rollout_metrics, rollout_of_token
from .surrogates import NUM_METRICS, clamped_ratio, token_metrics, token_terms, unit_ratio

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Finite, so that -inf - LOWEST is -inf and 0 * LOWEST is 0.
LOWEST = tl.constexpr(-3.4028234e38)
# A sum of exp beyond this is taken again with the largest logit as its reference: neither the sum
# of squares nor that of the entropy, nor the sum over a few processes, can then overflow.
LARGE = tl.constexpr(1e18)


class RowTokens(NamedTuple):
    """(N,) tensors, contiguous, float32 but for the first two; or None."""

    token_ids: Any
    active: Any
    advantages: Any
    weights: Any
    old_log_probs: Any
    ref_log_probs: Any
    policy_weights: Any
    rollout_log_probs: Any  # only without old_log_probs: else policy_weights has what they say
    entropy_weights: Any  # of the entropy in the loss, its coefficient in them


@triton.jit
def _soft_cap(logits, softcap):
    """softcap * tanh(logits / softcap), or the logits without a soft cap"""
    if softcap is not None:
        exp = tl.exp(tl.abs(logits) * (-2.0 / softcap))
        capped = softcap * (1.0 - exp) / (1.0 + exp)
        logits = tl.where(logits < 0, -capped, capped)
    return logits


@triton.jit
def _load(PTR, wanted, softcap, POLICY: tl.constexpr):
    """Logits as float32 after the soft cap; -inf where not ``wanted``, which is None for all."""
    if wanted is None:
        logits = _soft_cap(tl.load(PTR, eviction_policy=POLICY).to(tl.float32), softcap)
    else:
        logits = tl.load(PTR, mask=wanted, other=float("-inf"), eviction_policy=POLICY)
        logits = _soft_cap(logits.to(tl.float32), softcap)
        if softcap is not None:
            logits = tl.where(wanted, logits, float("-inf"))
    return logits


@triton.jit
def _add(total, dot, squares, logits, scale, reference, DOT: tl.constexpr, SQUARES: tl.constexpr):
    """Adds up exp2(e), for the entropy e exp2(e), and exp2(e)^2, with e = logits * scale -
    reference."""
    exponent = tl.fma(logits, scale, -reference)
    exp = tl.exp2(exponent)
    total += tl.sum(exp, axis=-1)
    if DOT:
        dot += tl.sum(exp * tl.maximum(exponent, LOWEST), axis=-1)  # not 0 * -inf
    if SQUARES:
        squares += tl.sum(exp * exp, axis=-1)
    return total, dot, squares


@triton.jit
def _row_sums(
    INTERIOR, EDGE, lane, rest, in_edge, parts, scale, reference, softcap, DOT: tl.constexpr,
    SQUARES: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """The sums of _add over a whole row. Every thread adds up what it reads: no exchange in the
    loops."""
    whole, interior, edges = parts
    BLOCK: tl.constexpr = lane.numel
    total = tl.zeros([lane.shape[0]], tl.float32)
    dot = tl.zeros([lane.shape[0]], tl.float32)
    squares = tl.zeros([lane.shape[0]], tl.float32)
    for start in range(0, whole, 2 * BLOCK):
        first = _load(INTERIOR + start + lane, None, softcap, POLICY)
        second = _load(INTERIOR + (start + BLOCK) + lane, None, softcap, POLICY)
        total, dot, squares = _add(total, dot, squares, first, scale, reference, DOT, SQUARES)
        total, dot, squares = _add(total, dot, squares, second, scale, reference, DOT, SQUARES)
    for start in range(whole, interior, rest.numel):
        logits = _load(INTERIOR + start + rest, start + rest < interior, softcap, POLICY)
        total, dot, squares = _add(total, dot, squares, logits, scale, reference, DOT, SQUARES)
    row_total = tl.sum(total, axis=0)
    row_dot = tl.sum(dot, axis=0)
    row_squares = tl.sum(squares, axis=0)
    if edges > 0:
        logits = _load(EDGE, in_edge, softcap, POLICY)
        row_total, row_dot, row_squares = _add(
            row_total, row_dot, row_squares, logits, scale, reference, DOT, SQUARES
        )
    return row_total, row_dot, row_squares


@triton.jit
def _row_max(INTERIOR, EDGE, rest, in_edge, parts, softcap, POLICY: tl.constexpr):
    _, interior, _ = parts
    largest = tl.max(_load(EDGE, in_edge, softcap, POLICY), axis=0)
    of_groups = tl.full([rest.shape[0]], LOWEST, tl.float32)
    for start in range(0, interior, rest.numel):
        logits = _load(INTERIOR + start + rest, start + rest < interior, softcap, POLICY)
        of_groups = tl.maximum(of_groups, tl.max(logits, axis=1))
    return tl.maximum(largest, tl.max(of_groups, axis=0))


@triton.jit
def _store_grad(PTR, logits, wanted, scale, reference, factor, slope, softcap):
    """Stores (factor + slope * log2 softmax) * softmax, times the derivative of the soft cap."""
    exponent = tl.fma(logits, scale, -reference)
    if slope is not None:
        factor = tl.fma(tl.maximum(exponent, -256.0), slope, factor)  # 2^-256 is 0: not 0 * -inf
    grad = factor * tl.exp2(exponent)
    if softcap is not None:
        tanh = logits * (1.0 / softcap)
        grad *= 1.0 - tanh * tanh
    grad = grad.to(PTR.dtype.element_ty)
    if wanted is None:
        tl.store(PTR, grad)
    else:
        tl.store(PTR, grad, mask=wanted)


# As in policy_loss.py nothing is specialised on values: one compiled kernel for every T, V, slice
# and setting. Tensors are always aligned: of the logits a row finds its own vectors.
@triton.jit(
    do_not_specialize=[
        "first_id", "vocabulary", "offset", "first_row", "rows", "T", "V", "stride_lb", "stride_lt",
    ],
    do_not_specialize_on_alignment=[
        "LOG_PROBS", "ENTROPY", "SQUARES", "PARTIALS", "OUT_SUMS", "sums",
    ],
)  # fmt: skip
def logits_policy_loss_kernel(
    LOGITS,
    tokens,
    GRAD,
    LOG_PROBS,
    ENTROPY,
    SQUARES,
    PARTIALS,
    OUT_SUMS,
    sums,
    first_id,
    vocabulary,
    offset: tl.int64,
    first_row: tl.int64,
    rows: tl.int64,
    T: tl.int64,
    V: tl.int64,
    stride_lb: tl.int64,
    stride_lt: tl.int64,
    inverse_temperature: tl.float32,
    softcap,
    terms,
    kl_terms,
    rollout_terms,
    METRICS: tl.constexpr,
    NUM_EXTRAS: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The first logit is LOGITS[offset]. Row ``program_id`` belongs to token ``first_row +
    program_id`` of the N = ``rows`` ``tokens``. GRAD is (R, V) and contiguous, its
    rows as far from a 16-byte boundary as those of LOGITS, and may be LOGITS.

    SQUARES is the sum of the squared probabilities. PARTIALS is (1, N), or with METRICS (10 +
    NUM_EXTRAS, N), in the order of policy_loss_fwd_kernel, one column a token. What is absent is
    None; without weights there are no PARTIALS. A row that is not active is not read, its
    gradient is 0, and LOG_PROBS, ENTROPY, SQUARES and PARTIALS keep what they hold.

    Where a row is spread over processes, ``first_id`` is the token id of the first logit that is
    here, ``vocabulary`` how many there are in all, and there are two launches. The first writes its
    sums into OUT_SUMS, (3 to 5, N), and nothing else: reference, the exponent of the token's own
    logit (0 where it is not here), sum of exp2, for the entropy that of exponents times exp2, for
    SQUARES that of squares. The second takes what they are over all processes as ``sums``, and
    passes over the row but once.
    """
    pid = tl.program_id(0).to(tl.int64)
    n = first_row + pid
    BLOCK: tl.constexpr = GROUPS * VECTOR
    KEEP: tl.constexpr = "evict_last" if GRAD is not None else "evict_first"
    lane = tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    rest = tl.arange(0, GROUPS)[:, None] * 2 + tl.arange(0, 2)[None, :]

    # A row starts anywhere when V is odd. Its interior [first, first + interior) is whole 16-byte
    # vectors, which the products say in a form that the compiler can prove; the few logits on
    # either side of it are one small tile, so every V gets wide loads and stores. Of the interior,
    # whole tiles need no mask; the rest is read by narrower vectors, as each thread computes with
    # all that it might read.
    row_start = offset + (pid // T) * stride_lb + (pid % T) * stride_lt
    row_end = row_start + V
    first = tl.cdiv(row_start, VECTOR) * VECTOR
    interior = tl.maximum((row_end - first).to(tl.int32) // VECTOR, 0) * VECTOR
    whole = interior // (2 * BLOCK) * (2 * BLOCK)
    parts = whole, interior, V - interior
    side = tl.arange(0, 2 * VECTOR)
    edge = tl.where(side < VECTOR, row_start + side, first + interior + side - VECTOR)
    in_edge = (edge < row_end) & ((side >= VECTOR) | (edge < first))
    INTERIOR = LOGITS + first

    DOT: tl.constexpr = ENTROPY is not None or tokens.entropy_weights is not None
    grad = 0.0
    entropy_grad = 0.0
    entropy = 0.0
    reference = 0.0
    log2_total = 0.0
    log2_prob = 0.0
    token_logit = 0.0
    scale = inverse_temperature * LOG2_E
    token_id = tl.full([], -1, tl.int64)
    if tl.load(tokens.active + n):
        token_id = tl.load(tokens.token_ids + n).to(tl.int64)
        if first_id is not None:
            in_vocabulary = (token_id >= 0) & (token_id < vocabulary)
            token_id -= first_id
            is_here = (token_id >= 0) & (token_id < V)
        else:
            in_vocabulary = (token_id >= 0) & (token_id < V)
            is_here = in_vocabulary
        # A token id outside the vocabulary cannot raise here without a sync: the loss is NaN.
        token_logit = tl.load(LOGITS + row_start + token_id, mask=is_here, other=float("nan"))
        token_logit = _soft_cap(token_logit.to(tl.float32), softcap)

        if sums is None:
            # In a sum of exp(z - reference) the reference need not be the largest z, only so near
            # to it that nothing overflows, and not above it.
            guess = _load(INTERIOR + lane, lane < interior, softcap, KEEP)
            guess = tl.max(tl.max(guess, axis=1), axis=0)
            if first_id is not None:
                guess = tl.maximum(guess, tl.where(is_here, token_logit, float("-inf")))
            else:
                guess = tl.maximum(guess, token_logit)
            reference = tl.maximum(guess * scale, LOWEST)
            total, dot, squares = _row_sums(
                INTERIOR, LOGITS + edge, lane, rest, in_edge, parts, scale, reference, softcap,
                DOT, SQUARES is not None, KEEP,
            )  # fmt: skip
            if total > LARGE:
                largest = _row_max(INTERIOR, LOGITS + edge, rest, in_edge, parts, softcap, KEEP)
                reference = tl.maximum(largest * scale, LOWEST)
                total, dot, squares = _row_sums(
                    INTERIOR, LOGITS + edge, lane, rest, in_edge, parts, scale, reference, softcap,
                    DOT, SQUARES is not None, KEEP,
                )  # fmt: skip
            token_exponent = tl.fma(token_logit, scale, -reference)
        else:
            reference = tl.load(sums + n)
            token_exponent = tl.load(sums + rows + n)
            token_exponent = tl.where(in_vocabulary, token_exponent, float("nan"))
            total = tl.load(sums + 2 * rows + n)
            dot = total
            squares = total
            if DOT:
                dot = tl.load(sums + 3 * rows + n)
            if SQUARES is not None:
                squares = tl.load(sums + (4 if DOT else 3) * rows + n)
        if OUT_SUMS is not None:
            tl.store(OUT_SUMS + n, reference)
            tl.store(OUT_SUMS + rows + n, tl.where(is_here, token_exponent, 0.0))
            tl.store(OUT_SUMS + 2 * rows + n, total)
            if DOT:
                tl.store(OUT_SUMS + 3 * rows + n, dot)
            if SQUARES is not None:
                tl.store(OUT_SUMS + (4 if DOT else 3) * rows + n, squares)
        else:
            log2_total = tl.log2(total)
            log2_prob = token_exponent - log2_total
            # Of a token that has all of the sum the logarithm is 0, not the rounding of a
            # reference.
            log2_prob = tl.where(
                (tl.exp2(token_exponent) >= total) | (log2_prob > 0), 0.0, log2_prob
            )
            log_prob = log2_prob * LN_2
            tl.store(LOG_PROBS + n, log_prob)
            if DOT:
                entropy = (log2_total - dot / total) * LN_2
            if ENTROPY is not None:
                tl.store(ENTROPY + n, entropy)
            if SQUARES is not None:
                tl.store(SQUARES + n, squares / (total * total))
            if tokens.weights is not None:
                advantage = tl.load(tokens.advantages + n)
                if tokens.old_log_probs is not None:
                    raw = log_prob - tl.load(tokens.old_log_probs + n)
                    log_ratio, ratio, outside = clamped_ratio(raw, terms.log_ratio_clamp)
                else:
                    log_ratio, ratio, outside = unit_ratio(log_prob)
                policy_weight = None
                if tokens.policy_weights is not None:
                    policy_weight = tl.load(tokens.policy_weights + n)
                if tokens.rollout_log_probs is not None:
                    log_weight, unscored = rollout_log_ratio(
                        rollout_terms, log_prob, tl.load(tokens.rollout_log_probs + n)
                    )
                    correction, truncated, masked = rollout_of_token(
                        rollout_terms, log_weight, unscored
                    )
                    if policy_weight is not None:
                        policy_weight *= correction
                    else:
                        policy_weight = correction
                ref_log_prob = None
                if tokens.ref_log_probs is not None:
                    ref_log_prob = tl.load(tokens.ref_log_probs + n)
                loss, through_ratio, past_ratio, below, above, kl, extras = token_terms(
                    terms,
                    kl_terms,
                    log_prob,
                    ratio,
                    outside,
                    advantage,
                    policy_weight,
                    ref_log_prob,
                )
                grad = through_ratio + past_ratio
                # What does not depend on the log-prob does not know that it is NaN.
                weight = tl.where(in_vocabulary, tl.load(tokens.weights + n), float("nan"))
                grad *= weight * inverse_temperature
                loss *= weight
                if tokens.entropy_weights is not None:
                    entropy_weight = tl.load(tokens.entropy_weights + n)
                    entropy_grad = entropy_weight * inverse_temperature
                    loss -= entropy_weight * entropy
                tl.store(PARTIALS + n, loss)
                if METRICS:
                    counted = tl.full([], True, tl.int1)
                    metrics = token_metrics(counted, advantage, log_ratio, ratio, below, above, kl)
                    for k in tl.static_range(NUM_METRICS):
                        tl.store(PARTIALS + (1 + k) * rows + n, metrics[k])
                    for k in tl.static_range(NUM_EXTRAS):
                        tl.store(PARTIALS + (1 + NUM_METRICS + k) * rows + n, extras[k])
                    if tokens.rollout_log_probs is not None:
                        corrections = rollout_metrics(
                            counted, correction, truncated, masked, correction < 0.0, unscored,
                            log_weight,
                        )  # fmt: skip
                        for k in tl.static_range(NUM_ROLLOUT_METRICS):
                            row = 1 + NUM_METRICS + NUM_EXTRAS + k
                            tl.store(PARTIALS + row * rows + n, corrections[k])

    if GRAD is not None:
        # Where the same logits lie in GRAD.
        grad_shift = (pid * V - row_start) // VECTOR * VECTOR
        GRAD_INTERIOR = GRAD + (first + grad_shift)
        GRAD_EDGE = GRAD + edge + grad_shift
        # In place the stores must not overtake another thread's loads of the first pass.
        tl.debug_barrier()
        has_grad = grad != 0
        if tokens.entropy_weights is not None:
            has_grad = has_grad | (entropy_grad != 0)
        if has_grad:
            # d loss / d z is grad * (onehot - softmax): first -grad * softmax everywhere, in one
            # multiply-add, one exp2 and one product. Rounding the sum of reference and log2_total
            # would be an error of every probability, so the factor takes it back. The entropy adds
            # entropy_grad * softmax * (log softmax + entropy): one more multiply-add.
            shifted = reference + log2_total
            rounding = (shifted - reference) - log2_total
            factor = -grad * (1.0 + rounding * LN_2)
            slope = None
            if tokens.entropy_weights is not None:
                slope = entropy_grad * LN_2 * (1.0 + rounding * LN_2)
                factor += entropy_grad * (entropy + rounding * LN_2) * (1.0 + rounding * LN_2)
            if parts[2] > 0:
                logits = _load(LOGITS + edge, in_edge, softcap, "")
                tl.debug_barrier()
                _store_grad(GRAD_EDGE, logits, in_edge, scale, shifted, factor, slope, softcap)
            # Backwards: what the first pass read last is still in the caches.
            rests = tl.cdiv(interior - whole, rest.numel)
            for i in range(0, rests):
                at = whole + (rests - 1 - i) * rest.numel + rest
                logits = _load(INTERIOR + at, at < interior, softcap, "evict_first")
                here = GRAD_INTERIOR + at
                _store_grad(here, logits, at < interior, scale, shifted, factor, slope, softcap)
            tiles = whole // (2 * BLOCK)
            for i in range(0, tiles):
                start = (tiles - 1 - i) * (2 * BLOCK)
                left = _load(INTERIOR + start + lane, None, softcap, "evict_first")
                right = _load(INTERIOR + (start + BLOCK) + lane, None, softcap, "evict_first")
                _store_grad(
                    GRAD_INTERIOR + start + lane, left, None, scale, shifted, factor, slope, softcap
                )
                _store_grad(
                    GRAD_INTERIOR + (start + BLOCK) + lane, right, None, scale, shifted, factor,
                    slope, softcap,
                )  # fmt: skip
            # Then the token's own logit.
            token_grad = grad * (1.0 - tl.exp2(log2_prob))
            if tokens.entropy_weights is not None:
                surprise = tl.maximum(log2_prob, -256.0) * LN_2 + entropy
                token_grad += entropy_grad * tl.exp2(log2_prob) * surprise
            if softcap is not None:
                tanh = token_logit * (1.0 / softcap)
                token_grad *= 1.0 - tanh * tanh
            tl.debug_barrier()
            tl.store(
                GRAD + (row_start + grad_shift + token_id),
                token_grad.to(GRAD.dtype.element_ty),
                mask=(token_id >= 0) & (token_id < V),
            )
        else:
            # A masked or a clipped token costs no second read.
            zeros = tl.zeros([GROUPS, VECTOR], GRAD.dtype.element_ty)
            edge_zeros = tl.zeros([2 * VECTOR], GRAD.dtype.element_ty)
            tl.store(GRAD_EDGE, edge_zeros, mask=in_edge)
            for start in range(0, interior, BLOCK):
                tl.store(GRAD_INTERIOR + start + lane, zeros, mask=start + lane < interior)
