"""The head over kept sets: everything equals masking the full logits, and what is wrong is said.

Budgets. float32: 5e-6 of the largest entry of each gradient, as for linear_policy_loss. 16-bit: the
logits are float32, so what remains is the rounding of a gradient and, in the PyTorch
implementation, of the gradient at a logit: one ulp of each.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path

import pytest
import torch

import dl_norm
from bench.timing import peak_memory
from dl_norm import KeptSets, linear_policy_loss, token_log_probs

sys.path.append(str(Path(__file__).parent))

from adapter_tools import lift

IMPLEMENTATIONS = ("triton", "torch")
BUDGET = 5e-6
CHECKS = ("test_schema", "test_faketensor")


@dataclasses.dataclass
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    token_ids: torch.Tensor
    old: torch.Tensor | None
    advantages: torch.Tensor
    mask: torch.Tensor | None
    weights: torch.Tensor
    kept: KeptSets | None
    tensors: dict

    def args(self):
        return self.token_ids, self.old, self.advantages, self.mask, self.weights

    @property
    def leaves(self):
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def sets(self):
        """(N,) lists of ids."""
        ends = self.kept.offsets.tolist()
        ids = self.kept.ids.tolist()
        return [ids[a:b] for a, b in itertools.pairwise(ends)]

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


def draw_sets(token_ids, counted, vocabulary, random):
    """A set for every token: itself alone for nearly half of them, else up to 13 ids in any order;
    none where nothing counts."""
    sets = []
    for token, counts in zip(token_ids.flatten().tolist(), counted.flatten().tolist(), strict=True):
        size = int(torch.randint(2, 14, (), generator=random))
        others = torch.randperm(vocabulary, generator=random)[:size].tolist()
        others = [other for other in others if other != token]
        if torch.rand((), generator=random) < 0.45:
            others = []
        place = int(torch.randint(len(others) + 1, (), generator=random))
        sets.append([*others[:place], token, *others[place:]] if counts else [])
    return sets


def kept_of(sets, device, dtype=torch.int64):
    counts = torch.tensor([0, *(len(members) for members in sets)])
    ids = torch.tensor([member for members in sets for member in members], dtype=dtype)
    return KeptSets(ids.to(device), counts.cumsum(0).to(dtype).to(device))


@pytest.fixture
def make_case(device):
    def make(shape=(3, 7), size=16, vocabulary=50, dtype=torch.float32, *, bias=True, packed=False,
             softcap=None, temperature=1.0, ids=torch.int64, seed=0):  # fmt: skip
        random = torch.Generator().manual_seed(seed)
        hidden = torch.randn(*shape, size, generator=random).to(dtype)
        weight = torch.randn(vocabulary, size, generator=random).to(dtype)
        bias = torch.randn(vocabulary, generator=random).to(dtype) if bias else None
        token_ids = torch.randint(vocabulary, shape, generator=random)
        mask = torch.rand(shape, generator=random) < 0.7
        kept = kept_of(draw_sets(token_ids, mask, vocabulary, random), "cpu", ids)
        advantages = torch.randn(shape[0], generator=random)
        weights = (torch.rand(shape[0], generator=random) + 0.1) * 1e-4
        case = Case(
            hidden, weight, bias, token_ids, None, advantages, mask, weights, kept, {}
        )  # fmt: skip
        with torch.no_grad():
            log_probs = masked_log_probs(case, torch.float64, softcap, temperature)[0]
        case.old = (log_probs + 0.3 * torch.randn(shape, generator=random)).float()
        ref = (log_probs + 0.3 * torch.randn(shape, generator=random)).float()
        case.tensors["ref_log_probs"] = ref
        case.tensors["rollout_weights"] = torch.rand(shape[0], generator=random) + 0.5
        if packed:
            for name in ("hidden", "token_ids", "old", "mask"):
                setattr(case, name, getattr(case, name).flatten(0, 1))
            case.tensors["ref_log_probs"] = ref.flatten()
            case.tensors["cu_seqlens"] = torch.arange(shape[0] + 1) * shape[1]
        moved = {k: v.to(device) for k, v in vars(case).items() if isinstance(v, torch.Tensor)}
        tensors = {k: v.to(device) for k, v in case.tensors.items()}
        kept = KeptSets(*(tensor.to(device) for tensor in kept))
        return dataclasses.replace(case, **moved, tensors=tensors, kept=kept)

    return make


def masked_log_probs(case, dtype=torch.float64, softcap=None, temperature=1.0):
    """Log-probs and entropy through the full logits, -inf outside the sets; 0 without a set."""
    logits = torch.nn.functional.linear(
        case.hidden.to(dtype), case.weight.to(dtype),
        None if case.bias is None else case.bias.to(dtype),
    )  # fmt: skip
    logits = logits.double() if dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    flat = (logits / temperature).flatten(0, -2)
    outside = torch.ones_like(flat, dtype=torch.bool)
    for number, members in enumerate(case.sets()):
        outside[number, members or slice(None)] = False
    log_probs = flat.masked_fill(outside, -torch.inf).log_softmax(-1)
    entropy = -torch.where(outside, 0.0, log_probs.exp() * log_probs.masked_fill(outside, 0.0))
    own = log_probs.gather(-1, case.token_ids.flatten()[:, None].clamp(0, flat.shape[1] - 1))
    empty = (case.kept.offsets.diff() == 0).view(case.token_ids.shape)
    own, entropy = own[:, 0].view(empty.shape), entropy.sum(-1).view(empty.shape)
    return own.masked_fill(empty, 0.0), entropy.masked_fill(empty, 0.0)


def leaves_of(case):
    leaves = {
        name: getattr(case, name).detach().clone().requires_grad_()
        for name in ("hidden", "weight", "bias")
        if getattr(case, name) is not None
    }
    return case.replace(**leaves)


def run(case, impl, *, upstream=1.0, **options):
    """(loss, gradients), and the outputs if any were asked for."""
    case = leaves_of(case)
    result = linear_policy_loss(
        case.hidden, case.weight, *case.args(), bias=case.bias, kept=case.kept, **case.tensors,
        impl=impl, **options,
    )  # fmt: skip
    loss, *outputs = result if isinstance(result, tuple) else (result,)
    loss.backward(torch.full_like(loss, upstream))
    return loss.detach(), [leaf.grad for leaf in case.leaves], *outputs


def truth(case, *, upstream=1.0, logit_softcap=None, temperature=1.0, **options):
    case = leaves_of(case)
    log_probs, _ = masked_log_probs(case, torch.float64, logit_softcap, temperature)
    old = None if case.old is None else case.old.double()
    loss = dl_norm.reference.policy_loss(
        log_probs, old, *case.args()[2:], **case.tensors, **options
    )
    loss.backward(torch.full_like(loss, upstream))
    return loss.detach().double(), [leaf.grad.double() for leaf in case.leaves]


def errors(result, expected):
    """Relative errors: of the loss, and of each gradient to its largest entry."""
    loss = (result[0].double() - expected[0]).abs() / expected[0].abs()
    grads = [
        (ours.double() - true).abs().amax() / true.abs().amax()
        for ours, true in zip(result[1], expected[1], strict=True)
    ]
    return [error.item() for error in (loss, *grads)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("on_gpu", [False, True])
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
    expected, expected_entropy = masked_log_probs(case, torch.float64, softcap, 0.8)
    *_, outputs = run(case, impl, entropy=True, return_log_probs=True, return_metrics=True,
                      **options)  # fmt: skip
    log_probs, entropy = token_log_probs(
        case.hidden, case.token_ids, case.weight, bias=case.bias, mask=case.mask, kept=case.kept,
        entropy=True, impl=impl, **options,
    )  # fmt: skip
    assert torch.equal(outputs.log_probs, log_probs) and torch.equal(outputs.entropy, entropy)
    assert log_probs.dtype == torch.float32 and (log_probs <= 0).all()
    scale = 1 + case.hidden.shape[-1] ** 0.5
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-6, atol=1e-6 * scale)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=2e-6 * scale)
    _, metrics = dl_norm.policy_loss(
        log_probs, *case.args()[1:], **case.tensors, impl=impl, return_metrics=True
    )
    for name, value in metrics.summary().items():
        torch.testing.assert_close(outputs.metrics.summary()[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [16, 13])
def test_few_cases(make_case, impl, size):
    """What the compiled kernels are run with, as they take seconds each."""
    case = make_case((2, 6), size, 40, softcap=5.0)
    options = {"logit_softcap": 5.0, "beta": 0.1}
    result = run(case, impl, upstream=3.0, entropy=True, **options)
    assert max(errors(result, truth(case, upstream=3.0, **options))) <= BUDGET


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
def test_strides(make_case, impl):
    """Hidden states and head cut out of wider tensors, ids and offsets out of others."""
    case = make_case(bias=False)
    expected = run(case, impl)
    wide = case.hidden.new_full((3, 9, 21), torch.nan)
    wide[:, 1:8, 3:19] = case.hidden
    head = case.weight.new_full((50, 19), torch.nan)
    head[:, 1:17] = case.weight
    turned = case.weight.T.contiguous().T
    for weight in (head[:, 1:17], turned):
        hidden = wide[:, 1:8, 3:19].detach().requires_grad_()
        weight = weight.detach().requires_grad_()
        kept = KeptSets(*(tensor.repeat_interleave(2)[::2] for tensor in case.kept))
        loss = linear_policy_loss(
            hidden, weight, *case.args(), kept=kept, **case.tensors, impl=impl
        )
        grads = torch.autograd.grad(loss, (hidden, weight))
        torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
        for ours, theirs in zip(grads, expected[1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("frozen", [("weight",), ("weight", "bias"), ("hidden",)])
def test_frozen_parts(make_case, impl, frozen):
    case = make_case()
    _, full = run(case, impl)
    leaves = leaves_of(case)
    for name in frozen:
        getattr(leaves, name).requires_grad_(False)
    linear_policy_loss(
        leaves.hidden, leaves.weight, *case.args(), bias=leaves.bias, kept=case.kept,
        **case.tensors, impl=impl,
    ).backward()  # fmt: skip
    for name, grad in zip(("hidden", "weight", "bias"), full, strict=True):
        assert (getattr(leaves, name).grad is None) == (name in frozen)
        if name not in frozen:
            assert torch.equal(getattr(leaves, name).grad, grad)


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


# -- sets from sequences


def test_cat():
    parts = [
        (torch.tensor([4, 1, 2]), torch.tensor([0, 1, 3])),
        (torch.tensor([5]), torch.tensor([0, 1])),
    ]
    packed = KeptSets.cat(parts)
    assert packed.ids.tolist() == [4, 1, 2, 5] and packed.offsets.tolist() == [0, 1, 3, 4]
    padded = KeptSets.cat(parts, 3)
    assert padded.ids.tolist() == [4, 1, 2, 5]
    assert padded.offsets.tolist() == [0, 1, 3, 3, 4, 4, 4]
    assert [t.tolist() for t in KeptSets.cat([])] == [[], [0]]
    with pytest.raises(ValueError, match="2 kept sets, more than length = 1"):
        KeptSets.cat(parts, 1)


# -- what is wrong


def broken(case, **changes):
    """The case with one thing wrong at the first token that counts and is not alone."""
    sets = case.sets()
    token = next(i for i, members in enumerate(sets) if len(members) > 2)
    own = int(case.token_ids.flatten()[token])
    change = {
        "missing": lambda members: [member for member in members if member != own],
        "empty": lambda members: [],
        "other alone": lambda members: [own + 1 if own == 0 else own - 1],
        "twice": lambda members: [*members, members[0]],
        "itself twice": lambda members: [own, own],
        "outside": lambda members: [*members, case.weight.shape[0]],
        "below": lambda members: [-1, *members],
        "far": lambda members: [2**31 - 1, *members],
    }[changes["kind"]]
    sets[token] = change(sets[token])
    return case.replace(kept=kept_of(sets, case.hidden.device))


WRONG = {
    "missing": "must be in its kept set", "empty": "must be in its kept set",
    "other alone": "must be in its kept set", "twice": "twice", "itself twice": "twice",
    "outside": r"\[0, V = 50\)", "below": r"\[0, V = 50\)", "far": r"\[0, V = 50\)",
}  # fmt: skip


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
def test_a_wrong_set(make_case, impl, kind, surrogate, monkeypatch, request):
    case = broken(make_case(), kind=kind)
    if case.hidden.device.type == "cpu":
        with pytest.raises(ValueError, match=WRONG[kind]):
            run(case, impl)
        with pytest.raises(ValueError, match=WRONG[kind]):
            token_log_probs(case.hidden, case.token_ids, case.weight, mask=case.mask,
                            kept=case.kept, impl=impl)  # fmt: skip
        request.getfixturevalue("as_on_a_gpu")
    assert run(case, impl, surrogate=surrogate)[0].isnan()
    case = case.replace(old=None)
    assert run(case, impl, surrogate=surrogate)[0].isnan()  # nothing depends on the log-prob
    log_probs = token_log_probs(
        case.hidden, case.token_ids, case.weight, mask=case.mask, kept=case.kept, impl=impl
    )
    assert log_probs.isnan().sum() == 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "change",
    [
        lambda offsets: offsets + 1,
        lambda offsets: offsets - 1,
        lambda offsets: offsets.clamp(max=int(offsets[-1]) - 1),
        lambda offsets: offsets * 1000,
        lambda offsets: offsets.flip(0),
        lambda offsets: torch.cat([offsets[:3], offsets[1:2], offsets[4:]]),
    ],
)
def test_wrong_offsets(make_case, impl, change, request):
    case = make_case()
    kept = KeptSets(case.kept.ids, change(case.kept.offsets))
    case = case.replace(kept=kept)
    if case.hidden.device.type == "cpu":
        with pytest.raises(ValueError, match="must rise from 0 to M = "):
            run(case, impl)
        if impl == "torch":  # traced there is no value to check, but the operator runs on a CPU
            traced = torch.compile(run, backend="eager")
            assert traced(case, impl)[0].isnan()
        request.getfixturevalue("as_on_a_gpu")
    assert run(case, impl)[0].isnan()


@pytest.mark.parametrize(
    "change, error, match",
    [
        (lambda k: (k.ids, k.offsets), TypeError, r"dl_norm.KeptSets\(ids, offsets\)"),
        (lambda k: KeptSets(k.ids.float(), k.offsets), TypeError, "kept.ids must be int64"),
        (lambda k: KeptSets(k.ids, k.offsets.float()), TypeError, "kept.offsets must be int64"),
        (lambda k: KeptSets(k.ids.tolist(), k.offsets), TypeError, "kept.ids must be a tensor"),
        (lambda k: KeptSets(k.ids[None], k.offsets), ValueError, r"kept.ids must be \(M,\)"),
        (lambda k: KeptSets(k.ids, k.offsets[1:]), ValueError, r"\(N \+ 1,\) = \(22,\)"),
    ],
)
def test_what_is_no_set_is_refused(make_case, change, error, match):
    case = make_case()
    with pytest.raises(error, match=match):
        run(case.replace(kept=change(case.kept)), "torch")


def test_options_without_effect_are_refused(make_case):
    case = make_case()
    for options in ({"chunk_size": 8}, {"max_tokens": 21}, {"compact": True}):
        with pytest.raises(ValueError, match="has no effect with kept sets"):
            run(case, "torch", **options)
        with pytest.raises(ValueError, match="has no effect with kept sets"):
            token_log_probs(case.hidden, case.token_ids, case.weight, mask=case.mask,
                            kept=case.kept, **options)  # fmt: skip
    with pytest.raises(ValueError, match="kept has no effect on logits"):
        token_log_probs(case.hidden, case.token_ids % 16, mask=case.mask, kept=case.kept)


# -- autograd


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_second_backward_is_refused(make_case, impl):
    case = leaves_of(make_case())
    loss = linear_policy_loss(case.hidden, case.weight, *case.args(), kept=case.kept, impl=impl)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = linear_policy_loss(case.hidden, case.weight, *case.args(), kept=case.kept, impl=impl)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, case.hidden, create_graph=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_inside_torch_compile(make_case, impl):
    case = leaves_of(make_case())
    leaves = (case.hidden, case.weight, case.bias)

    def step(hidden, weight, bias, ids, offsets):
        kept = KeptSets(ids, offsets)
        log_probs = token_log_probs(
            hidden, case.token_ids, weight, bias=bias, mask=case.mask, kept=kept, impl=impl
        )
        loss = linear_policy_loss(
            hidden * 3, weight, *case.args(), bias=bias, kept=kept, **case.tensors, impl=impl
        )
        return 2 * loss, log_probs

    expected_loss, expected_log_probs = step(*leaves, *case.kept)
    expected = torch.autograd.grad(expected_loss, leaves)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    loss, log_probs = compiled(*leaves, *case.kept)
    assert torch.equal(loss, expected_loss) and torch.equal(log_probs, expected_log_probs)
    result = torch.autograd.grad(loss, leaves)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_operators_have_the_shapes_that_they_say(make_case, dtype):
    from dl_norm.options import make_token_loss
    from dl_norm.rows.autograd import linear_op, log_probs_op
    from dl_norm.rows.chunks import ChunkOptions
    from dl_norm.rows.records import WHOLE, RowSettings, TokenRows

    case = make_case(dtype=dtype)
    ids, active = case.token_ids.flatten(), case.mask.flatten()
    weights = torch.rand(21, device=ids.device)
    rows = TokenRows(ids, active, weights * active, weights * active, case.old.flatten())
    settings = RowSettings(
        0.7, 5.0, make_token_loss(), metrics=True, entropy=True, sum_sq_probs=True
    )
    tensors = case.hidden, case.weight, case.bias
    last = ChunkOptions(), case.kept, "torch"
    for needed in ((True, True, True), (True, False, False), (False, False, False)):
        arguments = linear_op.arguments(*tensors, rows, settings, *last, needed)
        torch.library.opcheck(linear_op.op, tuple(arguments), test_utils=CHECKS)
    arguments = log_probs_op.arguments(*tensors, ids, active, 0.7, 5.0, True, True, WHOLE, *last)
    torch.library.opcheck(log_probs_op.op, tuple(arguments), test_utils=CHECKS)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_under_autocast(make_case, impl):
    """As torch.nn.functional.linear: bfloat16 operands, float32 gradients of float32 leaves."""
    case = make_case()
    narrow = case.replace(**{name: getattr(case, name).bfloat16()
                             for name in ("hidden", "weight", "bias")})  # fmt: skip
    expected = run(narrow, impl)
    with torch.autocast(case.hidden.device.type, dtype=torch.bfloat16):
        loss, grads = run(case, impl)
    assert torch.equal(loss, expected[0])
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert all(torch.equal(a, b.float()) for a, b in zip(grads, expected[1], strict=True))


# -- a user's token loss, other tensors of the loss


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


# -- other people's code


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
    check_masked(make_case, impl, lambda logits, case: (
        theirs._calculate_log_probs_and_entropy_chunk(
            logits, case.token_ids.flatten(), None, with_entropy=False,
            log_prob_keep_mask=keep_mask(case, logits.shape[1]),
        )[0]
    ))  # fmt: skip


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_as_a_mask_over_the_logits(make_case, impl):
    """What prime-rl and slime compute, as a formula: -inf outside the set, then log_softmax. The
    checked commit of prime-rl is older than its sampling masks, so this is not its code."""

    def masked(logits, case):
        logits = logits.masked_fill(~keep_mask(case, logits.shape[1]), -torch.inf)
        return logits.log_softmax(-1).gather(-1, case.token_ids.flatten()[:, None])[:, 0]

    check_masked(make_case, impl, masked)


def check_masked(make_case, impl, log_probs_of):
    case = make_case(bias=False)
    # Without a set theirs is NaN: a set of the token itself, which does not count.
    tokens = case.token_ids.flatten().tolist()
    sets = [members or [token] for members, token in zip(case.sets(), tokens, strict=True)]
    case = case.replace(kept=kept_of(sets, case.hidden.device))
    loss, grads = run(case, impl)
    leaves = leaves_of(case)
    logits = (leaves.hidden.flatten(0, 1) @ leaves.weight.T).float()
    log_probs = log_probs_of(logits, case).view(case.token_ids.shape)
    their_loss = dl_norm.reference.policy_loss(log_probs, *case.args()[1:], **case.tensors)
    their_loss.backward()
    torch.testing.assert_close(loss, their_loss.detach(), rtol=1e-5, atol=0)
    for ours, leaf in zip(grads, (leaves.hidden, leaves.weight), strict=True):
        torch.testing.assert_close(ours, leaf.grad, rtol=1e-4, atol=1e-9)


# -- memory


@pytest.mark.parametrize(
    "impl, dtype", [("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.bfloat16)]
)
def test_memory_depends_on_the_entries(impl, dtype, device, monkeypatch):
    """Nothing of tokens times vocabulary, nor of entries times row length; of the vocabulary only
    the head's gradient, once."""
    from dl_norm.kept import closed_form

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


def test_long_sets_are_multiplied_in_blocks(device, monkeypatch):
    """And a block is no part of the result."""
    from dl_norm.kept import closed_form

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
