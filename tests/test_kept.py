"""The head over kept sets: everything equals masking the full logits, and what is wrong is said.

Budgets. float32: 5e-6 of the largest entry of each gradient, as for linear_policy_loss. 16-bit: the
logits are float32, so what remains is the rounding of a gradient and, in the PyTorch
implementation, of the gradient at a logit: one ulp of each.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

import dl_norm
from bench.timing import peak_memory
from dl_norm import KeptSets, linear_policy_loss, token_log_probs
from dl_norm._kept import closed_form
from dl_norm._kept.entries import make_entries
from dl_norm._kept.passes import implementation
from dl_norm._rows.records import WHOLE, RowSettings, TokenRows, VocabShard

sys.path.append(str(Path(__file__).parent))

from adapter_tools import lift
from kept_cases import Case, errors, kept_of, leaves_of, make, masked_log_probs, run, truth

IMPLEMENTATIONS = ("triton", "torch")
BUDGET = 5e-6


@pytest.fixture
def make_case(device):
    return functools.partial(make, device)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("packed, on_gpu", [(False, False), (True, True)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "dual_clip": 3.0, "beta": 0.1},
        {"logit_softcap": 5.0, "temperature": 1.3, "beta": 0.1, "delta": 3.0},
        {"surrogate": "cispo"},
        {"surrogate": "sapo", "bias_corrected_kl": True, "beta": 0.2},
    ],
    ids=["defaults", "temperature_kl", "softcap", "cispo", "sapo"],
)
def test_against_masked_logits(make_case, impl, packed, on_gpu, options, poison_empty, request):
    """``on_gpu``: the way through the code where no value may be read on the host."""
    case = make_case(packed=packed, softcap=options.get("logit_softcap"),
                     temperature=options.get("temperature", 1.0),
                     ids=torch.int32 if packed else torch.int64)  # fmt: skip
    expected = truth(case, upstream=3.0, **options)
    if on_gpu:
        request.getfixturevalue("as_on_a_gpu")
    result = run(case, impl, upstream=3.0, **options)
    assert max(errors(result, expected)) <= BUDGET


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("size", [16, 13, 600])
def test_log_probs_entropy_and_metrics(make_case, impl, softcap, size):
    """Of few_cases: row lengths that are whole vectors, that are none, and several blocks."""
    case = make_case(size=size, softcap=softcap, temperature=0.8)
    options = {"logit_softcap": softcap, "temperature": 0.8}
    expected, expected_entropy, expected_squares = masked_log_probs(
        case, torch.float64, softcap, 0.8
    )
    *_, outputs = run(case, impl, entropy=True, sum_sq_probs=True, return_log_probs=True,
                      return_metrics=True, **options)  # fmt: skip
    log_probs, entropy, squares = token_log_probs(
        case.hidden, case.token_ids, case.weight, bias=case.bias, mask=case.mask, kept=case.kept,
        entropy=True, sum_sq_probs=True, impl=impl, **options,
    )  # fmt: skip
    assert torch.equal(outputs.log_probs, log_probs) and torch.equal(outputs.entropy, entropy)
    assert torch.equal(outputs.sum_sq_probs, squares)
    assert log_probs.dtype == torch.float32 and (log_probs <= 0).all()
    scale = 1 + case.hidden.shape[-1] ** 0.5
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-6, atol=1e-6 * scale)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=2e-6 * scale)
    torch.testing.assert_close(squares.double(), expected_squares, rtol=1e-5, atol=1e-6)
    _, metrics = dl_norm.policy_loss(
        log_probs, *case.args()[1:], **case.tensors, impl=impl, return_metrics=True
    )
    for name, value in metrics.summary().items():
        torch.testing.assert_close(outputs.metrics.summary()[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("weighted", [None, "sequence", "token"])
def test_entropy_in_the_loss(make_case, impl, on_gpu, weighted, poison_empty, request):
    """A sequence of advantage 0 has the gradient of the entropy alone."""
    softcap = 5.0 if weighted else None
    case = make_case(packed=weighted == "token", softcap=softcap, temperature=0.8)
    case.advantages[1] = 0.0
    options = {"logit_softcap": softcap, "temperature": 0.8, "entropy_coef": 0.3}
    if weighted:
        shape = case.weights.shape if weighted == "sequence" else case.token_ids.shape
        options["entropy_weights"] = torch.rand(shape, device=case.mask.device) * 1e-4
    del case.tensors["ref_log_probs"]
    expected = truth(case, upstream=3.0, **options)
    if on_gpu:
        request.getfixturevalue("as_on_a_gpu")
    result = run(case, impl, upstream=3.0, **options)
    assert max(errors(result, expected)) <= BUDGET


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_impossible_words_of_a_set(make_case, impl):
    """A word of probability 0 adds 0 to the entropy, the sum of squares and every gradient."""
    case = make_case()
    own = set(case.token_ids.flatten().tolist())
    never = next(word for word in range(50) if word not in own)
    sets = [[*(m for m in members if m != never), never] if members else []
            for members in case.sets()]  # fmt: skip
    without = [[m for m in members if m != never] for members in sets]
    case.bias[never] = -torch.inf
    options = {"entropy_coef": 0.3, "entropy": True, "sum_sq_probs": True}
    device = case.hidden.device
    loss, grads, seen = run(case.replace(kept=kept_of(sets, device)), impl, **options)
    other, other_grads, other_seen = run(
        case.replace(kept=kept_of(without, device)), impl, **options
    )
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)
    for name in ("entropy", "sum_sq_probs"):
        torch.testing.assert_close(getattr(seen, name), getattr(other_seen, name))
    for ours, theirs in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [16, 13])
def test_few_cases(make_case, impl, size):
    """What the compiled kernels are run with, as they take seconds each."""
    case = make_case((2, 6), size, 40, softcap=5.0, seed=2)
    options = {"logit_softcap": 5.0, "beta": 0.1, "entropy_coef": 0.2}
    result = run(case, impl, upstream=3.0, sum_sq_probs=True, **options)
    assert max(errors(result, truth(case, upstream=3.0, **options))) <= BUDGET


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_few_cases_of_parts(make_case, impl):
    """The sums of the parts of a vocabulary, added up here: one has no word, one none of a set."""
    case = make_case((2, 6), 16, 40, softcap=5.0, seed=2)
    module, flat = implementation(impl), case.hidden.flatten(0, 1)
    rows = TokenRows(case.token_ids.flatten(), case.mask.flatten())
    settings = RowSettings(0.7, 5.0, entropy=True, sum_sq_probs=True)
    whole = make_entries(case.kept, rows, WHOLE, 40)
    expected = module.kept_log_probs(flat, case.weight, case.bias, whole, settings, True)
    parts, here = [], []
    for first, stop in ((0, 0), (0, 3), (3, 40)):
        entries = make_entries(case.kept, rows, VocabShard("group", first, 40), stop - first)
        assert torch.equal(entries.bad, whole.bad) and torch.equal(entries.plural, whole.plural)
        assert stop == 40 or (entries.plural & (entries.offsets.diff() == 0)).any()
        _, sums = module.kept_sums(
            flat, case.weight[first:stop], case.bias[first:stop], entries, settings, True
        )
        parts.append(sums)
        here.append(whole.plural & (rows.token_ids >= first) & (rows.token_ids < stop))
    sums, here = torch.stack(parts, 1).double(), torch.stack(here)
    largest = sums[0].amax(0)
    shift = ((sums[0] - largest) / 0.7).clamp(min=-200.0)
    factor = shift.exp()
    own = torch.where(here, sums[1] + shift, 0.0)
    dot = (sums[3] + shift * sums[2]) * factor
    added = own, sums[2] * factor, dot, sums[4] * factor.square()
    added = torch.stack([largest, *(values.sum(0) for values in added)]).float()
    found = closed_form.logits_of_sums(expected.logits, added, whole, settings, True)
    for name in ("log_probs", "entropy", "sum_sq_probs"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=2e-6, atol=2e-6
        )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 13])
def test_half_precision(make_case, impl, dtype, size):
    case = make_case((4, 12), size, dtype=dtype)
    upstream = 2.0**16  # a loss scale, for float16
    expected = truth(case, upstream=upstream)
    result = run(case, impl, upstream=upstream)
    assert all(grad.dtype == dtype for grad in result[1])
    loss, *grads = errors(result, expected)
    assert loss <= BUDGET  # the logits are float32
    # Twice one rounding: the interpreter truncates.
    assert max(grads) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_sum_of_many_is_not_rounded_to_16_bits(device, impl):
    """300 tokens whose entries are the same two rows: bfloat16 sums of 0.5 stop at 128."""
    count, size = 300, 8
    hidden = torch.ones(1, count, size, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(4, size, dtype=torch.bfloat16, device=device).requires_grad_()
    ids = torch.full((1, count), 2, device=device)
    kept = kept_of([[1, 2]] * count, device)
    one = torch.ones(1, device=device)
    loss = linear_policy_loss(hidden, weight, ids, None, one, torch.ones_like(ids), one, kept=kept,
                              impl=impl)  # fmt: skip
    loss.backward()
    expected = torch.tensor([0.0, 150.0, -150.0, 0.0], device=device)
    assert torch.equal(weight.grad.float(), expected[:, None].expand(4, size))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_sets_of_the_token_alone(make_case, impl, on_gpu, request):
    """Exactly 0, without reading hidden state or head, which hold NaN here."""
    case = make_case()
    case = case.replace(kept=kept_of([[token] for token in case.token_ids.flatten().tolist()],
                                     case.hidden.device))  # fmt: skip
    for tensor in case.leaves:
        tensor.fill_(torch.nan)
    if on_gpu:
        request.getfixturevalue("as_on_a_gpu")
    loss, grads, outputs = run(case, impl, entropy=True, return_log_probs=True)
    zeros = torch.zeros_like(case.old)
    assert torch.equal(outputs.log_probs, zeros) and torch.equal(outputs.entropy, zeros)
    assert not any(grad.any() for grad in grads)
    plain = dl_norm.policy_loss(zeros, *case.args()[1:], **case.tensors, impl="torch")
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_an_old_policy_the_ratio_is_1(make_case, impl):
    case = make_case().replace(old=None)
    case.tensors.pop("ref_log_probs")
    loss, grads, outputs = run(case, impl, return_metrics=True)
    assert max(errors((loss, grads), truth(case))) <= BUDGET
    assert outputs.metrics.summary()["ratio_max"] == 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_masked_positions_may_hold_anything(make_case, impl, on_gpu, request):
    """Hidden states, old log-probs, token ids, and sets of any kind."""
    case = make_case()
    expected = run(case, impl)
    masked = ~case.mask
    assert masked.sum() >= 3
    garbage = iter([[-5, 10**6, 10**6], [3, 3], [], [7]] * masked.numel())
    sets = [
        members if counts else next(garbage)
        for members, counts in zip(case.sets(), case.mask.flatten().tolist(), strict=True)
    ]
    case = case.replace(kept=kept_of(sets, case.hidden.device))
    for tensor in (case.hidden, case.old, case.tensors["ref_log_probs"]):
        tensor[masked] = torch.nan
    case.token_ids[masked] = -100
    if on_gpu:
        request.getfixturevalue("as_on_a_gpu")
    loss, grads = run(case, impl)
    assert torch.equal(loss, expected[0])
    assert not grads[0][masked].any()
    for ours, theirs in zip(grads, expected[1], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("shape", [(2, 5), (0, 5), (2, 0)])
def test_nothing_counts(device, impl, on_gpu, shape, request):
    hidden = torch.randn(*shape, 8, device=device).requires_grad_()
    weight = torch.randn(20, 8, device=device).requires_grad_()
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    kept = kept_of([[]] * ids.numel(), device)
    zeros = torch.zeros(shape[0], device=device)
    if on_gpu:
        request.getfixturevalue("as_on_a_gpu")
    loss = linear_policy_loss(hidden, weight, ids, None, zeros, ids, zeros, kept=kept, impl=impl)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_vocabulary_of_sets_is_the_full_head(make_case, impl):
    case = make_case((2, 5), vocabulary=24)
    everything = kept_of([list(range(24))] * 10, case.hidden.device)
    ours = run(case.replace(kept=everything), impl)
    leaves = leaves_of(case)
    loss = linear_policy_loss(
        leaves.hidden, leaves.weight, *case.args(), bias=leaves.bias, **case.tensors, impl=impl
    )
    loss.backward()
    torch.testing.assert_close(ours[0], loss.detach(), rtol=2e-6, atol=0)
    for grad, leaf in zip(ours[1], leaves.leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_same_bits(make_case, impl, on_gpu, request):
    """On every run; and in any order of a set of two, whose sum of probabilities has no order: the
    loss, and what adds up in the order of the tokens. d hidden adds up in that of the set."""
    case = make_case((4, 12), vocabulary=20)
    if on_gpu:
        request.getfixturevalue("as_on_a_gpu")
    first, second = (run(case, impl, return_log_probs=True) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert torch.equal(first[2].log_probs, second[2].log_probs)
    turned = case.replace(kept=kept_of([members[::-1] for members in case.sets()],
                                       case.hidden.device))  # fmt: skip
    third = run(turned, impl, return_log_probs=True)
    torch.testing.assert_close(third[2].log_probs, first[2].log_probs, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(third[1], first[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-10)
    pairs = [members[:2] if token in members[:2] else [token, members[0]] if members else []
             for members, token in zip(case.sets(), case.token_ids.flatten().tolist(),
                                       strict=True)]  # fmt: skip
    pairs = [list(dict.fromkeys(members)) for members in pairs]
    device = case.hidden.device
    one = run(case.replace(kept=kept_of(pairs, device)), impl)
    other = run(case.replace(kept=kept_of([members[::-1] for members in pairs], device)), impl)
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(a, b) for a, b in zip(one[1][1:], other[1][1:], strict=True))
    torch.testing.assert_close(one[1][0], other[1][0], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_pieces_of_a_batch_add_up(make_case, impl):
    case = make_case((4, 6))
    loss, grads = run(case, impl)
    total = torch.zeros_like(loss)
    sums = [torch.zeros_like(grad) for grad in grads]
    sets = case.sets()
    for i in range(4):
        part = Case(case.hidden[i : i + 1], case.weight, case.bias,
                    *(t[i : i + 1] for t in case.args()),
                    kept_of(sets[6 * i : 6 * i + 6], case.hidden.device),
                    {name: t[i : i + 1] for name, t in case.tensors.items()})  # fmt: skip
        part_loss, part_grads = run(part, impl)
        total += part_loss
        sums[0][i : i + 1] = part_grads[0]
        sums[1] += part_grads[1]
        sums[2] += part_grads[2]
    torch.testing.assert_close(total, loss, rtol=1e-6, atol=0)
    for ours, theirs in zip(sums, grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_tokens_without_a_set(make_case, impl):
    """Masked here, and their loss added by a call without sets: as if their sets were all of V."""
    case = make_case(vocabulary=24)
    has_set = (torch.arange(21, device=case.hidden.device) % 2 == 0).view(case.mask.shape)
    some = [members if has else [] for members, has in zip(case.sets(), has_set.flatten(),
                                                           strict=True)]  # fmt: skip
    all_of_them = [members or list(range(24)) for members in some]
    expected = truth(case.replace(kept=kept_of(all_of_them, case.hidden.device)))
    first = run(
        case.replace(mask=case.mask & has_set, kept=kept_of(some, case.hidden.device)), impl
    )
    second = run(case.replace(mask=case.mask & ~has_set, kept=None), impl)
    sums = [a + b for a, b in zip(first[1], second[1], strict=True)]
    assert max(errors((first[0] + second[0], sums), expected)) <= BUDGET


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_formula_as_token_loss(make_case, impl):
    @dl_norm.surrogate
    def quadratic(log_prob, ratio, advantage, strength=0.3):
        return -advantage * ratio + strength * (ratio - 1) ** 2 * log_prob.exp()

    case = make_case()
    result = run(case, impl, surrogate=quadratic)
    assert max(errors(result, truth(case, surrogate=quadratic))) <= BUDGET


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masks_of_the_policy_term_and_advantages_of_tokens(make_case, impl):
    case = make_case()
    random = torch.Generator().manual_seed(1)
    device = case.hidden.device
    case.tensors |= {
        "entropy_mask": (torch.rand(case.mask.shape, generator=random) < 0.6).to(device),
        "sequence_mask": torch.tensor([True, False, True], device=device),
        "rollout_weights": torch.rand(case.mask.shape, generator=random).to(device),
    }
    case = case.replace(advantages=torch.randn(case.mask.shape, generator=random).to(device))
    result = run(case, impl, beta=0.1)
    assert max(errors(result, truth(case, beta=0.1))) <= BUDGET


def keep_mask(case, vocabulary):
    mask = torch.zeros(case.token_ids.numel(), vocabulary, dtype=torch.bool)
    for number, members in enumerate(case.sets()):
        mask[number, members] = True
    return mask.to(case.hidden.device)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_as_slime_masks_the_logits(make_case, impl):
    """slime's own autograd Function, under the keep mask that it makes of a rollout's sets."""
    file = "slime/slime/utils/ppo_utils.py"
    theirs = lift(
        file, "_maybe_all_reduce", "_get_vocab_parallel_rank_size", "_VocabParallelLogProbEntropy",
        "_calculate_log_probs_and_entropy_chunk", dist=torch.distributed,
    )  # fmt: skip
    case = make_case(bias=False)
    # Without a set theirs is NaN: a set of the token itself, which does not count.
    tokens = case.token_ids.flatten().tolist()
    sets = [members or [token] for members, token in zip(case.sets(), tokens, strict=True)]
    case = case.replace(kept=kept_of(sets, case.hidden.device))
    loss, grads = run(case, impl)
    leaves = leaves_of(case)
    logits = (leaves.hidden.flatten(0, 1) @ leaves.weight.T).float()
    log_probs = theirs._calculate_log_probs_and_entropy_chunk(
        logits, case.token_ids.flatten(), None, with_entropy=False,
        log_prob_keep_mask=keep_mask(case, logits.shape[1]),
    )[0].view(case.token_ids.shape)  # fmt: skip
    their_loss = dl_norm.reference.policy_loss(log_probs, *case.args()[1:], **case.tensors)
    their_loss.backward()
    torch.testing.assert_close(loss, their_loss.detach(), rtol=1e-5, atol=0)
    for ours, leaf in zip(grads, (leaves.hidden, leaves.weight), strict=True):
        torch.testing.assert_close(ours, leaf.grad, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "impl, dtype", [("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.bfloat16)]
)
def test_memory_depends_on_the_entries(impl, dtype, device, monkeypatch):
    """Nothing of tokens times vocabulary, nor of entries times row length; of the vocabulary only
    the head's gradient, once."""
    monkeypatch.setattr(closed_form, "_CPU_BLOCK", 1 << 12)  # less than there is in all
    size, each, vocabulary = 64, 8, 1 << 14
    tokens = 1024 if impl == "torch" else 2  # the interpreter is slow

    def peak_of(tokens, vocabulary, frozen):
        random = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, tokens, size, generator=random).to(device, dtype)
        head = torch.randn(vocabulary, size, generator=random).to(device, dtype)
        ids = (torch.arange(tokens)[:, None] * 3 + torch.arange(each) * 17).to(device) % 500
        kept = KeptSets(ids.flatten(), torch.arange(tokens + 1, device=device) * each)
        ones = torch.ones(1, device=device)
        old = torch.zeros(1, tokens, device=device)
        leaves = [hidden.requires_grad_()]
        if not frozen:
            leaves.append(head.requires_grad_())

        def call():
            loss = linear_policy_loss(
                hidden, head, ids[:, 0][None], old, ones, torch.ones_like(old), ones, kept=kept,
                impl=impl,
            )  # fmt: skip
            torch.autograd.grad(3.0 * loss, leaves)

        return peak_memory(call, device)

    # Hidden states' gradient and float32 copies, and of an entry a few numbers of 8 bytes.
    limit = size * (2 * dtype.itemsize + 4) + each * 100 + 200
    for frozen in (True, False) if impl == "torch" else ():
        more = peak_of(2 * tokens, vocabulary, frozen) - peak_of(tokens, vocabulary, frozen)
        assert more / tokens <= limit < each * size * 4
    assert peak_of(tokens, vocabulary, True) == peak_of(tokens, 2 * vocabulary, True)
    head = vocabulary * size * dtype.itemsize
    more = peak_of(tokens, 2 * vocabulary, False) - peak_of(tokens, vocabulary, False)
    assert head <= more <= 1.01 * head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_head(device, dtype):
    """Whose gradient is memory of the system: 0 where nothing was added, and a tensor as others."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 16, generator=random).to(device, dtype)
    head = torch.randn(40_000, 16, generator=random).to(device, dtype).requires_grad_()
    ids = torch.tensor([39_999, 7, 20_000], device=device)
    kept = kept_of([[39_999, 0], [7], [3, 20_000, 0]], device)
    ones = torch.ones(3, device=device)

    call = {"cu_seqlens": torch.arange(4, device=device), "impl": "torch"}

    def loss():
        return linear_policy_loss(hidden, head, ids, None, ones, ones, ones, kept=kept, **call)

    loss().backward()
    once = head.grad.clone()
    rows = torch.tensor([0, 3, 20_000, 39_999], device=device)
    small = head.detach()[rows].requires_grad_()
    of_rows = kept_of([[3, 0], [0], [1, 2, 0]], device)
    ids_of_rows = torch.tensor([3, 0, 2], device=device)
    linear_policy_loss(
        hidden, small, ids_of_rows, None, ones, ones, ones, kept=of_rows, **call
    ).backward()
    assert torch.equal(once[rows], small.grad)
    once[rows] = 0.0
    assert not once.any() and head.grad.dtype == dtype
    (0.5 * loss()).backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(head.grad[rows], 1.5 * small.grad, rtol=eps, atol=0)
    torch.optim.AdamW([head]).step()
    assert head.isfinite().all()


def test_long_sets_are_multiplied_in_blocks(device, monkeypatch):
    """And a block is no part of the result."""
    hidden = torch.randn(2, 8, device=device)
    weight = torch.randn(400, 8, device=device)
    kept = kept_of([list(range(400)), list(range(300))], device)
    ids = torch.tensor([5, 7], device=device)
    whole = token_log_probs(hidden, ids, weight, kept=kept, impl="torch")
    monkeypatch.setattr(closed_form, "_CPU_BLOCK", 64)
    assert torch.equal(token_log_probs(hidden, ids, weight, kept=kept, impl="torch"), whole)
    if device.type == "cpu":  # several blocks of a Triton program as well
        other = token_log_probs(hidden, ids, weight, kept=kept, impl="triton")
        torch.testing.assert_close(other, whole, rtol=1e-6, atol=2e-6)
