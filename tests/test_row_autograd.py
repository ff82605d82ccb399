"""The losses over logits and hidden states inside autograd, autocast and torch.compile."""

from __future__ import annotations

import pytest
import torch

import dl_norm
from dl_norm._options import make_token_loss
from dl_norm._rows import autograd as row_autograd
from dl_norm._rows.chunks import ChunkOptions
from dl_norm._rows.records import RowSettings, TokenRows, VocabShard

# Lanes of no logit: see test_no_invalid_arithmetic in test_logits.py.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
IMPLEMENTATIONS = ("triton", "torch")
ENTRIES = ("logits", "linear")
SIZE, VOCABULARY = 8, 21


@pytest.fixture
def make(device):
    """(hidden, head, bias) leaves, and the other tensors by name."""

    def make(tokens=4, dtype=torch.float32, seed=0):
        random = torch.Generator().manual_seed(seed)
        shape = (2, tokens)
        leaves = [
            torch.randn(*size, generator=random).to(device, dtype).requires_grad_()
            for size in ((*shape, SIZE), (VOCABULARY, SIZE), (VOCABULARY,))
        ]
        mask = torch.rand(shape, generator=random) < 0.8
        mask[0, 0] = True
        given = {
            "token_ids": torch.randint(VOCABULARY, shape, generator=random),
            "old_log_probs": -4 + 0.3 * torch.randn(shape, generator=random),
            "advantages": torch.randn(2, generator=random),
            "mask": mask,
            "weights": torch.rand(2, generator=random) + 0.1,
        }
        return leaves, {name: tensor.to(device) for name, tensor in given.items()}

    return make


def call(entry, hidden, head, bias, given, **options):
    if entry == "logits":
        logits = torch.nn.functional.linear(hidden, head, bias)
        return dl_norm.logits_policy_loss(logits, **given, **options)
    return dl_norm.linear_policy_loss(hidden, head, **given, bias=bias, **options)


