"""linear_policy_loss: loss and gradients against float64, chunks, compaction, memory.

Budgets. float32: 5e-6 of the largest entry of each gradient (the row pass allows 3e-6, see
test_logits.py, and a matrix product adds its own rounding). 16-bit: the logits themselves are
rounded, which only fp32_logits avoids; the yardstick is then what the same computation costs in
plain PyTorch in that dtype.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dl_norm
from dl_norm._rows.linear import linear_policy_loss
from dl_norm._rows.logits import logits_policy_loss

# Lanes of no logit: see test_no_invalid_arithmetic in test_logits.py.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
IMPLEMENTATIONS = ("triton", "torch")
BUDGET = 5e-6


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
    tensors: dict

    def args(self):
        return self.token_ids, self.old, self.advantages, self.mask, self.weights

    @property
    def leaves(self):
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]


@pytest.fixture
def make_case(device):
    def make(shape=(3, 7), size=16, vocabulary=50, dtype=torch.float32, *, bias=True, packed=False,
             softcap=None, temperature=1.0, seed=0):  # fmt: skip
        random = torch.Generator().manual_seed(seed)
        hidden = torch.randn(*shape, size, generator=random).to(dtype)
        weight = torch.randn(vocabulary, size, generator=random).to(dtype)
        bias = torch.randn(vocabulary, generator=random).to(dtype) if bias else None
        token_ids = torch.randint(vocabulary, shape, generator=random)
        mask = torch.rand(shape, generator=random) < 0.7
        case = Case(hidden, weight, bias, token_ids, None, torch.randn(shape[0], generator=random),
                    mask, (torch.rand(shape[0], generator=random) + 0.1) * 1e-4, {})  # fmt: skip
        with torch.no_grad():
            log_probs = plain_log_probs(case, torch.float64, softcap, temperature)
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
        return dataclasses.replace(case, **moved, tensors=tensors)

    return make


def plain_log_probs(case, dtype, softcap=None, temperature=1.0):
    """Through the full logits, in the matrix products' dtype, then float32 or float64."""
    logits = torch.nn.functional.linear(
        case.hidden.to(dtype), case.weight.to(dtype),
        None if case.bias is None else case.bias.to(dtype),
    )  # fmt: skip
    logits = logits.double() if dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    log_probs = (logits / temperature).log_softmax(-1)
    return log_probs.gather(-1, case.token_ids[..., None])[..., 0]


def leaves_of(case):
    leaves = {
        name: getattr(case, name).detach().clone().requires_grad_()
        for name in ("hidden", "weight", "bias")
        if getattr(case, name) is not None
    }
    return dataclasses.replace(case, **leaves)


def run(case, impl, *, upstream=1.0, **options):
    """(loss, gradients), and the outputs if any were asked for."""
    case = leaves_of(case)
    result = linear_policy_loss(
        case.hidden, case.weight, *case.args(), bias=case.bias, **case.tensors, impl=impl, **options
    )
    loss, *outputs = result if isinstance(result, tuple) else (result,)
    loss.backward(torch.full_like(loss, upstream))
    return loss.detach(), [leaf.grad for leaf in case.leaves], *outputs


