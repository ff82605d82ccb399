"""Device code of the policy loss over logits.

N tokens, one row of V logits each, one program a row: log-sum-exp in a first pass over the row,
the loss of the token, and the gradient at the logits in a second pass. A token's logit z is
logit / temperature, after an optional soft cap.
"""

import triton
import triton.language as tl

from .surrogates import NUM_METRICS, clamped_ratio, policy_term, token_kl, token_metrics

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Where a running maximum starts: below every logit but finite, so that -inf - LOWEST is -inf.
LOWEST = tl.constexpr(-3.4028234e38)


@triton.jit
def _soft_cap(logits, softcap):
    """softcap * tanh(logits / softcap), or the logits without a soft cap"""
    if softcap is not None:
        exp = tl.exp(tl.abs(logits) * (-2.0 / softcap))
        capped = softcap * (1.0 - exp) / (1.0 + exp)
        logits = tl.where(logits < 0, -capped, capped)
    return logits


@triton.jit
def _logit_grad(logits, column, token_id, maximum, log2_sum, grad, to_log2, softcap):
    """grad * (onehot - softmax), grad being the derivative of the loss by z of the token."""
    capped = _soft_cap(logits, softcap)
    probability = tl.exp2((capped - maximum) * to_log2 - log2_sum)
    out = grad * (tl.where(column == token_id, 1.0, 0.0) - probability)
    if softcap is not None:
        tanh = capped * (1.0 / softcap)
        out *= 1.0 - tanh * tanh
    return out


