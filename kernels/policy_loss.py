"""Device code of the policy loss over token log-probabilities.

B sequences (rows), T tokens per row, N = B * T or the length of the packed stream, G sequences.
The tokens are one flat stream cut into tiles of GROUPS vectors of VECTOR tokens, one tile a
program, so every vector is aligned whatever T is, and padded and packed are one kernel.

What is absent is None. What has one value a token is in TokenStreams; what has one value a sequence
may be a slice at any address, so it is an argument of its own.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rollout import NUM_ROLLOUT_METRICS, rollout_log_ratio, rollout_metrics, rollout_of_token
from .surrogates import (
    NUM_METRICS,
    clamped_ratio,
    clipped_tokens,
    token_metrics,
    token_terms,
    unit_ratio,
)

TOKENS_PER_THREAD = tl.constexpr(8)

# Arguments of one value a sequence, of both kernels that take them.
OF_SEQUENCES = (
    "ADVANTAGES", "POLICY_WEIGHTS", "CU_SEQLENS", "LOG_RATIO_MEANS", "RATIO_GRADS", "ROLLOUTS",
)  # fmt: skip


class TokenStreams(NamedTuple):
    """(N,) tensors, contiguous and aligned to 16 bytes, or None."""

    log_probs: Any
    old_log_probs: Any
    ref_log_probs: Any
    advantages: Any
    mask: Any
    policy_weights: Any
    rollout_log_probs: Any


@triton.jit
def _load(PTR, start, lane, wanted):
    """Of tokens that are ``wanted``, or of all; the others get 0."""
    if wanted is None:
        return tl.load(PTR + start + lane)
    else:
        return tl.load(PTR + start + lane, mask=wanted, other=0)


@triton.jit
def _load_float(PTR, start, lane, wanted):
    """0 of what is absent: before Triton 3.7 no function can return None."""
    if PTR is None:
        return tl.zeros(lane.shape, tl.float32)
    else:
        return _load(PTR, start, lane, wanted).to(tl.float32)


@triton.jit
def _load_tile(tokens, start, lane, in_bounds):
    """Which tokens count, and the streams of numbers. ``in_bounds`` None: the whole tile is."""
    counted = in_bounds
    wanted = in_bounds
    if tokens.mask is not None:
        mask = _load(tokens.mask, start, lane, in_bounds)
        if mask.dtype.is_fp16() or mask.dtype.is_bf16():
            # All but the sign. LLVM packs the results of 16-bit comparisons bit by bit.
            mask = mask.to(tl.int16, bitcast=True) & 0x7FFF
        counted = mask != 0
        if in_bounds is None:
            # A vector of padding alone is not read. What is asked for must be the same for a whole
            # vector, and be seen to be: else its tokens are read one by one.
            some = tl.max(counted.to(tl.int32), axis=0, keep_dims=True) > 0
            wanted = some.broadcast_to(lane.shape)
    elif in_bounds is None:
        counted = tl.full(lane.shape, True, tl.int1)
    return (
        counted,
        _load_float(tokens.log_probs, start, lane, wanted),
        _load_float(tokens.old_log_probs, start, lane, wanted),
        _load_float(tokens.ref_log_probs, start, lane, wanted),
        _load_float(tokens.advantages, start, lane, wanted),
        _load_float(tokens.policy_weights, start, lane, wanted),
        _load_float(tokens.rollout_log_probs, start, lane, wanted),
    )


@triton.jit
def _first_sequence(CU_SEQLENS, start, T, G):
    """The sequence of token ``start``, and where that ends."""
    if CU_SEQLENS is None:
        seq = start // T
        end = (seq + 1) * T
    else:
        seq = tl.zeros([], tl.int64)
        after = G
        while after - seq > 1:
            middle = (seq + after) // 2
            if tl.load(CU_SEQLENS + middle).to(tl.int64) <= start:
                seq = middle
            else:
                after = middle
        end = tl.load(CU_SEQLENS + seq + 1).to(tl.int64)
    return seq, end


@triton.jit
def _sequences_later(CU_SEQLENS, seq, end, lane, start, T, G):
    """How many sequences after ``seq``, which ends at ``end``, each token's sequence is."""
    BLOCK: tl.constexpr = lane.numel
    end = (end - start).to(tl.int32)
    if CU_SEQLENS is None:
        length = tl.minimum(T, BLOCK).to(tl.int32)
        later = tl.where(lane < end, 0, 1 + (lane - end) // length)
        return tl.minimum(later, tl.minimum(G - 1 - seq, BLOCK).to(tl.int32))
    else:
        later = tl.zeros(lane.shape, tl.int32)
        while (end < BLOCK) & (seq + 1 < G):
            seq += 1
            later += tl.where(lane < end, 0, 1)
            end = (tl.load(CU_SEQLENS + seq + 1).to(tl.int64) - start).to(tl.int32)
        return later


@triton.jit
def _of_sequence(PTR, seq, later, lane):
    """The value of each token's sequence: ``seq``, or so many ``later``."""
    if later is None:
        return tl.full(lane.shape, tl.load(PTR + seq).to(tl.float32), tl.float32)
    else:
        return tl.load(PTR + seq + later).to(tl.float32)


@triton.jit
def _store_sums(PARTIAL, programs, values):
    """Stores the sums over a tile of the first eight values of its tokens, one a row. In one
    reduction they take as many barriers as one sum. The first thread stores them, as every thread
    has them all."""
    groups: tl.constexpr = values[0].numel // TOKENS_PER_THREAD
    of_thread: tl.constexpr = values[0].shape[1] // groups
    row = tl.arange(0, 8)[:, None]
    column = tl.arange(0, groups)[None, :]
    of_threads = tl.zeros([8, groups], tl.float32)
    for k in tl.static_range(8):
        sums = tl.reshape(tl.sum(values[k], axis=0), (of_thread, groups))
        of_threads = tl.where(row == k, tl.sum(sums, axis=0)[None, :], of_threads)
    sums = tl.sum(of_threads, axis=1, keep_dims=True).broadcast_to(8, groups)
    tl.store(PARTIAL + (row * programs + column), sums, mask=column == 0)


@triton.jit
def _max(values):
    """Of numbers that are not negative: their bits have the same order, and the maximum of integers
    takes a warp one instruction."""
    bits = tl.max(values.to(tl.int32, bitcast=True), axis=0)
    return tl.max(bits, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def _tile_loss(
    tokens, loaded, of_sequences, seq, later, start, lane, remaining, spans, GRAD, PARTIALS, terms,
    kl_terms, rollout_terms, METRICS: tl.constexpr, NUM_EXTRAS: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a tile and its column of PARTIALS."""
    WEIGHTS, ADVANTAGES, POLICY_WEIGHTS, LOG_RATIO_MEANS, RATIO_GRADS, ROLLOUTS, G = of_sequences
    counted, log_prob, old_log_prob, ref_log_prob, advantage, policy_weight, rollout = loaded
    weight = _of_sequence(WEIGHTS, seq, later, lane)
    if tokens.advantages is None:
        advantage = _of_sequence(ADVANTAGES, seq, later, lane)
    if POLICY_WEIGHTS is not None:
        policy_weight = _of_sequence(POLICY_WEIGHTS, seq, later, lane)
    elif tokens.policy_weights is None:
        policy_weight = None
    if tokens.ref_log_probs is None:
        ref_log_prob = None
    if tokens.rollout_log_probs is not None:
        behind = if_present(tokens.old_log_probs, old_log_prob, log_prob)
        log_weight, unscored = rollout_log_ratio(rollout_terms, behind, rollout)
        correction, truncated, masked = rollout_of_token(rollout_terms, log_weight, unscored)
        if ROLLOUTS is not None:
            correction *= _of_sequence(ROLLOUTS, seq, later, lane)
        policy_weight = product(policy_weight, correction)
        if METRICS:  # now, as what is kept until the end takes registers
            vetoed = correction < 0.0
            if ROLLOUTS is not None:
                code = _of_sequence(ROLLOUTS + G, seq, later, lane)
                vetoed = code >= 4.0
                code = tl.where(vetoed, code - 4.0, code)
                masked = masked | (code >= 2.0)
                truncated = truncated | (code == 1.0) | (code == 3.0)
            corrections = rollout_metrics(
                counted, correction, truncated, masked, vetoed, unscored, log_weight
            )
            count = tl.num_programs(0).to(tl.int64)
            FIRST = PARTIALS + tl.program_id(0) + (1 + NUM_METRICS + NUM_EXTRAS) * count
            _store_sums(FIRST, count, corrections)
            tl.store(FIRST + (NUM_ROLLOUT_METRICS - 1) * count, _max(corrections[8]))

    if LOG_RATIO_MEANS is not None or tokens.old_log_probs is not None:
        if LOG_RATIO_MEANS is not None:
            raw = _of_sequence(LOG_RATIO_MEANS, seq, later, lane)
        else:
            raw = log_prob - old_log_prob
        if METRICS:
            raw = tl.where(counted, raw, 0.0)
        log_ratio, ratio, outside = clamped_ratio(raw, terms.log_ratio_clamp)
    else:
        log_ratio, ratio, outside = unit_ratio(weight)
    loss, through_ratio, past_ratio, below, above, kl, extras = token_terms(
        terms, kl_terms, log_prob, ratio, outside, advantage, policy_weight, ref_log_prob
    )
    if RATIO_GRADS is not None:
        through_ratio = _of_sequence(RATIO_GRADS, seq, later, lane)
    if terms.token_clip is not None and tokens.old_log_probs is not None:
        below, above = clipped_tokens(log_prob - old_log_prob, advantage, terms.token_clip)
        through_ratio = tl.where(below | above, 0.0, through_ratio)

    # Last of all, so that nothing of a token that does not count gets through.
    loss = tl.where(counted, weight * loss, 0.0)
    if GRAD is not None:
        # x - (-0) is x for the compiler, x + 0 is not.
        grad = tl.where(counted, weight * (through_ratio - (-past_ratio)), 0.0)
        _store_tile(GRAD, start, lane, remaining, grad)
    PARTIAL = PARTIALS + tl.program_id(0)
    programs = tl.num_programs(0).to(tl.int64)
    tl.store(PARTIAL, tl.where(spans, tl.sum(tl.sum(loss, axis=0), axis=0), float("nan")))
    if METRICS:
        values = token_metrics(counted, advantage, log_ratio, ratio, below, above, kl)
        _store_sums(PARTIAL + programs, programs, values)
        tl.store(PARTIAL + NUM_METRICS * programs, _max(values[NUM_METRICS - 1]))
        for k in tl.static_range(NUM_EXTRAS):
            extra = tl.sum(tl.where(counted, extras[k], 0.0))
            tl.store(PARTIAL + (1 + NUM_METRICS + k) * programs, extra)


@triton.jit
def if_present(PTR, values, others):
    if PTR is None:
        return others
    else:
        return values


@triton.jit
def product(factor, values):
    if factor is None:
        return values
    else:
        return factor * values


@triton.jit
def _store_tile(PTR, start, lane, remaining, values):
    values = values.to(PTR.dtype.element_ty)
    if remaining == lane.numel:
        tl.store(PTR + start + lane, values)
    else:
        tl.store(PTR + start + lane, values, mask=lane < remaining)


# Nothing is specialised on the value of an argument, so every T, batch and setting runs one and the
# same compiled kernel.
@triton.jit(
    do_not_specialize=["N", "T", "G"],
    do_not_specialize_on_alignment=["WEIGHTS", *OF_SEQUENCES, "PARTIALS"],
)
def policy_loss_fwd_kernel(
    tokens,
    WEIGHTS,
    ADVANTAGES,
    POLICY_WEIGHTS,
    CU_SEQLENS,
    LOG_RATIO_MEANS,
    RATIO_GRADS,
    ROLLOUTS,
    GRAD,
    PARTIALS,
    N: tl.int64,
    T: tl.int64,
    G: tl.int64,
    terms,
    kl_terms,
    rollout_terms,
    METRICS: tl.constexpr,
    NUM_EXTRAS: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``terms`` is a :class:`TokenTerms`, ``kl_terms`` a :class:`KLTerms`, ``rollout_terms`` a
    :class:`RolloutTerms`.

    PARTIALS is (1, programs), or with METRICS (10 + NUM_EXTRAS, programs): the sums of a tile in
    one column, the loss first, then what token_metrics returns and the surrogate's extras. With
    rollout log-probs what rollout_metrics returns follows.

    LOG_RATIO_MEANS and RATIO_GRADS are what policy_loss_sequence_kernel writes: the ratio is the
    sequence's, and the derivative through it the same for each of its tokens. So is ROLLOUTS, (2,
    G): what rollout_of_sequence returns.
    """
    BLOCK: tl.constexpr = GROUPS * VECTOR
    # A vector is a column, so that threads hold whole vectors also of what is not loaded: what a
    # thread needs of a token goes through no shared memory.
    lane = tl.arange(0, VECTOR)[:, None] + tl.arange(0, GROUPS)[None, :] * VECTOR
    start = tl.program_id(0).to(tl.int64) * BLOCK
    remaining = tl.minimum(N - start, BLOCK).to(tl.int32)
    if remaining == BLOCK:
        loaded = _load_tile(tokens, start, lane, None)
    else:
        loaded = _load_tile(tokens, start, lane, lane < remaining)

    # While those loads are under way.
    seq, end = _first_sequence(CU_SEQLENS, start, T, G)
    spans = True
    if CU_SEQLENS is not None:
        # Offsets that do not span the stream cannot raise here without a sync: the loss says so.
        first = tl.load(CU_SEQLENS).to(tl.int64)
        spans = (first == 0) & (tl.load(CU_SEQLENS + G).to(tl.int64) == N)
    of_sequences = (
        WEIGHTS, ADVANTAGES, POLICY_WEIGHTS, LOG_RATIO_MEANS, RATIO_GRADS, ROLLOUTS, G,
    )  # fmt: skip
    if (end >= start + BLOCK) | (seq + 1 >= G):
        # One sequence: what is the same for all its tokens is computed once a thread.
        _tile_loss(
            tokens, loaded, of_sequences, seq, None, start, lane, remaining, spans, GRAD, PARTIALS,
            terms, kl_terms, rollout_terms, METRICS, NUM_EXTRAS,
        )  # fmt: skip
    else:
        later = _sequences_later(CU_SEQLENS, seq, end, lane, start, T, G)
        _tile_loss(
            tokens, loaded, of_sequences, seq, later, start, lane, remaining, spans, GRAD, PARTIALS,
            terms, kl_terms, rollout_terms, METRICS, NUM_EXTRAS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["programs", "second_maximum"])
def policy_loss_reduce_kernel(
    PARTIALS,
    LOSS,
    METRICS,
    programs: tl.int32,
    second_maximum: tl.int32,
    BLOCK: tl.constexpr,
):
    """Program k combines row k of PARTIALS in a fixed order: same bits every run.

    Row 0 is the loss. The others, if any, are sums, and in the rows NUM_METRICS and second_maximum
    (0: none) maxima.
    """
    k = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    largest = tl.zeros([BLOCK], tl.int32)
    first = 0
    while first < programs:
        in_bounds = first + lane < programs
        pointers = PARTIALS + k.to(tl.int64) * programs + first + lane
        partial = tl.load(pointers, mask=in_bounds, other=0.0)
        total += partial
        largest = tl.maximum(largest, partial.to(tl.int32, bitcast=True))
        first += BLOCK
    if k == 0:
        tl.store(LOSS, tl.sum(total, axis=0))
    elif (k == NUM_METRICS) | (k == second_maximum):
        tl.store(METRICS + k - 1, tl.max(largest, axis=0).to(tl.float32, bitcast=True))
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
    """OUT = GRAD * grad_output, two tiles a program; in place there is nothing to do when
    grad_output is 1."""
    scale = tl.load(GRAD_OUTPUT).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    if (not IN_PLACE) | (scale != 1.0):
        for tile in range(2):
            start = (2 * tl.program_id(0).to(tl.int64) + tile) * BLOCK
            remaining = tl.minimum(N - start, BLOCK).to(tl.int32)
            if remaining == BLOCK:
                grad = _load(GRAD, start, lane, None)
            else:
                grad = _load(GRAD, start, lane, lane < remaining)
            _store_tile(OUT, start, lane, remaining, grad.to(tl.float32) * scale)