def plain(
    case, dtype=torch.float64, *, upstream=1.0, logit_softcap=None, temperature=1.0, **options
):
    case = leaves_of(case)
    log_probs = plain_log_probs(case, dtype, logit_softcap, temperature)
    loss = dl_norm.reference.policy_loss(log_probs, *case.args()[1:], **case.tensors, **options)
    loss.backward(torch.full_like(loss, upstream))
    grads = [leaf.grad.double() for leaf in case.leaves]
    return loss.detach().double(), grads


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
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "dual_clip": 3.0, "beta": 0.1},
        {"logit_softcap": 5.0, "temperature": 1.3, "beta": 0.1, "delta": 3.0},
    ],
    ids=["defaults", "temperature_kl", "softcap"],
)
def test_against_float64(make_case, impl, packed, chunk_size, options, poison_empty):
    case = make_case(packed=packed, softcap=options.get("logit_softcap"),
                     temperature=options.get("temperature", 1.0))  # fmt: skip
    result = run(case, impl, upstream=3.0, chunk_size=chunk_size, **options)
    assert max(errors(result, plain(case, upstream=3.0, **options))) <= BUDGET


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_size", [4, None])
@pytest.mark.parametrize("fp32_logits", [False, True])
def test_half_precision(make_case, impl, dtype, chunk_size, fp32_logits):
    case = make_case(dtype=dtype)
    upstream = 2.0**16  # a loss scale, for float16
    true = plain(case, upstream=upstream)
    result = run(case, impl, upstream=upstream, chunk_size=chunk_size, fp32_logits=fp32_logits)
    assert all(grad.dtype == dtype for grad in result[1])
    ours, theirs = errors(result, true), errors(plain(case, dtype, upstream=upstream), true)
    # One ulp on top: the interpreter truncates to bfloat16.
    ulp = torch.finfo(dtype).eps
    assert all(a <= 1.5 * b + ulp for a, b in zip(ours, theirs, strict=True))
    if fp32_logits:
        assert ours[0] <= BUDGET


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equals_the_loss_over_the_logits(make_case, impl):
    case = make_case(vocabulary=64)
    case.mask[:] = True
    loss, grads, outputs = run(case, impl, entropy=True, return_metrics=True)
    again = leaves_of(case)
    logits = torch.nn.functional.linear(again.hidden, again.weight, again.bias)
    plain_loss, plain_outputs = logits_policy_loss(
        logits, *case.args(), **case.tensors, impl=impl, entropy=True, return_metrics=True
    )
    plain_loss.backward()
    torch.testing.assert_close(loss, plain_loss.detach(), rtol=2e-6, atol=0)
    for ours, leaf in zip(grads, again.leaves, strict=True):
        torch.testing.assert_close(ours, leaf.grad, rtol=1e-5, atol=1e-10)
    torch.testing.assert_close(outputs.log_probs, plain_outputs.log_probs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(outputs.entropy, plain_outputs.entropy, rtol=2e-6, atol=2e-6)
    for name, value in plain_outputs.metrics.summary().items():
        torch.testing.assert_close(
            outputs.metrics.summary()[name], value, rtol=1e-5, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("frozen", [("weight",), ("weight", "bias"), ("hidden",)])
def test_frozen_parts(make_case, impl, frozen):
    case = make_case()
    _, full = run(case, impl)
    leaves = leaves_of(case)
    for name in frozen:
        getattr(leaves, name).requires_grad_(False)
    linear_policy_loss(
        leaves.hidden, leaves.weight, *case.args(), bias=leaves.bias, **case.tensors, impl=impl
    ).backward()
    for name, grad in zip(("hidden", "weight", "bias"), full, strict=True):
        assert (getattr(leaves, name).grad is None) == (name in frozen)
        if name not in frozen:
            assert torch.equal(getattr(leaves, name).grad, grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_tokens": 20}, {"compact": True}])
def test_masked_positions_may_hold_anything(make_case, impl, on_gpu, options, monkeypatch):
    """``on_gpu``: the way through the code where no value may be read on the host."""
    case = make_case()
    expected = run(case, impl, chunk_size=4)
    masked = ~case.mask
    assert masked.sum() >= 1
    for tensor in (case.hidden, case.old, case.tensors["ref_log_probs"]):
        tensor[masked] = float("nan")
    case.token_ids[masked] = -100
    if on_gpu:
        monkeypatch.setattr("dl_norm._rows.chunks.values_are_free", lambda tensor: False)
    loss, grads = run(case, impl, chunk_size=4, **options)
    torch.testing.assert_close(loss, expected[0], rtol=2e-6, atol=0)
    assert not grads[0][masked].any()
    for ours, theirs in zip(grads, expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-10)


def rows_multiplied(monkeypatch):
    """A list that fills with the rows of every product with the head."""
    from dl_norm._rows import chunks as linear_chunks

    rows, original = [], linear_chunks._logits

    def counting(hidden, *args):
        rows.append(hidden.shape[0])
        return original(hidden, *args)

    monkeypatch.setattr(linear_chunks, "_logits", counting)
    return rows


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dropped_tokens_are_not_multiplied(make_case, impl, monkeypatch):
    case = make_case((4, 12))
    case.tensors.pop("ref_log_probs")
    case.advantages[1] = 0.0
    counted = int(case.mask.sum())
    used = int(case.mask[[0, 2, 3]].sum())
    rows = rows_multiplied(monkeypatch)
    expected = run(case, impl)
    assert sum(rows) == used  # advantage 0 has no gradient and no loss
    rows.clear()
    *_, outputs = run(case, impl, return_log_probs=True)
    assert sum(rows) == counted  # but it has a log-prob
    assert (outputs.log_probs[1] != 0).equal(case.mask[1])

    monkeypatch.setattr("dl_norm._rows.chunks.values_are_free", lambda tensor: False)
    for options, number in (
        ({}, 48),
        ({"max_tokens": used + 3}, used + 3),
        ({"compact": True}, used),
    ):
        rows.clear()
        loss, grads = run(case, impl, **options)
        assert sum(rows) == number
        torch.testing.assert_close(loss, expected[0], rtol=2e-6, atol=1e-11)
        for ours, theirs in zip(grads, expected[1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)
    # A bound that does not hold: nothing can be raised, so the loss says it.
    assert run(case, impl, max_tokens=used - 1)[0].isnan()


def test_chunks_are_never_smaller_than_asked(make_case, monkeypatch):
    case = make_case((1, 45))
    case.mask[:] = True
    rows = rows_multiplied(monkeypatch)
    run(case, "torch", chunk_size=20)
    assert rows == [23, 22]
    rows.clear()
    run(case, "torch")
    assert rows == [45]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_counts(make_case, impl):
    case = make_case()
    case.mask[:] = False
    loss, grads, outputs = run(case, impl, return_metrics=True)
    assert loss == 0 and outputs.metrics.tokens == 0
    assert all(not grad.any() and grad.shape == leaf.shape
               for grad, leaf in zip(grads, case.leaves, strict=True))  # fmt: skip


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_same_bits_every_run(make_case, impl):
    case = make_case((3, 10), dtype=torch.bfloat16)
    first, second = run(case, impl, chunk_size=8), run(case, impl, chunk_size=8)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_head_gradient_is_not_summed_in_half_precision(make_case):
    """64 chunks of 64 tokens: a bfloat16 sum would lose what float32 keeps."""
    case = make_case((1, 4096), 4, 8, torch.bfloat16, bias=False)
    case.mask[:] = True
    case.tensors.clear()
    options = {"upstream": 2.0**10}
    true = plain(case, **options)
    many = errors(run(case, "torch", chunk_size=64, fp32_logits=True, **options), true)
    one = errors(run(case, "torch", chunk_size=4096, fp32_logits=True, **options), true)
    assert many[2] <= one[2] + torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_casts_the_head(make_case, impl):
    case = leaves_of(make_case())
    with pytest.raises(TypeError, match="autocast"):
        linear_policy_loss(case.hidden.bfloat16(), case.weight, *case.args(), impl=impl)
    with torch.autocast(case.hidden.device.type, torch.bfloat16):
        loss = linear_policy_loss(case.hidden, case.weight, *case.args(), bias=case.bias, impl=impl)
    loss.backward()
    half = run(
        dataclasses.replace(
            case, hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16(),
            bias=case.bias.bfloat16(), tensors={},
        ),
        impl,
    )  # fmt: skip
    assert torch.equal(loss.detach(), half[0])
    assert all(leaf.grad.dtype == torch.float32 for leaf in case.leaves)
    assert torch.equal(case.weight.grad.bfloat16(), half[1][1])


class LargestTensor(TorchDispatchMode):
    """Elements of the largest result of any operation, and the peak of what is alive at a time."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_tensor_of_tokens_times_vocabulary(make_case, impl, dtype):
    tokens, size, vocabulary, chunk = 128, 8, 1024, 8
    case = make_case((4, tokens // 4), size, vocabulary, dtype, bias=False)
    case.mask[:] = True
    with LargestTensor() as counted:
        run(case, impl, chunk_size=chunk, entropy=True, return_metrics=True)
    # The logits of one chunk, in float32, and the head; N V is 16 times as much.
    assert counted.largest <= 4 * max(chunk, size) * vocabulary
    with LargestTensor() as counted:
        plain(case, dtype)
    assert counted.largest >= 4 * tokens * vocabulary  # so the count can see one


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_inside_torch_compile(make_case, impl):
    case = leaves_of(make_case())

    def step(hidden, weight):
        return 2 * linear_policy_loss(hidden * 3, weight, *case.args(), impl=impl)

    expected = torch.autograd.grad(step(case.hidden, case.weight), (case.hidden, case.weight))
    compiled = torch.compile(step, backend="eager")
    result = torch.autograd.grad(compiled(case.hidden, case.weight), (case.hidden, case.weight))
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_second_backward_is_refused(make_case, impl):
    case = leaves_of(make_case())
    loss = linear_policy_loss(case.hidden, case.weight, *case.args(), impl=impl)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize(
    "change, error, match",
    [
        (lambda c: {"hidden": c.hidden.double()}, TypeError, "hidden must be float32"),
        (lambda c: {"lm_head_weight": c.weight.bfloat16()}, TypeError, "dtype of hidden"),
        (lambda c: {"lm_head_weight": c.weight[:, 1:]}, ValueError, r"\(V, D\)"),
        (lambda c: {"bias": c.bias[1:]}, ValueError, r"\(V,\)"),
        (lambda c: {"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        (lambda c: {"chunk_size": 1.5}, TypeError, "chunk_size must be an int"),
        (lambda c: {"max_tokens": 1}, ValueError, "upper bound"),
        (lambda c: {"logit_softcap": 0.0}, ValueError, "logit_softcap > 0"),
        (lambda c: {"beta": 0.1}, ValueError, "ref_log_probs"),
    ],
)
def test_what_cannot_be_honoured_is_refused(make_case, change, error, match):
    case = make_case()
    arguments = {"hidden": case.hidden, "lm_head_weight": case.weight, "bias": case.bias}
    arguments |= change(case)
    with pytest.raises(error, match=match):
        linear_policy_loss(
            arguments.pop("hidden"), arguments.pop("lm_head_weight"), *case.args(),
            **{"compact": True} | arguments,
        )  # fmt: skip