# As in policy_loss.py nothing is specialised on values: one compiled kernel for every T, V, slice
# and setting. LOGITS and GRAD are always aligned: a row finds its own vectors. What is read as
# scalars need not be.
@triton.jit(
    do_not_specialize=["offset", "first_row", "rows", "T", "V", "stride_lb", "stride_lt"],
    do_not_specialize_on_alignment=[
        "TOKEN_IDS", "ACTIVE", "OLD_LOG_PROBS", "REF_LOG_PROBS", "ADVANTAGES", "WEIGHTS",
        "POLICY_WEIGHTS", "LOG_PROBS", "ENTROPY", "PARTIALS",
    ],
)  # fmt: skip
def logits_policy_loss_kernel(
    LOGITS,
    TOKEN_IDS,
    ACTIVE,
    OLD_LOG_PROBS,
    REF_LOG_PROBS,
    ADVANTAGES,
    WEIGHTS,
    POLICY_WEIGHTS,
    GRAD,
    LOG_PROBS,
    ENTROPY,
    PARTIALS,
    offset: tl.int64,
    first_row: tl.int64,
    rows: tl.int64,
    T: tl.int64,
    V: tl.int64,
    stride_lb: tl.int64,
    stride_lt: tl.int64,
    inverse_temperature: tl.float32,
    softcap,
    surrogate,
    log_ratio_clamp: tl.float32,
    beta: tl.float32,
    BIAS_CORRECTED_KL: tl.constexpr,
    METRICS: tl.constexpr,
    NUM_EXTRAS: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The first logit is LOGITS[offset]. Row ``program_id`` belongs to token ``first_row +
    program_id`` of the N = ``rows`` tokens of the other tensors. GRAD is (R, V) and contiguous, its
    rows as far from a 16-byte boundary as those of LOGITS, and may be LOGITS.

    PARTIALS is (1 or 10 + NUM_EXTRAS, N) in the order of policy_loss_fwd_kernel, one column a
    token. What is absent is None; without a surrogate only the log-prob and the entropy are
    written.
    """
    pid = tl.program_id(0).to(tl.int64)
    n = first_row + pid
    BLOCK: tl.constexpr = GROUPS * VECTOR
    KEEP: tl.constexpr = "evict_last" if GRAD is not None else "evict_first"
    lane = tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]

    # A row starts anywhere when V is odd. Its interior [first, first + interior) is whole 16-byte
    # vectors, which the products say in a form that the compiler can prove; the few logits on
    # either side of it are one small tile, so every V gets wide loads and stores.
    row_start = offset + (pid // T) * stride_lb + (pid % T) * stride_lt
    row_end = row_start + V
    first = tl.cdiv(row_start, VECTOR) * VECTOR
    interior = tl.maximum((row_end - first).to(tl.int32) // VECTOR, 0) * VECTOR
    INTERIOR = LOGITS + first
    side = tl.arange(0, 2 * VECTOR)
    edge = tl.where(side < VECTOR, row_start + side, first + interior + side - VECTOR)
    in_edge = (edge < row_end) & ((side >= VECTOR) | (edge < first))

    grad = 0.0
    maximum = 0.0
    log2_sum = 0.0
    to_log2 = inverse_temperature * LOG2_E
    token_id = tl.full([], -1, tl.int64)
    if tl.load(ACTIVE + n):
        token_id = tl.load(TOKEN_IDS + n).to(tl.int64)
        # A token id outside the vocabulary cannot raise here without a sync: the loss is NaN.
        token_logit = tl.load(
            LOGITS + row_start + token_id,
            mask=(token_id >= 0) & (token_id < V),
            other=float("nan"),
        ).to(tl.float32)
        token_logit = _soft_cap(token_logit, softcap)

        # Each thread keeps the maximum and the sum of its own vectors: no exchange in the loop.
        group_max = tl.full([GROUPS], LOWEST, tl.float32)
        group_sum = tl.zeros([GROUPS], tl.float32)
        # Sum of exp * (z - maximum), in units of log 2, for the entropy.
        group_dot = tl.zeros([GROUPS], tl.float32)
        for start in range(0, interior, BLOCK):
            in_bounds = start + lane < interior
            logits = tl.load(
                INTERIOR + start + lane,
                mask=in_bounds,
                other=float("-inf"),
                eviction_policy=KEEP,
            ).to(tl.float32)
            if softcap is not None:
                capped = _soft_cap(logits, softcap)
                logits = tl.where(in_bounds, capped, float("-inf"))
            new_max = tl.maximum(group_max, tl.max(logits, axis=1))
            shift = (group_max - new_max) * to_log2
            shrink = tl.exp2(shift)
            exponent = (logits - new_max[:, None]) * to_log2
            exp = tl.exp2(exponent)
            if ENTROPY is not None:
                # exp is 0 where the exponent is -inf, as is shrink where shift is: no 0 * -inf.
                dot = tl.sum(exp * tl.where(exp > 0, exponent, 0.0), axis=1)
                group_dot = (group_dot + group_sum * tl.where(shrink > 0, shift, 0.0)) * shrink
                group_dot += dot
            group_sum = group_sum * shrink + tl.sum(exp, axis=1)
            group_max = new_max
        edge_logits = tl.load(LOGITS + edge, mask=in_edge, other=float("-inf")).to(tl.float32)
        if softcap is not None:
            capped = _soft_cap(edge_logits, softcap)
            edge_logits = tl.where(in_edge, capped, float("-inf"))

        maximum = tl.maximum(tl.max(group_max, axis=0), tl.max(edge_logits, axis=0))
        shift = (group_max - maximum) * to_log2
        shrink = tl.exp2(shift)
        edge_exponent = (edge_logits - maximum) * to_log2
        edge_exp = tl.exp2(edge_exponent)
        total = tl.sum(group_sum * shrink, axis=0) + tl.sum(edge_exp, axis=0)
        log2_sum = tl.log2(total)
        # The largest logit adds exactly 1 to the total, so no log-prob is above 0.
        log_prob = ((token_logit - maximum) * to_log2 - log2_sum) * LN_2
        if ENTROPY is not None:
            dot = (group_dot + group_sum * tl.where(shrink > 0, shift, 0.0)) * shrink
            edge_dot = edge_exp * tl.where(edge_exp > 0, edge_exponent, 0.0)
            mean = (tl.sum(dot, axis=0) + tl.sum(edge_dot, axis=0)) / total
            entropy = (log2_sum - mean) * LN_2

        tl.store(LOG_PROBS + n, log_prob)
        if ENTROPY is not None:
            tl.store(ENTROPY + n, entropy)
        if surrogate is not None:
            advantage = tl.load(ADVANTAGES + n)
            if OLD_LOG_PROBS is not None:
                raw = log_prob - tl.load(OLD_LOG_PROBS + n).to(tl.float32)
                log_ratio, ratio, outside = clamped_ratio(raw, log_ratio_clamp)
            else:
                log_ratio = tl.zeros_like(log_prob)
                ratio = log_ratio + 1.0
                outside = ratio < 0.0
            policy_weight = None
            if POLICY_WEIGHTS is not None:
                policy_weight = tl.load(POLICY_WEIGHTS + n).to(tl.float32)
            loss, through_ratio, past_ratio, below, above, extras = policy_term(
                surrogate, log_prob, ratio, outside, advantage, policy_weight
            )
            grad = through_ratio + past_ratio
            kl = tl.zeros_like(log_prob)
            if REF_LOG_PROBS is not None:
                kl, kl_grad = token_kl(log_prob, tl.load(REF_LOG_PROBS + n).to(tl.float32))
                if BIAS_CORRECTED_KL:
                    kl *= ratio
                    kl_grad = kl_grad * ratio + tl.where(outside, 0.0, kl)
                # Not 0 * inf where the reference is read for its metric alone.
                loss += tl.where(beta > 0, beta * kl, 0.0)
                grad += tl.where(beta > 0, beta * kl_grad, 0.0)
            # What does not depend on the log-prob does not know that it is NaN.
            in_vocabulary = (token_id >= 0) & (token_id < V)
            weight = tl.where(in_vocabulary, tl.load(WEIGHTS + n), float("nan"))
            grad *= weight * inverse_temperature
            tl.store(PARTIALS + n, loss * weight)
            if METRICS:
                counted = tl.full([], True, tl.int1)
                metrics = token_metrics(counted, advantage, log_ratio, ratio, below, above, kl)
                for k in tl.static_range(NUM_METRICS):
                    tl.store(PARTIALS + (1 + k) * rows + n, metrics[k].to(tl.float32))
                for k in tl.static_range(NUM_EXTRAS):
                    tl.store(PARTIALS + (1 + NUM_METRICS + k) * rows + n, extras[k])

    if GRAD is not None:
        # Where the same logits lie in GRAD.
        grad_shift = (pid * V - row_start) // VECTOR * VECTOR
        GRAD_INTERIOR = GRAD + (first + grad_shift)
        # In place the stores must not overtake another thread's loads of the first pass.
        tl.debug_barrier()
        if grad != 0:
            edge_logits = tl.load(LOGITS + edge, mask=in_edge, other=0.0).to(tl.float32)
            edge_grad = _logit_grad(
                edge_logits, edge - row_start, token_id, maximum, log2_sum, grad, to_log2,
                softcap,
            )  # fmt: skip
            tl.debug_barrier()
            tl.store(GRAD + edge + grad_shift, edge_grad.to(GRAD.dtype.element_ty), mask=in_edge)
            # Backwards: what the first pass read last is still in the caches.
            token_lane = (token_id - (first - row_start)).to(tl.int32)
            tiles = tl.cdiv(interior, BLOCK)
            for tile in range(0, tiles):
                start = (tiles - 1 - tile) * BLOCK
                in_bounds = start + lane < interior
                logits = tl.load(
                    INTERIOR + start + lane,
                    mask=in_bounds,
                    other=0.0,
                    eviction_policy="evict_first",
                ).to(tl.float32)
                logit_grad = _logit_grad(
                    logits, start + lane, token_lane, maximum, log2_sum, grad, to_log2,
                    softcap,
                )  # fmt: skip
                tl.store(
                    GRAD_INTERIOR + start + lane,
                    logit_grad.to(GRAD.dtype.element_ty),
                    mask=in_bounds,
                )
        else:
            # A masked or a clipped token costs no second read.
            zeros = tl.zeros([GROUPS, VECTOR], GRAD.dtype.element_ty)
            edge_zeros = tl.zeros([2 * VECTOR], GRAD.dtype.element_ty)
            tl.store(GRAD + edge + grad_shift, edge_zeros, mask=in_edge)
            for start in range(0, interior, BLOCK):
                tl.store(GRAD_INTERIOR + start + lane, zeros, mask=start + lane < interior)
