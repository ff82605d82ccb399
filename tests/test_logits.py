"""logits_policy_loss against log_softmax and the reference loss in float64, and what it promises.

Budgets. float32: 3e-6 of the largest gradient, and of the loss. The log-prob is a logit minus a
log-sum-exp, both of size up to about 20, so its error is a few 1e-6 at the worst; exp makes that a
relative error of the ratio. 16-bit gradients add one rounding of the result: half an ulp, or a
whole one in the interpreter, which truncates to bfloat16. (Upstream gradients are powers of two
there: others add a second rounding.)
"""

from __future__ import annotations

import dataclasses

import numpy
import pytest
import torch

import dl_norm
from dl_norm._rows.logits import logits_policy_loss

# Lanes of no logit: see test_no_invalid_arithmetic.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
IMPLEMENTATIONS = ("triton", "torch")
BUDGET = 3e-6
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

OPTIONS = {
    "defaults": {},
    "temperature": {"temperature": 0.7},
    "clip_and_dual_clip": {"eps_low": 0.1, "eps_high": 0.28, "dual_clip": 1.3},
    "delta": {"delta": 1.25},
    "no_clamp": {"log_ratio_clamp": None},
    "clamp": {"log_ratio_clamp": 0.3, "eps_low": 0.9, "eps_high": 3.0},
    "kl": {"beta": 0.3},
    "everything": {"temperature": 1.7, "dual_clip": 3.0, "delta": 4.0, "beta": 0.1},
}


@dataclasses.dataclass
class Case:
    logits: torch.Tensor
    token_ids: torch.Tensor
    old: torch.Tensor | None
    advantages: torch.Tensor
    mask: torch.Tensor | None
    weights: torch.Tensor
    tensors: dict

    def args(self):
        return self.token_ids, self.old, self.advantages, self.mask, self.weights


@pytest.fixture
def make_case(device):
    def make(
        vocabulary, shape=(3, 5), dtype=torch.float32, *, packed=False, old=True, ref=False,
        tokenwise=False, rollout=False, temperature=1.0, seed=0,
    ):  # fmt: skip
        random = torch.Generator().manual_seed(seed)
        sequences, tokens = shape
        logits = (3 * torch.randn(*shape, vocabulary, generator=random)).to(dtype)
        token_ids = torch.randint(vocabulary, shape, generator=random)
        mask = torch.rand(shape, generator=random) < 0.7
        mask[0, 0] = True
        log_probs = (logits.double() / temperature).log_softmax(-1)
        log_probs = log_probs.gather(-1, token_ids[..., None])[..., 0]

        def near():
            return (log_probs + 0.3 * torch.randn(shape, generator=random)).float()

        values = {
            "logits": logits, "token_ids": token_ids, "mask": mask,
            "old": near() if old else None, "ref_log_probs": near() if ref else None,
            "advantages": torch.randn(shape if tokenwise else sequences, generator=random),
            "rollout_weights": torch.rand(shape if tokenwise else sequences, generator=random) + 0.5
            if rollout else None,
            "weights": (torch.rand(sequences, generator=random) + 0.1) * 1e-4,
        }  # fmt: skip
        if packed:
            values = {
                name: v.flatten(0, 1) if v is not None and v.shape[:2] == shape else v
                for name, v in values.items()
            }
            values["cu_seqlens"] = torch.arange(sequences + 1) * tokens
        values = {name: None if v is None else v.to(device) for name, v in values.items()}
        tensors = {
            name: values.pop(name, None)
            for name in ("ref_log_probs", "rollout_weights", "cu_seqlens")
        }
        return Case(**values, tensors=tensors)

    return make


def run(case, impl, *, upstream=1.0, **options):
    """(loss, gradient), and the outputs if any were asked for."""
    logits = case.logits.detach().clone().requires_grad_()
    # In place needs a tensor that is not a leaf.
    given = logits * 1 if options.get("in_place") else logits
    result = logits_policy_loss(given, *case.args(), **case.tensors, impl=impl, **options)
    loss, *outputs = result if isinstance(result, tuple) else (result,)
    loss.backward(torch.full_like(loss, upstream))
    return loss.detach(), logits.grad, *outputs


def truth(case, *, upstream=1.0, temperature=1.0, **options):
    logits = case.logits.detach().double().requires_grad_()
    # What a masked row holds must not matter to the truth either.
    masked = torch.zeros_like(case.token_ids) if case.mask is None else ~(case.mask != 0)
    log_probs = (logits.masked_fill(masked.bool()[..., None], 0.0) / temperature).log_softmax(-1)
    ids = case.token_ids.masked_fill(masked.bool(), 0)[..., None].long()
    loss = dl_norm.reference.policy_loss(
        log_probs.gather(-1, ids)[..., 0], *case.args()[1:], **case.tensors, **options
    )
    loss.backward(torch.full_like(loss, upstream))
    entropy = -(log_probs.exp() * log_probs.clamp(min=-1e300)).sum(-1)
    token = log_probs.gather(-1, ids)[..., 0]
    return loss.detach(), logits.grad, token.detach(), entropy.detach()


