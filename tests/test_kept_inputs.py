"""The head over kept sets: tensors of any kind, sets that are wrong, autograd and torch.compile."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dl_norm import KeptSets, linear_policy_loss, token_log_probs

sys.path.append(str(Path(__file__).parent))

from kept_cases import kept_of, leaves_of, make, run

IMPLEMENTATIONS = ("triton", "torch")
CHECKS = ("test_schema", "test_faketensor")


@pytest.fixture
def make_case(device):
    return functools.partial(make, device)


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
def test_a_wrong_set(make_case, impl, kind, request):
    case = broken(make_case(), kind=kind)
    if case.hidden.device.type == "cpu":
        with pytest.raises(ValueError, match=WRONG[kind]):
            run(case, impl)
        with pytest.raises(ValueError, match=WRONG[kind]):
            token_log_probs(case.hidden, case.token_ids, case.weight, mask=case.mask,
                            kept=case.kept, impl=impl)  # fmt: skip
        request.getfixturevalue("as_on_a_gpu")
    assert run(case, impl, surrogate="cispo")[0].isnan()
    case = case.replace(old=None)
    assert run(case, impl, surrogate="cispo")[0].isnan()  # nothing depends on the log-prob
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
        squares = token_log_probs(
            hidden, case.token_ids, weight, bias=bias, mask=case.mask, kept=kept, impl=impl,
            sum_sq_probs=True,
        )[1]  # fmt: skip
        loss = linear_policy_loss(
            hidden * 3, weight, *case.args(), bias=bias, kept=kept, **case.tensors, impl=impl,
            entropy_coef=0.3,
        )  # fmt: skip
        return 2 * loss, squares

    expected_loss, expected_squares = step(*leaves, *case.kept)
    expected = torch.autograd.grad(expected_loss, leaves)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    loss, squares = compiled(*leaves, *case.kept)
    assert torch.equal(loss, expected_loss) and torch.equal(squares, expected_squares)
    result = torch.autograd.grad(loss, leaves)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_operators_have_the_shapes_that_they_say(make_case, dtype):
    from dl_norm._options import make_token_loss
    from dl_norm._rows.autograd import linear_op, log_probs_op
    from dl_norm._rows.chunks import ChunkOptions
    from dl_norm._rows.records import WHOLE, RowSettings, TokenRows

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


def test_checkpoints_and_offloading(make_case):
    """What is stored until backward is sparse on a CPU, and hooks see it."""
    case = leaves_of(make_case())
    leaves = case.hidden, case.weight

    def loss(hidden, weight):
        return linear_policy_loss(
            hidden, weight, *case.args(), kept=case.kept, **case.tensors, impl="torch"
        )

    expected = torch.autograd.grad(loss(*leaves), leaves)
    again = checkpoint(loss, *leaves, use_reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        offloaded = loss(*leaves)
    for result in (again, offloaded):
        assert all(map(torch.equal, torch.autograd.grad(result, leaves), expected))
