"""Device code of the policy loss over token log-probabilities.

B sequences (rows), T tokens per row, N = B * T or the length of the packed stream, G sequences.
The tokens are one flat stream cut into tiles of BLOCK, one tile a program, so every tile starts on
a vector boundary whatever T is, and padded and packed are one kernel.
"""

import triton
import triton.language as tl

from .token_loss import clamped_ratio, token_kl, token_surrogate


@triton.jit
def _load_tile(PTR, start, lane, in_bounds, interior, OTHER: tl.constexpr):
    # A load with a mask cannot be proved vectorisable, so only the stream's last tile uses one.
    if interior:
        values = tl.load(PTR + start + lane)
    else:
        values = tl.load(PTR + start + lane, mask=in_bounds, other=OTHER)
    return values


@triton.jit
def _load_tokens(
    PTR,
    start,
    lane,
    in_bounds,
    interior,
    row,
    column,
    stride_b,
    stride_t,
    OTHER: tl.constexpr,
    STRIDED: tl.constexpr,
):
    if STRIDED:
        values = tl.load(PTR + row * stride_b + column * stride_t, mask=in_bounds, other=OTHER)
    else:
        values = _load_tile(PTR, start, lane, in_bounds, interior, OTHER)
    return values


@triton.jit
def _store_tile(PTR, start, lane, values, in_bounds, interior):
    values = values.to(PTR.dtype.element_ty)
    if interior:
        tl.store(PTR + start + lane, values)
    else:
        tl.store(PTR + start + lane, values, mask=in_bounds)


@triton.jit
def _count(flags):
    return tl.sum(flags.to(tl.int32), axis=0).to(tl.float32)


@triton.jit
def _sequence_end(CU_SEQLENS, seq, T, PACKED: tl.constexpr):
    if PACKED:
        end = tl.load(CU_SEQLENS + seq + 1).to(tl.int64)
    else:
        end = (seq + 1) * T
    return end


