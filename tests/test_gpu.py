"""What only a CUDA device can show: graphs, streams, synchronisation, recompilation, huge sizes.

The rest of the suite runs on the device too, compiled, where there is one.
"""

from __future__ import annotations

import pytest
import torch

import dl_norm
from dl_norm._log_probs import launch
from dl_norm.kernels import policy_loss as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none here"),
]

GB = 2**30
OPTIONS = {"eps_high": 0.28, "dual_clip": 3.0, "beta": 0.1}
VARIANT = {"ratio_level": "sequence", "surrogate": "sapo", "beta": 0.1, "bias_corrected_kl": True}


def needs_free_memory(gigabytes: int) -> None:
    free = torch.cuda.mem_get_info()[0] / GB
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free device memory, {free:.0f} GB are free")


def test_the_kernels_are_compiled():
    """Else this machine would have tested the interpreter."""
    assert not launch.INTERPRETED


# -- graphs and streams --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [OPTIONS, VARIANT], ids=["clip", "variant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed_mask"])
def test_cuda_graph(layout, dtype, variant, make_batch, run_loss):
    """Captured once, forward and backward; replayed over other data it gives that data's result."""
    kind = {"layout": layout, "dtype": dtype, "holes": True, "ref": True, "rollout": "token"}
    batches = [make_batch([500, 0, 1300, 17], 1300, seed=seed, **kind) for seed in range(3)]
    static = batches[0].map(torch.clone).replace(mask=batches[0].mask.clone())
    options = {**variant, "impl": "triton", "upstream": 3.0, "return_metrics": True}

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run_loss(batch=static, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_loss(batch=static, **options)
        summary = captured.metrics.summary()

    for batch in (*batches[1:], batches[0]):
        for name, tensor in vars(static).items():
            if tensor is not None:
                tensor.copy_(getattr(batch, name))
        graph.replay()
        expected = run_loss(batch=batch, **options)
        assert torch.equal(captured.loss, expected.loss)
        assert torch.equal(captured.grad, expected.grad)
        for name, value in expected.metrics.summary().items():
            assert torch.equal(summary[name], value), name


def test_two_streams(make_batch, run_loss):
    """Nothing is shared between calls in flight at once."""
    batches = [make_batch([100_000, 70_001], seed=seed, holes=True) for seed in range(2)]
    expected = [run_loss("triton", batch, **{**OPTIONS, "beta": 0.0}) for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    got = []
    for _ in range(20):
        for batch, stream in zip(batches, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(run_loss("triton", batch, **{**OPTIONS, "beta": 0.0}))
    torch.cuda.synchronize()
    for i, result in enumerate(got):
        assert torch.equal(result.loss, expected[i % 2].loss)
        assert torch.equal(result.grad, expected[i % 2].grad)


@pytest.mark.parametrize("options", [OPTIONS, VARIANT], ids=["clip", "variant"])
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("layout", ["padded", "packed", "packed_mask"])
def test_no_host_sync(layout, impl, options, make_batch):
    """Weights, loss, metrics and backward are enqueued without waiting for the device."""
    batch = make_batch([500, 0, 1300], layout=layout, ref=True, rollout="sequence")
    log_probs = batch.log_probs.detach().clone().requires_grad_()

    def step() -> None:
        lengths = dl_norm.sequence_lengths(batch.mask, batch.cu_seqlens)
        weights = dl_norm.sequence_weights(lengths, alpha=0.75, max_length=2000)
        dl_norm.reweight_advantages(batch.advantages, lengths)
        loss, metrics = dl_norm.policy_loss(
            log_probs, *batch.args()[1:4], weights, **batch.kwargs(), **options, impl=impl,
            return_metrics=True,
        )  # fmt: skip
        (metrics + metrics).summary()
        (loss * 0.5).backward()

    step()  # compiling may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_kept_sets_without_a_host_sync(impl):
    """Also those that are wrong, which make the loss NaN."""
    tokens, vocabulary = 64, 1000
    hidden = torch.randn(1, tokens, 32, device="cuda", requires_grad=True)
    head = torch.randn(vocabulary, 32, device="cuda", requires_grad=True)
    ids = torch.randint(vocabulary, (1, tokens), device="cuda")
    one, mask = torch.ones(1, device="cuda"), torch.ones_like(ids, dtype=torch.bool)
    offsets = torch.arange(tokens + 1, device="cuda") * 3
    members = (ids.flatten()[:, None] + torch.arange(3, device="cuda")) % vocabulary
    wrong = members.flatten() + 1

    def step(members) -> torch.Tensor:
        kept = dl_norm.KeptSets(members.flatten(), offsets)
        old = dl_norm.token_log_probs(hidden, ids, head, mask=mask, kept=kept, impl=impl)
        loss = dl_norm.linear_policy_loss(
            hidden, head, ids, old, one, mask, one, kept=kept, impl=impl
        )
        (loss * 0.5).backward()
        return loss

    step(members)  # compiling may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = step(members), step(wrong)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses[0].isfinite() and losses[1].isnan()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current(make_batch, run_loss):
    batch = make_batch([500, 0, 1300], holes=True)
    expected = run_loss("triton", batch)
    there = batch.map(lambda t: t.to("cuda:1")).replace(mask=batch.mask.to("cuda:1"))
    got = run_loss("triton", there)
    assert got.grad.device == torch.device("cuda:1")
    assert torch.equal(got.loss.cpu(), expected.loss.cpu())
    assert torch.equal(got.grad.cpu(), expected.grad.cpu())


# -- compilation ---------------------------------------------------------------------------------


def compiled_variants() -> int:
    device = torch.cuda.current_device()
    jitted = (
        kernels.policy_loss_fwd_kernel,
        kernels.policy_loss_reduce_kernel,
        kernels.policy_loss_bwd_kernel,
    )
    return sum(len(kernel.device_caches[device][0]) for kernel in jitted)


@pytest.mark.parametrize("layout", ["padded", "packed_mask"])
def test_no_recompiles(layout, make_batch, run_loss):
    """One compilation for every T, B, option and M, and for slices at any alignment."""

    def run(lengths, width, **options) -> None:
        batch = make_batch(lengths, width, layout=layout, max_length=width)
        run_loss("triton", batch, upstream=0.5, **options)

    run([100, 3], 100)
    before = compiled_variants()
    assert before > 0
    widths = [
        1,
        2,
        3,
        7,
        8,
        15,
        16,
        17,
        31,
        32,
        33,
        64,
        100,
        127,
        128,
        1000,
        1023,
        1024,
        1025,
        4096,
    ]
    for i, width in enumerate(widths):
        run([width] * (1 + i % 5), width, eps_low=0.1 + i / 100, eps_high=0.2 + i / 100,
            dual_clip=1.5 + i, delta=2.0 + i, log_ratio_clamp=1.0 + i)  # fmt: skip
    assert compiled_variants() == before

    batch = make_batch([13] * 9, 13)
    run_loss("triton", batch.rows(slice(1, 2)))  # a slice off any 16-byte boundary: one variant
    before = compiled_variants()
    for first in range(9):
        run_loss("triton", batch.rows(slice(first, first + 1)))
    assert compiled_variants() == before


# -- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_million_tokens(dtype, make_batch, run_loss, truth):
    batch = make_batch([1_000_000, 3, 999_999], dtype=dtype, holes=True, max_length=1_000_000)
    got, true = run_loss("triton", batch, dual_clip=3.0), truth(batch, dual_clip=3.0)
    assert abs(got.loss.item() - true.loss.item()) <= 2e-6 * true.loss_scale
    # bf16: one rounding of the result.
    budget = 2e-6 if dtype == torch.float32 else 2.0**-8
    assert (got.grad.double() - true.grad).abs().amax().item() <= budget * true.grad_scale


@pytest.mark.parametrize("strided", [False, True])
def test_more_tokens_than_an_int32_counts(strided, device):
    """B * T = 3 * 2**30: tokens on both sides of 2**31, and the last, found at their addresses."""
    needs_free_memory(40)
    rows, width = 3, 2**30
    positions = [(0, 0), (1, width - 1), (2, 0), (2, 1), (2, 12_345_678), (2, width - 1)]

    def zeros(dtype: torch.dtype) -> torch.Tensor:
        shape = (width, rows) if strided else (rows, width)
        tensor = torch.zeros(shape, dtype=dtype, device=device)
        return tensor.t() if strided else tensor

    log_probs, old_log_probs, mask = zeros(torch.bfloat16), zeros(torch.bfloat16), zeros(torch.bool)
    row, column = torch.tensor(positions, device=device).unbind(1)
    mask[row, column] = True
    old_log_probs[row, column] = torch.arange(len(positions), device=device).bfloat16() / -4
    advantages = torch.tensor([1.0, 2.0, 4.0], device=device)
    weights = torch.tensor([1.0, 0.5, 0.125], device=device)
    log_probs.requires_grad_()
    loss = dl_norm.policy_loss(
        log_probs, old_log_probs, advantages, mask, weights, eps_high=9.0, impl="triton"
    )
    (grad,) = torch.autograd.grad(loss, log_probs)
    ratio = (torch.arange(len(positions), device=device, dtype=torch.float64) / 4).exp()
    expected = -ratio * (advantages * weights)[row].double()
    assert loss.item() == pytest.approx(expected.sum().item(), rel=2e-6)
    torch.testing.assert_close(grad[row, column].double(), expected, rtol=2.0**-8, atol=0)
    assert sum(part.count_nonzero().item() for part in grad) == len(positions)


def test_memory_is_the_gradient_and_little_more(make_batch):
    """Forward and backward of fp32 allocate one tensor of the size of the log-probs."""
    batch = make_batch([100_000] * 20)
    log_probs = batch.log_probs.detach().clone().requires_grad_()

    def step() -> None:
        loss = dl_norm.policy_loss(log_probs, *batch.args()[1:], impl="triton")
        torch.autograd.grad(loss * 2, log_probs)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    size = log_probs.numel() * log_probs.element_size()
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * size


# -- determinism ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_same_bits_over_a_hundred_runs(layout, dtype, make_batch, run_loss):
    batch = make_batch([50_000, 3, 0, 81_001, 12], layout=layout, dtype=dtype, ref=True)
    first = run_loss("triton", batch, **OPTIONS, return_metrics=True)
    for _ in range(100):
        again = run_loss("triton", batch, **OPTIONS, return_metrics=True)
        assert torch.equal(again.loss, first.loss)
        assert torch.equal(again.grad, first.grad)
        for name, value in again.metrics.summary().items():
            assert torch.equal(value, first.metrics.summary()[name]), name