def assert_close(result, expected, dtype):
    loss, grad = result[:2]
    true_loss, true_grad = expected[:2]
    # Terms of both signs cancel in the loss: its scale is that of the gradient, summed.
    scale = true_grad.abs().amax().item()
    size = max(true_loss.abs().item(), true_grad.abs().sum().item())
    assert abs(loss.double() - true_loss).item() <= BUDGET * size
    rounding = 0.0 if dtype == torch.float32 else ULP[dtype] * true_grad.abs()
    smallest = 0.0 if dtype != torch.float16 else 2.0**-24
    excess = (grad.double() - true_grad).abs() - rounding - smallest
    assert excess.max().item() <= BUDGET * scale


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize(
    "vocabulary, shape",
    [
        (1, (2, 3)),  # nothing to choose: log-prob 0
        (7, (3, 5)),  # less than one 16-byte vector, every row at another offset
        (1000, (3, 5)),  # a multiple of 8: no edges
        (1003, (3, 5)),  # odd: edges at both ends
        (32000, (1, 3)),
        (49152, (1, 3)),  # three tiles exactly
        (151936, (1, 3)),
        (248320, (1, 2)),
    ],
)
def test_loss_and_gradient_against_float64(make_case, impl, dtype, vocabulary, shape):
    case = make_case(vocabulary, shape, dtype)
    upstream = 2.0**16  # a loss scale: float16 gradients would underflow without one
    assert_close(run(case, impl, upstream=upstream), truth(case, upstream=upstream), dtype)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokenwise", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_against_float64(make_case, impl, packed, tokenwise, options, poison_empty):
    case = make_case(
        37, packed=packed, tokenwise=tokenwise, ref="beta" in options, rollout=True,
        temperature=options.get("temperature", 1.0),
    )  # fmt: skip
    assert_close(
        run(case, impl, upstream=3.0, **options),
        truth(case, upstream=3.0, **options),
        torch.float32,
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_old_log_probs_the_ratio_is_one(make_case, impl):
    case = make_case(37, old=False)
    assert_close(run(case, impl), truth(case), torch.float32)
    *_, outputs = run(case, impl, return_metrics=True)
    assert outputs.metrics.summary()["ratio_max"] == 1


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_mask_for_packed_tokens(make_case, impl):
    case = make_case(37, packed=True)
    case.mask = None
    assert_close(run(case, impl), truth(case), torch.float32)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocabulary", [64, 37])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],  # the usual shift: rows not evenly spaced
        lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],  # starts off a 16-byte boundary at odd V
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.mT.contiguous().mT,  # the only one that is copied
    ],
)
def test_strided_logits(make_case, impl, vocabulary, view):
    case = make_case(vocabulary)
    expected = run(case, impl)
    logits = view(case.logits).detach().requires_grad_()
    assert not logits.is_contiguous()
    loss = logits_policy_loss(logits, *case.args(), impl=impl)
    (grad,) = torch.autograd.grad(loss, logits)
    # Another alignment sums the row in another order. The terms of the loss are about 1e-4.
    torch.testing.assert_close(loss.detach(), expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(grad, expected[1], rtol=2e-6, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_in_place_is_the_same_and_allocates_nothing(make_case, impl, dtype):
    case = make_case(1003, dtype=dtype)
    expected = run(case, impl, upstream=0.5)
    result = run(case, impl, upstream=0.5, in_place=True)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])

    leaf = case.logits.clone().requires_grad_()
    logits = leaf * 1
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    logits_policy_loss(logits, *case.args(), impl=impl, in_place=True).backward()
    assert seen == [logits.data_ptr()]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_in_place_is_refused_where_it_would_corrupt(make_case, impl):
    case = make_case(37)
    leaf = case.logits.clone().requires_grad_()
    before = leaf.detach().clone()
    with pytest.raises(ValueError, match="leaf"):
        logits_policy_loss(leaf, *case.args(), impl=impl, in_place=True)
    assert torch.equal(leaf.detach(), before)
    longer = torch.cat([leaf, leaf[:, :1]], 1)
    with pytest.raises(ValueError, match="contiguous"):
        logits_policy_loss(longer[:, :-1], *case.args(), impl=impl, in_place=True)
    # tanh keeps its output for its own backward pass.
    loss = logits_policy_loss(leaf.tanh(), *case.args(), impl=impl, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    # Without a gradient there is nothing to write.
    constant = case.logits.clone()
    logits_policy_loss(constant, *case.args(), impl=impl, in_place=True)
    assert torch.equal(constant, case.logits)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("in_place", [False, True])
def test_masked_rows_may_hold_anything(make_case, impl, in_place, poison_empty):
    case = make_case(37, ref=True, tokenwise=True, rollout=True)
    expected = run(case, impl, beta=0.1)
    masked = ~case.mask
    for tensor in (case.logits, case.old, case.advantages, *case.tensors.values()):
        if tensor is not None:
            tensor[masked] = float("nan")
    case.token_ids[masked] = -100
    loss, grad, outputs = run(case, impl, beta=0.1, in_place=in_place, entropy=True)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])
    assert not grad[masked].any()
    assert not outputs.log_probs[masked].any() and not outputs.entropy[masked].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_zero_advantages_have_exactly_no_gradient(make_case, impl):
    case = make_case(37)
    case.advantages[1] = 0
    case.logits[1] = float("nan")  # so the row is not read
    loss, grad = run(case, impl)
    assert loss.isfinite() and not grad[1].any() and grad[0].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("vocabulary, shape", [(1003, (3, 5)), (40001, (2, 2))])  # 1 and 3 tiles