# Nothing is specialised on the value of an argument, so every T, batch and setting runs one and the
# same compiled kernel. Vector loads need aligned streams; what is read as scalars need not be.
_SIZES = [
    "N", "T", "G", "stride_lb", "stride_lt", "stride_ob", "stride_ot", "stride_rb", "stride_rt",
    "stride_ab", "stride_at", "stride_mb", "stride_mt", "stride_wb", "stride_wt", "stride_eb",
    "stride_et",
]  # fmt: skip
_STREAMS = [
    "LOG_PROBS", "OLD_LOG_PROBS", "REF_LOG_PROBS", "ADVANTAGES", "MASK", "ROLLOUT_WEIGHTS",
    "ENTROPY_MASK",
]  # fmt: skip
_SCALARS = [
    "SEQUENCE_MASK", "CU_SEQLENS", "LOG_RATIO_MEANS", "RATIO_GRADS", "WEIGHTS", "PARTIALS"
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_SCALARS)
def policy_loss_fwd_kernel(
    LOG_PROBS,
    OLD_LOG_PROBS,
    REF_LOG_PROBS,
    ADVANTAGES,
    MASK,
    ROLLOUT_WEIGHTS,
    ENTROPY_MASK,
    SEQUENCE_MASK,
    CU_SEQLENS,
    LOG_RATIO_MEANS,
    RATIO_GRADS,
    WEIGHTS,
    GRAD,
    PARTIALS,
    N: tl.int64,
    T: tl.int64,
    G: tl.int64,
    stride_lb: tl.int64,
    stride_lt: tl.int64,
    stride_ob: tl.int64,
    stride_ot: tl.int64,
    stride_rb: tl.int64,
    stride_rt: tl.int64,
    stride_ab: tl.int64,
    stride_at: tl.int64,
    stride_mb: tl.int64,
    stride_mt: tl.int64,
    stride_wb: tl.int64,
    stride_wt: tl.int64,
    stride_eb: tl.int64,
    stride_et: tl.int64,
    positive_high: tl.float32,
    negative_low: tl.float32,
    negative_high: tl.float32,
    sapo_temperature_pos: tl.float32,
    sapo_temperature_neg: tl.float32,
    log_ratio_clamp: tl.float32,
    beta: tl.float32,
    PACKED: tl.constexpr,
    STRIDED: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TOKEN_ADVANTAGES: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    TOKEN_ROLLOUT: tl.constexpr,
    HAS_ENTROPY_MASK: tl.constexpr,
    HAS_SEQUENCE_MASK: tl.constexpr,
    SEQUENCE_RATIO: tl.constexpr,
    MEAN_GRAD: tl.constexpr,
    CISPO: tl.constexpr,
    SAPO: tl.constexpr,
    BIAS_CORRECTED_KL: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    METRICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    start = pid.to(tl.int64) * BLOCK
    interior = start + BLOCK <= N
    in_bounds = lane < N - start

    row = tl.zeros([BLOCK], tl.int64)
    column = start + lane
    if STRIDED and not PACKED:
        first_row = start // T
        column_from_first = (start - first_row * T).to(tl.int32) + lane
        rows_down = column_from_first // T.to(tl.int32)
        row = first_row + rows_down
        column = (column_from_first - rows_down * T.to(tl.int32)).to(tl.int64)

    if HAS_MASK:
        counted = (
            _load_tokens(
                MASK, start, lane, in_bounds, interior, row, column,
                stride_mb, stride_mt, 0, STRIDED,
            )
            != 0
        )  # fmt: skip
    else:
        counted = in_bounds

    program_loss = 0.0
    tokens = 0.0
    clipped_low = 0.0
    clipped_high = 0.0
    clipped_dual = 0.0
    total_ratio = 0.0
    total_k1 = 0.0
    total_k3 = 0.0
    total_kl = 0.0
    max_ratio = 0.0
    # A tile of padding alone costs its mask and its zeros.
    if tl.max(counted.to(tl.int32), axis=0) > 0:
        log_prob = tl.zeros([BLOCK], tl.float32)
        old_log_prob = log_prob
        if (HAS_OLD and not SEQUENCE_RATIO) or HAS_REF or CISPO:
            log_prob = _load_tokens(
                LOG_PROBS, start, lane, in_bounds, interior, row, column,
                stride_lb, stride_lt, 0.0, STRIDED,
            ).to(tl.float32)  # fmt: skip
        if HAS_OLD and not SEQUENCE_RATIO:
            old_log_prob = _load_tokens(
                OLD_LOG_PROBS, start, lane, in_bounds, interior, row, column,
                stride_ob, stride_ot, 0.0, STRIDED,
            ).to(tl.float32)  # fmt: skip

        # While those loads are under way: the sequence of the tile's first token, then each later
        # one overwrites the rest of the tile.
        if PACKED:
            seq = tl.zeros([], tl.int64)
            after = G
            while after - seq > 1:
                middle = (seq + after) // 2
                if tl.load(CU_SEQLENS + middle).to(tl.int64) <= start:
                    seq = middle
                else:
                    after = middle
        else:
            seq = start // T
        weight = tl.zeros([BLOCK], tl.float32) + tl.load(WEIGHTS + seq)
        if not TOKEN_ADVANTAGES:
            advantage = tl.zeros([BLOCK], tl.float32) + tl.load(ADVANTAGES + seq).to(tl.float32)
        if HAS_ROLLOUT and not TOKEN_ROLLOUT:
            rollout = tl.zeros([BLOCK], tl.float32) + tl.load(ROLLOUT_WEIGHTS + seq).to(tl.float32)
        if HAS_SEQUENCE_MASK:
            kept = tl.zeros([BLOCK], tl.int32) + (tl.load(SEQUENCE_MASK + seq) != 0).to(tl.int32)
        if SEQUENCE_RATIO:
            log_ratio_mean = tl.zeros([BLOCK], tl.float32) + tl.load(LOG_RATIO_MEANS + seq)
        if MEAN_GRAD:
            ratio_grad = tl.zeros([BLOCK], tl.float32) + tl.load(RATIO_GRADS + seq)
        seq_end = _sequence_end(CU_SEQLENS, seq, T, PACKED)
        while (seq_end < start + BLOCK) & (seq + 1 < G):
            seq += 1
            here = lane >= (seq_end - start).to(tl.int32)
            weight = tl.where(here, tl.load(WEIGHTS + seq), weight)
            if not TOKEN_ADVANTAGES:
                advantage = tl.where(here, tl.load(ADVANTAGES + seq).to(tl.float32), advantage)
            if HAS_ROLLOUT and not TOKEN_ROLLOUT:
                rollout = tl.where(here, tl.load(ROLLOUT_WEIGHTS + seq).to(tl.float32), rollout)
            if HAS_SEQUENCE_MASK:
                kept = tl.where(here, (tl.load(SEQUENCE_MASK + seq) != 0).to(tl.int32), kept)
            if SEQUENCE_RATIO:
                log_ratio_mean = tl.where(here, tl.load(LOG_RATIO_MEANS + seq), log_ratio_mean)
            if MEAN_GRAD:
                ratio_grad = tl.where(here, tl.load(RATIO_GRADS + seq), ratio_grad)
            seq_end = _sequence_end(CU_SEQLENS, seq, T, PACKED)

        if TOKEN_ADVANTAGES:
            advantage = _load_tokens(
                ADVANTAGES, start, lane, in_bounds, interior, row, column,
                stride_ab, stride_at, 0.0, STRIDED,
            ).to(tl.float32)  # fmt: skip
        # Zeroed before exp: what a masked position holds must not get through.
        log_prob = tl.where(counted, log_prob, 0.0)
        old_log_prob = tl.where(counted, old_log_prob, 0.0)
        raw = log_prob - old_log_prob
        if SEQUENCE_RATIO:
            raw = log_ratio_mean
        log_ratio, ratio, outside = clamped_ratio(raw, log_ratio_clamp, HAS_OLD)
        loss, grad, below, above = token_surrogate(
            log_prob, ratio, outside, advantage, positive_high, negative_low, negative_high,
            sapo_temperature_pos, sapo_temperature_neg, CISPO, SAPO,
        )  # fmt: skip
        if MEAN_GRAD and not CISPO:
            grad = tl.zeros([BLOCK], tl.float32)  # through the ratio alone: in ratio_grad
        if HAS_ROLLOUT:
            if TOKEN_ROLLOUT:
                rollout = _load_tokens(
                    ROLLOUT_WEIGHTS, start, lane, in_bounds, interior, row, column,
                    stride_wb, stride_wt, 0.0, STRIDED,
                ).to(tl.float32)  # fmt: skip
            loss *= rollout
            grad *= rollout
        if HAS_ENTROPY_MASK:
            entropy_mask = _load_tokens(
                ENTROPY_MASK, start, lane, in_bounds, interior, row, column,
                stride_eb, stride_et, 0, STRIDED,
            )  # fmt: skip
            dropped = entropy_mask == 0
            if HAS_SEQUENCE_MASK:
                dropped = dropped | (kept == 0)
        elif HAS_SEQUENCE_MASK:
            dropped = kept == 0
        if HAS_ENTROPY_MASK or HAS_SEQUENCE_MASK:
            grad = tl.where(dropped, 0.0, grad)
            if CISPO:  # once more, not kept since: registers
                loss = tl.where(dropped, 0.0, grad * log_prob)
            else:
                loss = tl.where(dropped, 0.0, loss)
        if HAS_REF:
            ref_log_prob = _load_tokens(
                REF_LOG_PROBS, start, lane, in_bounds, interior, row, column,
                stride_rb, stride_rt, 0.0, STRIDED,
            ).to(tl.float32)  # fmt: skip
            kl, kl_grad = token_kl(log_prob, tl.where(counted, ref_log_prob, 0.0))
            if BIAS_CORRECTED_KL:
                kl *= ratio
                kl_grad *= ratio
                if not MEAN_GRAD:
                    kl_grad += tl.where(outside, 0.0, kl)
            # Not 0 * inf where the reference is read for its metric alone.
            loss += tl.where(beta > 0, beta * kl, 0.0)
            grad += tl.where(beta > 0, beta * kl_grad, 0.0)
        if MEAN_GRAD:
            grad += ratio_grad
        if WRITE_GRAD:
            grad = tl.where(counted, weight * grad, 0.0)
            _store_tile(GRAD, start, lane, grad, in_bounds, interior)
        program_loss = tl.sum(tl.where(counted, weight * loss, 0.0), axis=0)
        if METRICS:
            negative = advantage < 0
            positive = advantage > 0
            ratio = tl.where(counted, ratio, 0.0)
            log_ratio = tl.where(counted, log_ratio, 0.0)
            tokens = _count(counted)
            if CISPO:
                clipped_low = _count(counted & below & (advantage != 0))
            else:
                clipped_low = _count(counted & below & negative)
            clipped_high = _count(counted & above & positive)
            clipped_dual = _count(counted & above & negative)
            total_ratio = tl.sum(ratio, axis=0)
            total_k1 = -tl.sum(log_ratio, axis=0)
            total_k3 = tl.sum(tl.where(counted, ratio - 1.0 - log_ratio, 0.0), axis=0)
            if HAS_REF:
                total_kl = tl.sum(tl.where(counted, kl, 0.0), axis=0)
            max_ratio = tl.max(ratio, axis=0)
    else:
        if WRITE_GRAD:
            zeros = tl.zeros([BLOCK], tl.float32)
            _store_tile(GRAD, start, lane, zeros, in_bounds, interior)

    if PACKED:
        # Offsets that do not span the stream cannot raise here without a sync: the loss says so.
        spans = (tl.load(CU_SEQLENS).to(tl.int64) == 0) & (
            tl.load(CU_SEQLENS + G).to(tl.int64) == N
        )
        program_loss = tl.where(spans, program_loss, float("nan"))
    programs = tl.num_programs(0).to(tl.int64)
    tl.store(PARTIALS + pid, program_loss)
    if METRICS:
        tl.store(PARTIALS + 1 * programs + pid, tokens)
        tl.store(PARTIALS + 2 * programs + pid, clipped_low)
        tl.store(PARTIALS + 3 * programs + pid, clipped_high)
        tl.store(PARTIALS + 4 * programs + pid, clipped_dual)
        tl.store(PARTIALS + 5 * programs + pid, total_ratio)
        tl.store(PARTIALS + 6 * programs + pid, total_k1)
        tl.store(PARTIALS + 7 * programs + pid, total_k3)
        tl.store(PARTIALS + 8 * programs + pid, total_kl)
        tl.store(PARTIALS + 9 * programs + pid, max_ratio)


# For streams that are not contiguous or not aligned, as slices of a batch are: still one kernel.
# GRAD is ours and always both.
policy_loss_fwd_strided_kernel = triton.jit(
    policy_loss_fwd_kernel.fn,
    do_not_specialize=_SIZES,
    do_not_specialize_on_alignment=_STREAMS + _SCALARS,
)


@triton.jit(
    do_not_specialize=_SIZES,
    do_not_specialize_on_alignment=_STREAMS + _SCALARS,
)
def policy_loss_sequence_kernel(
    LOG_PROBS,
    OLD_LOG_PROBS,
    REF_LOG_PROBS,
    ADVANTAGES,
    MASK,
    ROLLOUT_WEIGHTS,
    ENTROPY_MASK,
    SEQUENCE_MASK,
    CU_SEQLENS,
    LOG_RATIO_MEANS,
    RATIO_GRADS,
    N: tl.int64,
    T: tl.int64,
    stride_lb: tl.int64,
    stride_lt: tl.int64,
    stride_ob: tl.int64,
    stride_ot: tl.int64,
    stride_rb: tl.int64,
    stride_rt: tl.int64,
    stride_ab: tl.int64,
    stride_at: tl.int64,
    stride_mb: tl.int64,
    stride_mt: tl.int64,
    stride_wb: tl.int64,
    stride_wt: tl.int64,
    stride_eb: tl.int64,
    stride_et: tl.int64,
    positive_high: tl.float32,
    negative_low: tl.float32,
    negative_high: tl.float32,
    sapo_temperature_pos: tl.float32,
    sapo_temperature_neg: tl.float32,
    log_ratio_clamp: tl.float32,
    beta: tl.float32,
    PACKED: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    TOKEN_ADVANTAGES: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    TOKEN_ROLLOUT: tl.constexpr,
    HAS_ENTROPY_MASK: tl.constexpr,
    HAS_SEQUENCE_MASK: tl.constexpr,
    MEAN_GRAD: tl.constexpr,
    CISPO: tl.constexpr,
    SAPO: tl.constexpr,
    BIAS_CORRECTED_KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean log-ratio of sequence ``program_id``, and what a log-prob changes through it.

    With s the ratio of the sequence, RATIO_GRADS is (1/L) sum_t d(loss_t)/d(log s). The policy
    term is A times a function of s and the sign of A, so two sums over the tokens are enough to
    know it once s is: one pass. The order of summation depends on the sequence alone, not on
    where in a batch it lies.
    """
    seq = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    row = seq
    first = tl.zeros([], tl.int64)
    end = T
    if PACKED:
        row = first
        # Offsets that do not fit the stream must not be read at: the loss will be NaN.
        first = tl.minimum(tl.maximum(tl.load(CU_SEQLENS + seq).to(tl.int64), 0), N)
        end = tl.minimum(tl.load(CU_SEQLENS + seq + 1).to(tl.int64), N)

    tokens = tl.zeros([BLOCK], tl.float32)
    log_ratios = tl.zeros([BLOCK], tl.float32)
    positive = tl.zeros([BLOCK], tl.float32)
    negative = tl.zeros([BLOCK], tl.float32)
    kls = tl.zeros([BLOCK], tl.float32)
    while first < end:
        column = first + lane
        in_bounds = column < end
        counted = in_bounds
        if HAS_MASK:
            mask = tl.load(MASK + row * stride_mb + column * stride_mt, mask=in_bounds, other=0)
            counted = mask != 0
        tokens += tl.where(counted, 1.0, 0.0)
        if HAS_OLD or BIAS_CORRECTED_KL:
            log_prob = tl.load(
                LOG_PROBS + row * stride_lb + column * stride_lt, mask=counted, other=0.0
            ).to(tl.float32)
        if HAS_OLD:
            old_log_prob = tl.load(
                OLD_LOG_PROBS + row * stride_ob + column * stride_ot, mask=counted, other=0.0
            ).to(tl.float32)
            log_ratios += log_prob - old_log_prob
        if MEAN_GRAD and not CISPO:
            if TOKEN_ADVANTAGES:
                policy = tl.load(
                    ADVANTAGES + row * stride_ab + column * stride_at, mask=counted, other=0.0
                ).to(tl.float32)
            else:
                policy = tl.where(counted, tl.load(ADVANTAGES + seq).to(tl.float32), 0.0)
            is_negative = policy < 0
            if TOKEN_ROLLOUT:
                policy *= tl.load(
                    ROLLOUT_WEIGHTS + row * stride_wb + column * stride_wt, mask=counted, other=0.0
                ).to(tl.float32)
            if HAS_ENTROPY_MASK:
                entropy_mask = tl.load(
                    ENTROPY_MASK + row * stride_eb + column * stride_et, mask=counted, other=0
                )
                policy = tl.where(entropy_mask != 0, policy, 0.0)
            negative += tl.where(is_negative, policy, 0.0)
            positive += tl.where(is_negative, 0.0, policy)
        if MEAN_GRAD and BIAS_CORRECTED_KL:
            ref_log_prob = tl.load(
                REF_LOG_PROBS + row * stride_rb + column * stride_rt, mask=counted, other=0.0
            ).to(tl.float32)
            kl, _ = token_kl(log_prob, ref_log_prob)
            kls += kl
        first += BLOCK

    length = tl.maximum(tl.sum(tokens, axis=0), 1.0)
    mean = tl.sum(log_ratios, axis=0) / length
    tl.store(LOG_RATIO_MEANS + seq, mean)
    if MEAN_GRAD:
        _, ratio, outside = clamped_ratio(mean, log_ratio_clamp, HAS_OLD)
        total = 0.0
        if not CISPO:
            one = tl.full([], 1.0, tl.float32)
            _, for_positive, _, _ = token_surrogate(
                mean, ratio, outside, one, positive_high, negative_low, negative_high,
                sapo_temperature_pos, sapo_temperature_neg, CISPO, SAPO,
            )  # fmt: skip
            _, for_negative, _, _ = token_surrogate(
                mean, ratio, outside, -one, positive_high, negative_low, negative_high,
                sapo_temperature_pos, sapo_temperature_neg, CISPO, SAPO,
            )  # fmt: skip
            total = for_positive * tl.sum(positive, axis=0) - for_negative * tl.sum(
                negative, axis=0
            )
            if HAS_ROLLOUT and not TOKEN_ROLLOUT:
                total *= tl.load(ROLLOUT_WEIGHTS + seq).to(tl.float32)
            if HAS_SEQUENCE_MASK:
                total = tl.where(tl.load(SEQUENCE_MASK + seq) != 0, total, 0.0)
        if BIAS_CORRECTED_KL:
            total += tl.where(outside, 0.0, beta * ratio * tl.sum(kls, axis=0))
        tl.store(RATIO_GRADS + seq, total / length)


@triton.jit(do_not_specialize=["programs"])
def policy_loss_reduce_kernel(
    PARTIALS, LOSS, METRICS, programs: tl.int32, NUM_SUMS: tl.constexpr, BLOCK: tl.constexpr
):
    """Program k combines row k of PARTIALS in a fixed order: same bits every run.

    Row 0 is the loss. The others, if any, are the metrics: sums, and in the last row a maximum.
    """
    k = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    largest = tl.zeros([BLOCK], tl.float32)
    first = 0
    while first < programs:
        in_bounds = first + lane < programs
        pointers = PARTIALS + k.to(tl.int64) * programs + first + lane
        partial = tl.load(pointers, mask=in_bounds, other=0.0)
        total += partial
        largest = tl.maximum(largest, partial)
        first += BLOCK
    if k == 0:
        tl.store(LOSS, tl.sum(total, axis=0))
    elif k == NUM_SUMS - 1:
        tl.store(METRICS + k - 1, tl.max(largest, axis=0))
    else:
        tl.store(METRICS + k - 1, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["N"])
def policy_loss_bwd_kernel(
    GRAD,
    GRAD_OUTPUT,
    OUT,
    N: tl.int64,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """OUT = GRAD * grad_output; in place there is nothing to do when grad_output is 1."""
    scale = tl.load(GRAD_OUTPUT).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    if (not IN_PLACE) | (scale != 1.0):
        start = tl.program_id(0).to(tl.int64) * BLOCK
        interior = start + BLOCK <= N
        in_bounds = lane < N - start
        grad = _load_tile(GRAD, start, lane, in_bounds, interior, 0.0).to(tl.float32)
        _store_tile(OUT, start, lane, grad * scale, in_bounds, interior)
