"""Backward and its limits; the ways to call a loss: no_grad, autocast, torch.compile, modules."""

from __future__ import annotations

import math

import pytest
import torch

import dl_norm
from dl_norm._log_probs import autograd, closed_form, launch
from dl_norm._options import make_token_loss

IMPLEMENTATIONS = ("triton", "torch")


def leaf_and_loss(impl: str, batch, **options):
    log_probs = batch.log_probs.detach().clone().requires_grad_()
    loss = dl_norm.policy_loss(log_probs, *batch.args()[1:], **batch.kwargs(), impl=impl, **options)
    return log_probs, loss


# -- scale ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1.0, 0.0, -1.0, 0.3, -12345.6, 2.0**20])
def test_backward_scales_by_grad_output(scale, impl, make_batch, run_loss):
    batch = make_batch([30, 0, 5], holes=True)
    unscaled = run_loss(impl, batch).grad
    assert unscaled.abs().max() > 0
    log_probs, loss = leaf_and_loss(impl, batch)
    loss.backward(torch.tensor(scale, device=loss.device))
    # One fp32 product by token.
    assert torch.equal(log_probs.grad, unscaled * scale)
    log_probs, loss = leaf_and_loss(impl, batch)
    (loss * scale).backward()
    assert torch.equal(log_probs.grad, unscaled * scale)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_bad_scale_is_not_hidden(scale, impl, make_batch):
    """A gradient scaler looks for exactly these."""
    log_probs, loss = leaf_and_loss(impl, make_batch([3]))
    loss.backward(torch.tensor(scale, device=loss.device))
    assert not log_probs.grad.isfinite().any()


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
def test_float16_gradients_do_not_underflow(impl, make_batch, run_loss):
    """Weights near 1e-9, as of a large batch: in fp16 the gradient is 0, times 65536 (the first
    scale of torch.amp.GradScaler, itself not an fp16 number) it is not."""
    scale = 65536.0
    batch = make_batch([30, 0, 5], dtype=torch.float16)
    batch = batch.replace(weights=batch.weights * (2e-9 / batch.weights.amax()))
    wide = run_loss("reference", batch.map(torch.Tensor.double), upstream=scale).grad
    got = run_loss(impl, batch, upstream=scale).grad
    assert got.dtype == torch.float16
    # One rounding to fp16, in or below its normal range.
    torch.testing.assert_close(got.double(), wide, rtol=2.0**-11 + 2e-6, atol=2.0**-25)
    assert (got[wide.abs() > 1e-6] != 0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_float16_scale_beyond_its_range(impl, make_batch, run_loss):
    """A scale that fp16 cannot hold times a gradient small enough is a number, not inf."""
    batch = make_batch([3, 5], dtype=torch.float16)
    batch = batch.replace(weights=batch.weights * (1e-6 / batch.weights.amax()))
    got = run_loss(impl, batch, upstream=2.0**20).grad
    wide = run_loss("reference", batch.map(torch.Tensor.double), upstream=2.0**20).grad
    torch.testing.assert_close(got.double(), wide, rtol=2.0**-11 + 2e-6, atol=2.0**-25)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_accumulate(dtype, impl, make_batch):
    """The second micro-batch adds to the leaf's gradient and does not write over it."""
    batch = make_batch([30, 5], dtype=dtype)
    log_probs = batch.log_probs.detach().clone().requires_grad_()
    single = []
    for rows in (slice(0, 1), slice(1, 2), slice(0, 2)):
        part = batch.rows(rows)
        loss = dl_norm.policy_loss(log_probs[rows], *part.args()[1:], impl=impl)
        (grad,) = torch.autograd.grad(loss, log_probs, retain_graph=False)
        single.append(grad)
        dl_norm.policy_loss(log_probs[rows], *part.args()[1:], impl=impl).backward()
    assert torch.equal(log_probs.grad, single[0] + single[1] + single[2])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_two_losses_in_one_backward(impl, make_batch, run_loss):
    batch = make_batch([30, 5])
    unscaled = run_loss(impl, batch).grad
    log_probs = batch.log_probs.detach().clone().requires_grad_()
    losses = [dl_norm.policy_loss(log_probs, *batch.args()[1:], impl=impl) for _ in range(2)]
    (2 * losses[0] - 0.5 * losses[1]).backward()
    torch.testing.assert_close(log_probs.grad, 1.5 * unscaled, rtol=1e-6, atol=0)


# -- twice ---------------------------------------------------------------------------------------


def test_second_backward_of_torch_is_right(make_batch, run_loss):
    batch = make_batch([30, 0, 5])
    unscaled = run_loss("torch", batch).grad
    log_probs, loss = leaf_and_loss("torch", batch)
    for scale in (3.0, 1.0, -0.5):
        (grad,) = torch.autograd.grad(
            loss, log_probs, torch.full_like(loss, scale), retain_graph=True
        )
        assert torch.equal(grad, unscaled * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_second_backward_of_triton_is_refused(scale, dtype, make_batch):
    """In words that say what to do, and without touching what the first one gave."""
    log_probs, loss = leaf_and_loss("triton", make_batch([30, 0, 5], dtype=dtype))
    (loss * scale).backward(retain_graph=True)
    first = log_probs.grad.clone()
    with pytest.raises(
        RuntimeError, match=r'ran a second time.*Call policy_loss again.*impl="torch"'
    ):
        (loss * scale).backward()
    assert torch.equal(log_probs.grad, first)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_backward_without_retain_graph_twice_is_pytorchs_error(impl, make_batch):
    _, loss = leaf_and_loss(impl, make_batch([3]))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_second_derivative_is_refused(impl, make_batch):
    """Through grad_output, whose derivative exists, or not: an error that says so, never a
    gradient penalty that is silently constant."""
    batch = make_batch([30, 0, 5])
    words = r"differentiate twice|second derivative"
    log_probs, loss = leaf_and_loss(impl, batch)
    upstream = torch.ones_like(loss, requires_grad=True)
    with pytest.raises(RuntimeError, match=words):
        (grad,) = torch.autograd.grad(loss, log_probs, upstream, create_graph=True)
        grad.square().sum().backward()

    log_probs, loss = leaf_and_loss(impl, batch)
    with pytest.raises(RuntimeError, match=words):
        (grad,) = torch.autograd.grad(loss, log_probs, create_graph=True)
        grad.square().sum().backward()

    # The penalty reaches the logits through log_softmax too, which would hide the missing part.
    logits = torch.randn(*batch.log_probs.shape, 7, device=batch.log_probs.device)
    logits.requires_grad_()
    loss = dl_norm.policy_loss(logits.log_softmax(-1)[..., 0], *batch.args()[1:], impl=impl)
    with pytest.raises(RuntimeError, match=words):
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        grad.square().sum().backward()


# -- what needs a gradient -----------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("why", ["no_grad", "inference_mode", "no_requires_grad"])
def test_no_gradient_is_written_when_none_is_needed(why, impl, make_batch, run_loss, monkeypatch):
    """Neither computed nor allocated: the forward alone reads."""
    batch = make_batch([30, 1100, 5], holes=True)
    expected = run_loss(impl, batch).loss
    module = launch if impl == "triton" else closed_form
    forward, grads = module.policy_loss_fwd, []

    def spy(*args):
        outputs = forward(*args)
        grads.append(outputs[1])
        return outputs

    monkeypatch.setattr(module, "policy_loss_fwd", spy)
    if why == "no_requires_grad":
        loss = dl_norm.policy_loss(*batch.args(), impl=impl)
    else:
        log_probs = batch.log_probs.detach().clone().requires_grad_()
        with getattr(torch, why)():
            loss = dl_norm.policy_loss(log_probs, *batch.args()[1:], impl=impl)
    assert not loss.requires_grad
    assert [grad.numel() for grad in grads] == [0]
    assert torch.equal(loss, expected)

    leaf_and_loss(impl, batch)
    assert grads[1].numel() == batch.log_probs.numel()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_constants_get_no_gradient(impl, make_batch):
    """Under no_grad a constant may require grad: it is a constant there anyway."""
    batch = make_batch([6, 3], ref=True, rollout="token")
    with torch.no_grad():
        constants = [None if t is None else t.clone() for t in batch.args()[1:]]
        constants[0].requires_grad_()
        dl_norm.policy_loss(batch.log_probs, *constants, impl=impl)
    log_probs, loss = leaf_and_loss(impl, batch, beta=0.1)
    loss.backward()
    assert log_probs.grad is not None
    assert all(tensor.grad is None for tensor in batch.args() if tensor is not None)
    reached = [function for function, _ in loss.grad_fn.next_functions if function is not None]
    assert len(reached) == 1  # log_probs alone


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_through_log_softmax(layout, impl, make_batch):
    """log_probs are not a leaf in a trainer: gradients reach the logits, as the reference's do."""
    batch = make_batch([6, 0, 9], layout=layout, holes=True)
    shape = (*batch.log_probs.shape, 11)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    logits = logits.to(batch.log_probs.device).requires_grad_()
    tokens = torch.zeros(batch.log_probs.shape, dtype=torch.int64, device=logits.device)

    def grad_of(function, **choice):
        log_probs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        loss = function(log_probs, *batch.args()[1:], **batch.kwargs(), **choice)
        return torch.autograd.grad(loss, logits)[0]

    got = grad_of(dl_norm.policy_loss, impl=impl)
    expected = grad_of(dl_norm.reference.policy_loss)
    # Both end in the same softmax derivative: a few roundings of the largest entry.
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6 * expected.abs().amax().item())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_changes_nothing(impl, make_batch, run_loss):
    """The arithmetic stays float32 and the gradient keeps the dtype of the log-probs."""
    for dtype in (torch.float32, torch.bfloat16):
        batch = make_batch([30, 0, 5], dtype=dtype, holes=True, ref=True)
        expected = run_loss(impl, batch, beta=0.1)
        with torch.autocast(batch.log_probs.device.type, dtype=torch.bfloat16):
            log_probs, loss = leaf_and_loss(impl, batch, beta=0.1)
        loss.backward()
        assert loss.dtype == torch.float32 and log_probs.grad.dtype == dtype
        assert torch.equal(loss.detach(), expected.loss)
        assert torch.equal(log_probs.grad, expected.grad)


def test_autocast_training_step(make_batch):
    """A linear layer run in bf16 under autocast, its parameters in float32."""
    batch = make_batch([6, 9])
    device = batch.log_probs.device
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 5).to(device)
    hidden = torch.randn(*batch.log_probs.shape, 4, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        log_probs = layer(hidden).log_softmax(-1)[..., 0]
        loss = dl_norm.policy_loss(log_probs, *batch.args()[1:])
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.abs().max() > 0


# -- torch.compile and the custom operator -------------------------------------------------------


def compiled_and_eager(impl, backend, batch, **options):
    def step(log_probs, constants, extra):
        loss, metrics = dl_norm.policy_loss(
            log_probs, *constants, **extra, impl=impl, return_metrics=True, **options
        )
        return 2 * loss, metrics.summary()["ratio_mean"]

    results = []
    torch._dynamo.reset()
    for function in (torch.compile(step, backend=backend, fullgraph=True), step):
        log_probs = batch.log_probs.detach().clone().requires_grad_()
        loss, ratio = function(log_probs, batch.args()[1:], batch.kwargs())
        loss.backward()
        results.append((loss.detach(), ratio, log_probs.grad))
    return results


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("layout", "kind", "options"),
    [
        ("padded", {}, {}),
        ("padded", {"ref": True, "rollout": "token"}, {"beta": 0.1, "dual_clip": 1.5}),
        ("padded", {"old": False, "advantages": "token"}, {"delta": 1.5}),
        ("packed", {}, {"log_ratio_clamp": None}),
        ("packed_mask", {"dtype": torch.float16}, {}),
        ("padded", {"dtype": torch.bfloat16}, {}),
    ],
)
def test_compiles_in_one_graph(layout, kind, options, impl, make_batch):
    batch = make_batch([30, 0, 5], layout=layout, holes=layout != "packed", **kind)
    compiled, eager = compiled_and_eager(impl, "aot_eager", batch, **options)
    for got, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiles_with_inductor(impl, make_batch):
    batch = make_batch([30, 0, 5], holes=True, ref=True)
    compiled, eager = compiled_and_eager(impl, "inductor", batch, beta=0.1)
    # Inductor may reorder the sums and contract products: a few roundings.
    for got, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=2e-6, atol=2e-6 * expected.abs().amax().item()
        )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiled_once_for_all_widths(impl, make_batch):
    """With dynamic shapes: one graph for T and B as they come, and each result right."""
    graphs = 0

    def backend(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph

    def step(log_probs, *constants):
        return dl_norm.policy_loss(log_probs, *constants, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for lengths in ([30, 4, 5], [29, 3], [7, 7, 7, 7, 2]):
        batch = make_batch(lengths)
        grads = []
        for function in (compiled, step):
            log_probs = batch.log_probs.detach().clone().requires_grad_()
            function(log_probs, *batch.args()[1:]).backward()
            grads.append(log_probs.grad)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=0)
    assert graphs == 1


def test_weights_and_loss_compile_together(make_batch):
    batch = make_batch([30, 0, 5], holes=True)

    def step(log_probs, old_log_probs, advantages, mask):
        return dl_norm.delta_l_loss(
            log_probs, old_log_probs, advantages, mask, alpha=0.75, max_length=64
        )

    torch._dynamo.reset()
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(*batch.args()[:4])
    torch.testing.assert_close(got, step(*batch.args()[:4]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed_mask"])
def test_opcheck(layout, dtype, make_batch):
    """Schema, fake outputs and AOT dispatch of the operator that torch.compile sees."""
    batch = make_batch([5, 0, 9], 11, layout=layout, holes=True, dtype=dtype, ref=True)
    terms = make_token_loss(eps_high=0.28, dual_clip=3.0, beta=0.1)
    for write_grad, metrics in ((True, True), (False, False), (True, False)):
        records = dl_norm._batch.make_batch(**vars(batch))
        operator = autograd.policy_loss_op
        args = operator.arguments(records, terms, write_grad, metrics)
        torch.library.opcheck(operator.op, tuple(args))


# -- the other ways in ---------------------------------------------------------------------------


@pytest.mark.parametrize("impl", [None, *IMPLEMENTATIONS])
@pytest.mark.parametrize("layout", ["padded", "packed", "packed_mask"])
def test_delta_l_loss_is_the_two_steps(layout, impl, make_batch):
    batch = make_batch([6, 0, 9, 1], layout=layout, holes=True, ref=True, rollout="sequence")
    options = {"eps_high": 0.28, "dual_clip": 1.4, "beta": 0.1}
    lengths = dl_norm.sequence_lengths(batch.mask, batch.cu_seqlens)
    weights = dl_norm.sequence_weights(lengths, alpha=0.75, max_length=100)

    def run(function):
        log_probs = batch.log_probs.detach().clone().requires_grad_()
        loss = function(log_probs, *batch.args()[1:4])
        loss.backward()
        return loss.detach(), log_probs.grad

    two_steps = run(
        lambda *args: dl_norm.policy_loss(*args, weights, **batch.kwargs(), impl=impl, **options)
    )
    one_step = run(
        lambda *args: dl_norm.delta_l_loss(
            *args, alpha=0.75, max_length=100, **batch.kwargs(), impl=impl, **options
        )
    )
    module = dl_norm.DeltaLLoss(alpha=0.75, max_length=100, impl=impl, **options)
    as_module = run(lambda *args: module(*args, **batch.kwargs()))
    for result in (one_step, as_module):
        assert torch.equal(result[0], two_steps[0])
        assert torch.equal(result[1], two_steps[1])


def test_module_passes_every_setting_on(make_batch):
    """Each setting away from its default changes the module's loss as it changes the function's."""
    batch = make_batch([30, 25], ref=True)
    base = {"alpha": 1.0, "max_length": 64}
    plain = dl_norm.DeltaLLoss(**base)(*batch.args()[:4])
    for change in (
        {"alpha": 0.5}, {"max_length": 8}, {"eps_low": 0.01}, {"eps_high": 0.01},
        {"dual_clip": 1.05}, {"delta": 1.05}, {"log_ratio_clamp": 0.01}, {"beta": 0.5},
    ):  # fmt: skip
        settings = {**base, **change}
        module = dl_norm.DeltaLLoss(**settings)
        got = module(*batch.args()[:4], ref_log_probs=batch.ref_log_probs)
        expected = dl_norm.delta_l_loss(
            *batch.args()[:4], ref_log_probs=batch.ref_log_probs, **settings
        )
        assert torch.equal(got, expected), change
        assert not torch.equal(got, plain), change
        name, value = next(iter(change.items()))
        assert f"{name}={value}" in repr(module)
    loss, metrics = dl_norm.DeltaLLoss(**base, return_metrics=True)(*batch.args()[:4])
    assert torch.equal(loss, plain) and metrics.tokens.item() == 55


def test_module_has_no_parameters_and_is_picklable():
    import pickle

    module = dl_norm.DeltaLLoss(alpha=0.75, max_length=64, dual_clip=3.0)
    assert not list(module.parameters()) and not module.state_dict()
    assert pickle.loads(pickle.dumps(module)).settings == module.settings


def test_default_implementation(make_batch, monkeypatch):
    """Closed form on the CPU, the kernels on a GPU."""
    batch = make_batch([3])
    on_cpu = batch.log_probs.device.type == "cpu"
    module = closed_form if on_cpu else launch
    calls = []
    forward = module.policy_loss_fwd
    monkeypatch.setattr(module, "policy_loss_fwd", lambda *args: calls.append(1) or forward(*args))
    dl_norm.policy_loss(*batch.args())
    assert calls == [1]