def test_outputs_of_the_same_pass(make_case, impl, vocabulary, shape, temperature):
    case = make_case(vocabulary, shape, ref=True, temperature=temperature)
    _, _, log_probs, entropy = truth(case, temperature=temperature)
    options = {"dual_clip": 1.2, "beta": 0.1}
    plain = run(case, impl, temperature=temperature, **options)
    loss, grad, outputs = run(
        case, impl, temperature=temperature, entropy=True, return_metrics=True, **options
    )
    assert torch.equal(loss, plain[0]) and torch.equal(grad, plain[1])
    counted = case.mask
    assert not outputs.log_probs.requires_grad and not outputs.entropy.requires_grad
    torch.testing.assert_close(
        outputs.log_probs[counted].double(), log_probs[counted], rtol=1e-6, atol=2e-6
    )
    torch.testing.assert_close(
        outputs.entropy[counted].double(), entropy[counted], rtol=1e-5, atol=1e-5
    )
    _, metrics = dl_norm.policy_loss(
        outputs.log_probs, *case.args()[1:], **case.tensors, **options, return_metrics=True,
        impl="torch",
    )  # fmt: skip
    for name, value in metrics.summary().items():
        torch.testing.assert_close(
            outputs.metrics.summary()[name], value, rtol=2e-5, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ULP, ids=str)
def test_log_probs_are_never_above_zero(make_case, impl, dtype):
    case = make_case(64, (4, 4), dtype)
    case.mask[:] = True
    case.logits.scatter_add_(
        -1, case.token_ids[..., None],
        torch.logspace(-2, 4, 16).to(case.logits).view(4, 4, 1),
    )  # fmt: skip
    _, grad, outputs = run(case, impl, entropy=True)
    assert (outputs.log_probs <= 0).all() and (outputs.log_probs[-1, -1] == 0).all()
    assert (outputs.entropy >= -1e-6).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("banned", [float("-inf"), torch.finfo(torch.float32).min])