# -- backward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_second_derivatives_are_refused(entry, impl, make):
    leaves, given = make()
    loss = call(entry, *leaves, given, impl=impl)
    with pytest.raises(RuntimeError, match=f"{entry}_policy_loss has no second derivative"):
        torch.autograd.grad(loss, leaves, create_graph=True)
    # The refusal has spent nothing.
    assert all(grad.any() for grad in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_second_backwards_are_refused(entry, impl, make):
    """Also where the first had an upstream gradient of 1, which scales nothing."""
    leaves, given = make()
    for upstream in (1.0, 0.5):
        loss = call(entry, *leaves, given, impl=impl) * upstream
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=f"{entry}_policy_loss: backward ran a second time"):
            loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    loss = call(entry, *leaves, given, impl=impl)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_losses_added_before_one_backward(entry, impl, make):
    """What the refusal of a second backward advises."""
    leaves, given = make()
    once = torch.autograd.grad(call(entry, *leaves, given, impl=impl), leaves)
    losses = [call(entry, *leaves, given, impl=impl) for _ in range(2)]
    twice = torch.autograd.grad(losses[0] + 2 * losses[1], leaves)
    for ours, single in zip(twice, once, strict=True):
        torch.testing.assert_close(ours, 3 * single, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_without_gradients(entry, impl, make):
    leaves, given = make()
    expected = call(entry, *leaves, given, impl=impl)
    with torch.no_grad():
        loss = call(entry, *leaves, given, impl=impl)
    with torch.inference_mode():
        inferred = call(entry, *leaves, given, impl=impl)
    assert not loss.requires_grad
    assert torch.equal(loss, expected.detach()) and torch.equal(inferred, loss)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("upstream", [1.0, 0.375])
def test_in_place_the_logits_are_the_gradient(dtype, impl, upstream, make):
    """Also where backward has to scale, and in float16, where it undoes a scale of its own."""
    (hidden, head, _), given = make(dtype=dtype)
    logits = hidden @ head.T
    given["weights"] = given["weights"] * 1e-3
    seen = []
    logits.register_hook(lambda grad: seen.append((grad.data_ptr(), grad.clone())))
    before = logits.data_ptr()
    dl_norm.logits_policy_loss(logits, **given, impl=impl, in_place=True).backward(
        torch.tensor(upstream, device=logits.device)
    )
    ((address, grad),) = seen
    assert address == before == logits.data_ptr()
    assert torch.equal(logits, grad) and grad.any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_in_place_whoever_kept_the_logits_is_told(impl, make):
    """Another loss that saved them raises in its backward; one that did not is right."""
    (hidden, head, _), given = make()
    logits = hidden @ head.T
    other = logits.square().sum()
    loss = dl_norm.logits_policy_loss(logits, **given, impl=impl, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()
    logits = hidden @ head.T
    other = logits.sum()  # needs only the shape
    loss = dl_norm.logits_policy_loss(logits, **given, impl=impl, in_place=True)
    (got,) = torch.autograd.grad(loss + other, hidden)
    logits = hidden @ head.T
    loss = dl_norm.logits_policy_loss(logits, **given, impl=impl)
    (expected,) = torch.autograd.grad(loss + logits.sum(), hidden)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# -- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_under_autocast_are_as_without(dtype, impl, make):
    (hidden, head, _), given = make(dtype=dtype)
    logits = (hidden @ head.T).detach().requires_grad_()
    options = {"impl": impl, "entropy": True, "return_metrics": True}
    results = []
    for enabled in (False, True):
        with torch.autocast(logits.device.type, torch.bfloat16, enabled=enabled):
            loss, outputs = dl_norm.logits_policy_loss(logits, **given, **options)
        (grad,) = torch.autograd.grad(loss, logits)
        metrics = outputs.metrics.summary().values()
        results.append([loss, grad, outputs.log_probs, outputs.entropy, *metrics])
    assert results[0][1].dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("chunk_size", [3, None])
@pytest.mark.parametrize("fp32_logits", [False, True])
def test_hidden_states_under_autocast_are_cast_and_no_more(fp32_logits, chunk_size, impl, make):
    """The bits of casting first: the products' float32 sums and logits stay float32."""
    leaves, given = make()
    options = {"impl": impl, "chunk_size": chunk_size, "fp32_logits": fp32_logits}
    with torch.autocast(leaves[0].device.type, torch.bfloat16):
        loss = call("linear", *leaves, given, **options)
    got = torch.autograd.grad(loss, leaves)
    cast = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    expected_loss = call("linear", *cast, given, **options)
    expected = torch.autograd.grad(expected_loss, cast)
    assert torch.equal(loss, expected_loss)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("fp32_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_log_probs_under_autocast(dtype, fp32_logits, impl, make):
    """From hidden states the bits of casting first, from logits those without autocast."""
    leaves, given = make(dtype=dtype)
    hidden, head, bias = (leaf.detach() for leaf in leaves)
    ids, mask = given["token_ids"], given["mask"]

    def results(hidden, head, bias):
        options = {"mask": mask, "entropy": True, "impl": impl}
        logits = torch.nn.functional.linear(hidden, head, bias).to(dtype)
        return (
            *dl_norm.token_log_probs(
                hidden, ids, head, bias=bias, chunk_size=3, fp32_logits=fp32_logits, **options
            ),
            *dl_norm.token_log_probs(logits, ids, **options),
        )

    cast = hidden.bfloat16(), head.bfloat16(), bias.bfloat16()
    expected = results(*cast)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        got = results(hidden, head, bias)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_on_policy_under_autocast_the_ratio_is_one(impl, make):
    leaves, given = make()
    with torch.autocast(leaves[0].device.type, torch.bfloat16):
        given["old_log_probs"] = dl_norm.token_log_probs(
            leaves[0], given["token_ids"], leaves[1], bias=leaves[2], mask=given["mask"], impl=impl
        )
        _, outputs = call("linear", *leaves, given, impl=impl, return_metrics=True)
    assert outputs.metrics.summary()["ratio_max"] == 1
    assert torch.equal(outputs.log_probs, given["old_log_probs"])


# -- torch.compile -------------------------------------------------------------------------------


def step(impl, **options):
    """All three entries in one function."""

    def function(hidden, head, bias, given):
        log_probs, entropy = dl_norm.token_log_probs(
            hidden.detach(), given["token_ids"], head, bias=bias, mask=given["mask"],
            entropy=True, impl=impl,
        )  # fmt: skip
        options_of_both = {"impl": impl, "entropy": True, "return_metrics": True, **options}
        one, outputs = call("linear", hidden * 2, head, bias, given, **options_of_both)
        two, others = call("logits", hidden, head, bias, given, **options_of_both)
        seen = [log_probs, entropy]
        for part in (outputs, others):
            seen += [part.log_probs, part.entropy, part.metrics.ratio, part.metrics.clipped_low]
        return 2 * one + two, seen

    return function


def assert_same(function, compiled, leaves, given):
    loss, seen = function(*leaves, given)
    got_loss, got_seen = compiled(*leaves, given)
    grads = torch.autograd.grad(loss, leaves)
    got_grads = torch.autograd.grad(got_loss, leaves)
    for got, expected in zip((got_loss, *got_seen, *got_grads), (loss, *seen, *grads), strict=True):
        assert got.dtype == expected.dtype
        # The same operators on the same numbers, but sums of gradients may be in another order,
        # and 16-bit products of hidden states rounded once or twice.
        tolerance = 2e-6 if got.dtype == torch.float32 else 2 * torch.finfo(got.dtype).eps
        scale = expected.detach().abs().max().item()
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(
    "impl, dtype",
    [
        ("triton", torch.float16),
        *(("torch", d) for d in (torch.float32, torch.bfloat16, torch.float16)),
    ],
)
def test_compiled_in_one_graph(dtype, impl, make):
    torch._dynamo.reset()
    leaves, given = make(dtype=dtype)
    function = step(impl, surrogate="cispo", temperature=0.9)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(function, compiled, leaves, given)


@pytest.mark.parametrize("dynamic", [True, None])
def test_other_sizes_do_not_compile_again(dynamic, make):
    """The first T is compiled, and without dynamic=True the second once more; no other is."""
    torch._dynamo.reset()
    function = step("torch")
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    warm_up = 1 if dynamic else 2
    sizes = (4, 5, 6, 9)
    for tokens in sizes[:warm_up]:
        compiled(*make(tokens)[0], make(tokens)[1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in sizes[warm_up:]:
            assert_same(function, compiled, *make(tokens, seed=tokens))


@pytest.mark.parametrize("entry", ENTRIES)
def test_compiled_a_second_backward_is_right(entry, make):
    """There nothing is scaled in place."""
    torch._dynamo.reset()
    leaves, given = make()
    expected = torch.autograd.grad(2 * call(entry, *leaves, given), leaves)

    def function(*leaves):
        return 2 * call(entry, *leaves, given)

    loss = torch.compile(function, backend="aot_eager", fullgraph=True)(*leaves)
    for _ in range(2):
        got = torch.autograd.grad(loss, leaves, retain_graph=True)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)


def test_compiled_in_place_is_refused(make):
    torch._dynamo.reset()
    (hidden, head, _), given = make()

    def function(hidden, head):
        return dl_norm.logits_policy_loss(hidden @ head.T, **given, in_place=True)

    with pytest.raises(Exception, match="in_place=True is not available under"):
        torch.compile(function, backend="aot_eager", fullgraph=True)(hidden, head)


# Every test of torch.library.opcheck: schema (nothing is written to, no output is an input),
# autograd registration, fake outputs, and AOT dispatch with symbolic sizes.
TERMS = make_token_loss(dual_clip=3.0, beta=0.1)
SETTINGS = RowSettings(0.8, None, TERMS, True, True, True)
CAPPED = RowSettings(1.0, 5.0, TERMS)
PLAIN = RowSettings(terms=TERMS)


def opcheck(operator, *records):
    torch.library.opcheck(operator.op, tuple(operator.arguments(*records)))


def rows_of(given, ref=True):
    tokens = given["token_ids"].numel()
    per_token = given["token_ids"].shape[1]
    old = given["old_log_probs"].flatten()
    return TokenRows(
        given["token_ids"].flatten(), given["mask"].flatten(),
        given["advantages"].repeat_interleave(per_token),
        given["weights"].repeat_interleave(per_token), old, old + 0.1 if ref else None,
        torch.ones(tokens, device=old.device),
        entropy_weights=torch.full((tokens,), 0.1, device=old.device) if ref else None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "impl, dtype",
    [
        ("triton", torch.float16),
        *(("torch", d) for d in (torch.float32, torch.bfloat16, torch.float16)),
    ],
)
def test_opcheck_logits(dtype, impl, make):
    (hidden, head, _), given = make(dtype=dtype)
    logits = (hidden @ head.T).detach()
    shifted = torch.cat([logits, logits[:, :1]], 1)[:, :-1]
    assert not shifted.is_contiguous()
    for tensor, settings, write_grad in (
        (logits, SETTINGS, True),
        (shifted, CAPPED, True),
        (logits, PLAIN, False),
    ):
        opcheck(row_autograd.logits_op, tensor, rows_of(given), settings, impl, write_grad)


@pytest.mark.parametrize(
    "impl, dtype",
    [
        ("triton", torch.float16),
        *(("torch", d) for d in (torch.float32, torch.bfloat16, torch.float16)),
    ],
)
def test_opcheck_linear(dtype, impl, make):
    leaves, given = make(dtype=dtype)
    hidden, head, bias = (leaf.detach() for leaf in leaves)
    for bias_or_none, chunks, settings, needed in (
        (bias, ChunkOptions(3), SETTINGS, (True, True, True)),
        (None, ChunkOptions(fp32_logits=True), CAPPED, (True, False, False)),
        (bias, ChunkOptions(), PLAIN, (False, False, False)),
    ):
        opcheck(
            row_autograd.linear_op, hidden, head, bias_or_none, rows_of(given), settings, chunks,
            None, impl, needed,
        )  # fmt: skip


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck_token_log_probs(impl, make):
    leaves, given = make()
    hidden, head, bias = (leaf.detach() for leaf in leaves)
    ids, active = given["token_ids"].flatten(), given["mask"].flatten()
    for tensors, entropy, chunks in (
        ((hidden, head, bias), True, ChunkOptions(3)),
        ((hidden, head, None), False, ChunkOptions()),
        ((hidden @ head.T, None, None), True, ChunkOptions()),
    ):
        opcheck(
            row_autograd.log_probs_op, *tensors, ids, active, 0.8, None, entropy, not entropy,
            VocabShard(), chunks, None, impl,
        )  # fmt: skip
