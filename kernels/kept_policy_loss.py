"""Device code of the policy loss over kept sets: products of hidden states and rows of the head.

N tokens of D values and a head of V rows. E entries, of which those of token n are OFFSETS[n] to
OFFSETS[n + 1], each name a row of the head: the product with it is the entry's score. A row is
whole vectors of VECTOR values, or VECTOR is 1; strides are in vectors, so that the compiler knows
what is aligned. The loss of the tokens, between the first kernel and the others, is that of
policy_loss.py.
"""

import triton
import triton.language as tl

from .logits_policy_loss import LOWEST, _soft_cap


@triton.jit
def _rows_of_head(HEAD, ids, present, stride, start, column, inside, VECTOR: tl.constexpr):
    """Columns of a few rows of the head as float32, 0 where there are none."""
    pointers = HEAD + (ids * stride)[:, None] * VECTOR + start + column[None, :]
    return tl.load(pointers, mask=present[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=["vectors", "hidden_stride", "head_stride"],
    do_not_specialize_on_alignment=[
        "BIAS", "IDS", "HITS", "OFFSETS", "ACTIVE", "BAD", "SCORES", "REFERENCES", "LOG_TOTALS",
        "LOG_PROBS", "ENTROPY", "SQUARES", "OUT_SUMS",
    ],
)  # fmt: skip
def kept_log_probs_kernel(
    HIDDEN,
    HEAD,
    BIAS,
    IDS,
    HITS,
    OFFSETS,
    ACTIVE,
    BAD,
    SCORES,
    REFERENCES,
    LOG_TOTALS,
    LOG_PROBS,
    ENTROPY,
    SQUARES,
    OUT_SUMS,
    vectors: tl.int32,
    hidden_stride: tl.int64,
    head_stride: tl.int64,
    inverse_temperature: tl.float32,
    softcap,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Token ``program_id``: the scores of its entries, after the soft cap, and its log-prob.

    The probability of an entry is exp((score - REFERENCES) / temperature - LOG_TOTALS). A token
    without entries, whose set is itself or which does not count, has log-prob and entropy 0; a BAD
    one NaN. SQUARES, the sum of the squared probabilities, is 1 where the set is the token itself,
    which is ACTIVE then. ENTROPY and SQUARES may be None.

    Where the vocabulary is spread over processes, OUT_SUMS, (3 to 5, N), is written, and of the
    others SCORES alone: the largest score, at least the lowest number; the exponent of the token's
    own, (score - largest) / temperature, 0 where it is not here; sum of exp, for ENTROPY that of
    exponents times exp, for SQUARES that of squares.
    """
    n = tl.program_id(0).to(tl.int64)
    begin = tl.load(OFFSETS + n)
    end = tl.load(OFFSETS + n + 1)
    BLOCK: tl.constexpr = GROUPS * VECTOR
    column = tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    reference = 0.0
    own = 0.0
    total = 1.0
    dot = 0.0
    square = 0.0
    if end > begin:
        largest = tl.full([ROWS], LOWEST, tl.float32)
        for first in range(begin, end, ROWS):
            present = first + row < end
            ids = tl.load(IDS + first + row, mask=present, other=0)
            products = tl.zeros([ROWS, BLOCK], tl.float32)
            for start in range(0, vectors, GROUPS):
                inside = column < (vectors - start) * VECTOR
                at = start * VECTOR
                hidden = tl.load(
                    HIDDEN + n * hidden_stride * VECTOR + at + column, mask=inside, other=0.0
                ).to(tl.float32)
                head = _rows_of_head(HEAD, ids, present, head_stride, at, column, inside, VECTOR)
                products += hidden[None, :] * head
            scores = tl.sum(products, axis=1)
            if BIAS is not None:
                scores += tl.load(BIAS + ids, mask=present, other=0.0).to(tl.float32)
            scores = _soft_cap(scores, softcap)
            tl.store(SCORES + first + row, scores, mask=present)
            largest = tl.maximum(largest, tl.where(present, scores, LOWEST))
        reference = tl.max(largest, axis=0)

        # Every thread reads what others have written.
        tl.debug_barrier()
        lane = tl.arange(0, ENTRIES)
        totals = tl.zeros([ENTRIES], tl.float32)
        dots = tl.zeros([ENTRIES], tl.float32)
        owns = tl.zeros([ENTRIES], tl.float32)
        squares = tl.zeros([ENTRIES], tl.float32)
        for first in range(begin, end, ENTRIES):
            present = first + lane < end
            scores = tl.load(SCORES + first + lane, mask=present, other=float("-inf"))
            hit = tl.load(HITS + first + lane, mask=present, other=0) != 0
            exponents = (scores - reference) * inverse_temperature
            exps = tl.exp(exponents)
            totals += exps
            owns += tl.where(hit, exponents, 0.0)
            if ENTROPY is not None:
                dots += exps * tl.maximum(exponents, -128.0)  # where exp is 0, not 0 * -inf
            if SQUARES is not None:
                squares += exps * exps
        own = tl.sum(owns, axis=0)
        total = tl.sum(totals, axis=0)
        if ENTROPY is not None:
            dot = tl.sum(dots, axis=0)
        if SQUARES is not None:
            square = tl.sum(squares, axis=0)
    if OUT_SUMS is not None:
        N = tl.num_programs(0).to(tl.int64)
        tl.store(OUT_SUMS + n, tl.where(end > begin, reference, LOWEST))
        tl.store(OUT_SUMS + N + n, own)
        tl.store(OUT_SUMS + 2 * N + n, tl.where(end > begin, total, 0.0))
        if ENTROPY is not None:
            tl.store(OUT_SUMS + 3 * N + n, dot)
        if SQUARES is not None:
            tl.store(OUT_SUMS + (4 if ENTROPY is not None else 3) * N + n, square)
    else:
        bad = tl.load(BAD + n) != 0
        log_total = tl.log(total)
        log_prob = own - log_total
        log_prob = tl.where(log_prob > 0, 0.0, log_prob)
        tl.store(REFERENCES + n, reference)
        tl.store(LOG_TOTALS + n, log_total)
        tl.store(LOG_PROBS + n, tl.where(bad, float("nan"), log_prob))
        if ENTROPY is not None:
            entropy = log_total - dot / total
            tl.store(ENTROPY + n, tl.where(bad, float("nan"), entropy))
        if SQUARES is not None:
            alone = tl.where(tl.load(ACTIVE + n) != 0, 1.0, 0.0)
            square = tl.where(end > begin, square / (total * total), alone)
            tl.store(SQUARES + n, tl.where(bad, float("nan"), square))


@triton.jit(
    do_not_specialize=["vectors", "head_stride"],
    do_not_specialize_on_alignment=[
        "IDS", "HITS", "OFFSETS", "SCORES", "REFERENCES", "LOG_TOTALS", "TOKEN_GRADS", "ENTROPY",
        "ENTROPY_WEIGHTS", "SCORE_GRADS",
    ],
)  # fmt: skip
def kept_hidden_grad_kernel(
    HEAD,
    IDS,
    HITS,
    OFFSETS,
    SCORES,
    REFERENCES,
    LOG_TOTALS,
    TOKEN_GRADS,
    ENTROPY,
    ENTROPY_WEIGHTS,
    SCORE_GRADS,
    HIDDEN_GRAD,
    vectors: tl.int32,
    head_stride: tl.int64,
    inverse_temperature: tl.float32,
    softcap,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Token ``program_id``: the loss's derivatives by the products of its entries, before bias
    and soft cap, and by its hidden state, a row of HIDDEN_GRAD (N, D), contiguous, or None. The
    loss falls by ENTROPY_WEIGHTS times the entropy of the token; without them, None, there need be
    no ENTROPY."""
    n = tl.program_id(0).to(tl.int64)
    begin = tl.load(OFFSETS + n)
    end = tl.load(OFFSETS + n + 1)
    grad = tl.load(TOKEN_GRADS + n) * inverse_temperature
    reference = tl.load(REFERENCES + n)
    log_total = tl.load(LOG_TOTALS + n)
    entropy_grad = 0.0
    entropy = 0.0
    if ENTROPY_WEIGHTS is not None:
        entropy_grad = tl.load(ENTROPY_WEIGHTS + n) * inverse_temperature
        entropy = tl.load(ENTROPY + n)
    lane = tl.arange(0, ENTRIES)
    for first in range(begin, end, ENTRIES):
        present = first + lane < end
        scores = tl.load(SCORES + first + lane, mask=present, other=0.0)
        hit = tl.load(HITS + first + lane, mask=present, other=0) != 0
        log_probs = (scores - reference) * inverse_temperature - log_total
        probs = tl.exp(log_probs)
        grads = grad * (tl.where(hit, 1.0, 0.0) - probs)
        if ENTROPY_WEIGHTS is not None:
            # p (log p + H), and 0 where p is: not 0 * -inf
            grads += entropy_grad * probs * (tl.maximum(log_probs, -128.0) + entropy)
        if softcap is not None:
            tanh = scores * (1.0 / softcap)
            grads *= 1.0 - tanh * tanh
        tl.store(SCORE_GRADS + first + lane, grads, mask=present)

    if HIDDEN_GRAD is not None:
        tl.debug_barrier()
        BLOCK: tl.constexpr = GROUPS * VECTOR
        column = tl.arange(0, BLOCK)
        row = tl.arange(0, ROWS)
        # A clipped token reads nothing of the head.
        stop = tl.where((grad != 0) | (entropy_grad != 0), end, begin)
        for start in range(0, vectors, GROUPS):
            inside = column < (vectors - start) * VECTOR
            at = start * VECTOR
            sums = tl.zeros([ROWS, BLOCK], tl.float32)
            for first in range(begin, stop, ROWS):
                present = first + row < stop
                ids = tl.load(IDS + first + row, mask=present, other=0)
                grads = tl.load(SCORE_GRADS + first + row, mask=present, other=0.0)
                head = _rows_of_head(HEAD, ids, present, head_stride, at, column, inside, VECTOR)
                sums += grads[:, None] * head
            total = tl.sum(sums, axis=0).to(HIDDEN_GRAD.dtype.element_ty)
            tl.store(
                HIDDEN_GRAD + n * vectors.to(tl.int64) * VECTOR + at + column, total, mask=inside
            )


@triton.jit(
    do_not_specialize=["vectors", "hidden_stride", "entries", "V"],
    do_not_specialize_on_alignment=["SORTED_IDS", "ORDER", "TOKENS", "SCORE_GRADS", "OUT"],
)  # fmt: skip
def kept_head_grad_kernel(
    HIDDEN,
    SORTED_IDS,
    ORDER,
    TOKENS,
    SCORE_GRADS,
    GRAD,
    OUT,
    vectors: tl.int32,
    hidden_stride: tl.int64,
    entries: tl.int64,
    V: tl.int64,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Adds up the entries of one row of the head, in the order of the tokens.

    The entries in the order of their ids: the program of the first one of an id works for all of
    them, and writes a block of columns of that row of GRAD (V, D), contiguous, which holds 0; the
    other programs end at once. OUT is the gradient of the bias, (V,), float32. Either may be None.
    """
    position = tl.program_id(0).to(tl.int64)
    token_id = tl.load(SORTED_IDS + position)
    before = tl.load(SORTED_IDS + position - 1, mask=position > 0, other=-1)
    BLOCK: tl.constexpr = GROUPS * VECTOR
    start = tl.program_id(1).to(tl.int64) * GROUPS
    column = tl.arange(0, BLOCK)
    inside = column < (vectors - start) * VECTOR
    row = tl.arange(0, ROWS)
    if (token_id < V) & (token_id != before):
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        totals = tl.zeros([ROWS], tl.float32)
        found = ROWS
        while found == ROWS:
            in_bounds = position + row < entries
            same = tl.load(SORTED_IDS + position + row, mask=in_bounds, other=-1) == token_id
            entry = tl.load(ORDER + position + row, mask=same, other=0)
            grads = tl.load(SCORE_GRADS + entry, mask=same, other=0.0)
            totals += grads
            if GRAD is not None:
                tokens = tl.load(TOKENS + entry, mask=same, other=0)
                pointers = (tokens * hidden_stride)[:, None] * VECTOR + start * VECTOR
                hidden = tl.load(
                    HIDDEN + pointers + column[None, :],
                    mask=same[:, None] & inside[None, :],
                    other=0.0,
                )
                sums += grads[:, None] * hidden.to(tl.float32)
            found = tl.sum(same.to(tl.int32), axis=0)
            position += ROWS
        if GRAD is not None:
            to = token_id * vectors.to(tl.int64) * VECTOR + start * VECTOR + column
            tl.store(GRAD + to, tl.sum(sums, axis=0).to(GRAD.dtype.element_ty), mask=inside)
        if OUT is not None:
            if start == 0:
                tl.store(OUT + token_id, tl.sum(totals, axis=0))