def test_banned_words(make_case, impl, banned):
    """Words at -inf have probability 0: no NaN in the loss, the gradient or the entropy."""
    case = make_case(1003)
    keep = torch.zeros(1003, dtype=torch.bool, device=case.logits.device)
    keep[::50] = True
    case.token_ids = case.token_ids // 50 * 50
    compact = dataclasses.replace(
        case, logits=case.logits[..., keep].contiguous(), token_ids=case.token_ids // 50
    )
    case.logits[..., ~keep] = banned
    loss, grad, outputs = run(case, impl, entropy=True)
    small_loss, small_grad, small = run(compact, impl, entropy=True)
    torch.testing.assert_close(loss, small_loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad[..., keep], small_grad, rtol=1e-5, atol=1e-10)
    assert not grad[..., ~keep].any()
    torch.testing.assert_close(outputs.entropy, small.entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_tiny_weights_do_not_underflow_in_float16(make_case, impl):
    case = make_case(37, dtype=torch.float16)
    case.weights *= 1e-5  # 1e-9: below the smallest float16 number, 6e-8
    upstream = 2.0**30
    assert_close(run(case, impl, upstream=upstream), truth(case, upstream=upstream), torch.float16)


@pytest.mark.parametrize("vocabulary", [7, 777, 1000])
def test_no_invalid_arithmetic(make_case, vocabulary):
    """Not even in lanes that hold no logit. (Those lanes overflow to -inf, to have exp 0: they
    start at the lowest float32. It is what the interpreter's RuntimeWarnings are about.)"""
    case = make_case(vocabulary, ref=True)
    case.logits[..., ::3] = float("-inf")
    case.token_ids = case.token_ids % (vocabulary // 3 * 3) // 3 * 3 + 1
    with numpy.errstate(invalid="raise", divide="raise"):
        loss, grad, _ = run(case, "triton", beta=0.1, entropy=True, return_metrics=True)
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_slices_of_a_batch_add_up(make_case, impl):
    case = make_case(37, (4, 6))
    loss, grad = run(case, impl)
    parts = [
        run(
            Case(case.logits[s], case.token_ids[s], case.old[s], case.advantages[s], case.mask[s],
                 case.weights[s], {}),
            impl,
        )
        for s in (slice(0, 1), slice(1, 4))
    ]  # fmt: skip
    torch.testing.assert_close(loss, parts[0][0] + parts[1][0], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(grad, torch.cat([part[1] for part in parts]), rtol=2e-6, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_same_bits_every_run(make_case, impl):
    case = make_case(1003)
    first, second = run(case, impl, entropy=True), run(case, impl, entropy=True)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(first[2].log_probs, second[2].log_probs)
    assert torch.equal(first[2].entropy, second[2].entropy)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batches(device, impl, shape):
    logits = torch.zeros(*shape, 7, device=device, requires_grad=True)
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    per_sequence = torch.ones(shape[0], device=device)
    loss, outputs = logits_policy_loss(
        logits, ids, ids.float(), per_sequence, ids, per_sequence, impl=impl, return_metrics=True
    )
    loss.backward()
    assert loss == 0 and logits.grad.shape == logits.shape
    assert outputs.metrics.tokens == 0


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_offsets_beyond_32_bits(device, impl):
    """Two rows 2^31 + 5 elements apart. Only the touched pages of the buffer become memory."""
    apart, vocabulary = 2**31 + 5, 11
    try:
        storage = torch.empty(apart + vocabulary, dtype=torch.bfloat16, device=device)
    except RuntimeError:
        pytest.skip("4.3 GB of address space not available")
    logits = storage.as_strided((2, vocabulary), (apart, 1))
    logits.copy_(torch.randn(2, vocabulary))
    ids = torch.tensor([3, 8], device=device)
    with torch.no_grad():
        _, outputs = logits_policy_loss(
            logits, ids, None, torch.ones(2, device=device), None, torch.ones(2, device=device),
            cu_seqlens=torch.tensor([0, 1, 2], device=device), impl=impl, return_log_probs=True,
        )  # fmt: skip
    expected = logits.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(outputs.log_probs.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_second_backward_is_refused(make_case, impl):
    case = make_case(7)
    logits = case.logits.requires_grad_()
    loss = logits_policy_loss(logits, *case.args(), impl=impl)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize(
    "change, error, match",
    [
        (lambda c: {"logits": c.logits.double()}, TypeError, "float32, bfloat16 or float16"),
        (lambda c: {"logits": c.logits[0, 0]}, ValueError, "packed"),
        (lambda c: {"token_ids": c.token_ids.float()}, TypeError, "int64 or int32"),
        (lambda c: {"token_ids": c.token_ids[:, 1:]}, ValueError, "token_ids must be"),
        (lambda c: {"token_ids": c.token_ids + 7}, ValueError, r"\[0, V = 7\)"),
        (lambda c: {"temperature": 0.0}, ValueError, "temperature > 0"),
        (lambda c: {"temperature": "1"}, TypeError, "must be a number"),
        (lambda c: {"beta": 0.1}, ValueError, "ref_log_probs"),
        (lambda c: {"impl": "cuda"}, ValueError, "impl must be"),
        (lambda c: {"eps_low": 2.0}, ValueError, "eps_low"),
    ],
)
def test_what_cannot_be_honoured_is_refused(make_case, change, error, match):
    case = make_case(7)
    arguments = {"logits": case.logits, "token_ids": case.token_ids, **change(case)}
    if arguments["token_ids"].device.type != "cpu" and "V = 7" in match:
        pytest.skip("values are not read on a GPU")
    with pytest.raises(error, match=match):
        logits_policy_loss(
            arguments.pop("logits"), arguments.pop("token_ids"), *case.args()[1:], **arguments
        )


def test_a_token_outside_the_vocabulary_makes_the_triton_loss_nan(make_case, as_on_a_gpu):
    """Where its value is not looked at before the launch."""
    case = make_case(7)
    case.token_ids[0, 0] = 7
    assert run(case, "triton")[0].isnan()
    case.token_ids[0, 0] = -1
    assert run(case, "triton")[0].isnan()


def test_offsets_that_do_not_span_the_stream_make_the_loss_nan(make_case, as_on_a_gpu):
    case = make_case(7, packed=True)
    case.tensors["cu_seqlens"] = case.tensors["cu_seqlens"] - 1
    for impl in IMPLEMENTATIONS:
        assert run(case, impl)[0].isnan()
