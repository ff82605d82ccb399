"""One rollout batch, however it is laid out: the same loss, the same gradient of every token.

A sum in another order is the same to rounding: 1e-6 of the sum of the absolute terms. A token's
gradient is arithmetic on that token alone, so it is the same to the bit.
"""

from __future__ import annotations

import pytest
import torch

import dl_norm

IMPLEMENTATIONS = ("triton", "torch", "reference")
OPTIONS = {"eps_high": 0.28, "dual_clip": 1.5, "beta": 0.1}
LENGTHS = [5, 0, 900, 17, 1, 333, 64, 2]
WIDTH = 901


@pytest.fixture
def batch(make_batch):
    return make_batch(LENGTHS, WIDTH, holes=True, ref=True, rollout="token", max_length=1000)


@pytest.fixture
def whole(impl, batch, run_loss, truth):
    """The batch in one piece: (what an implementation says, the tolerance of its loss)."""
    return run_loss(impl, batch, **OPTIONS), 1e-6 * truth(batch, **OPTIONS).loss_scale


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> None:
    assert abs(one.item() - other.item()) <= tolerance


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [1, 3, 4])
def test_micro_batches(size, impl, batch, whole, run_loss):
    """Slices with their slices of the weights add up, whatever the cut."""
    got, tolerance = whole
    parts = [
        run_loss(impl, batch.rows(slice(first, first + size)), **OPTIONS)
        for first in range(0, len(LENGTHS), size)
    ]
    close(sum(part.loss.double() for part in parts), got.loss, tolerance)
    assert torch.equal(torch.cat([part.grad for part in parts]), got.grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_weights_of_a_slice_alone_are_another_loss(impl, batch, whole, run_loss):
    """What the invariance is about: weights computed from a slice do not add up. If this test
    fails the others have lost their point."""
    got, tolerance = whole
    parts = []
    for first in range(0, len(LENGTHS), 4):
        piece = batch.rows(slice(first, first + 4))
        weights = dl_norm.sequence_weights(piece.mask.sum(1), max_length=1000)
        parts.append(run_loss(impl, piece.replace(weights=weights), **OPTIONS).loss)
    assert abs(sum(parts).item() - got.loss.item()) > 1e3 * tolerance


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_order(impl, batch, whole, run_loss):
    got, tolerance = whole
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(1))
    order = order.to(batch.weights.device)
    permuted = run_loss(impl, batch.rows(order), **OPTIONS)
    close(permuted.loss, got.loss, tolerance)
    assert torch.equal(permuted.grad, got.grad[order])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("more", [1, 123, 1300])
def test_padding(more, left, impl, batch, whole, run_loss):
    """More padding, on either side, full of NaN; the tiles then cut the rows elsewhere."""
    got, tolerance = whole
    sides = (more, 0) if left else (0, more)

    def pad(tensor: torch.Tensor | None, value) -> torch.Tensor | None:
        return None if tensor is None else torch.nn.functional.pad(tensor, sides, value=value)

    names = ("log_probs", "old_log_probs", "ref_log_probs", "rollout_weights")
    padded = batch.replace(
        mask=pad(batch.mask, False),
        **{name: pad(getattr(batch, name), float("nan")) for name in names},
    )
    again = run_loss(impl, padded, **OPTIONS)
    close(again.loss, got.loss, tolerance)
    inner = slice(more, None) if left else slice(0, WIDTH)
    assert torch.equal(again.grad[:, inner], got.grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packing(dtype, impl, batch, whole, run_loss):
    """Without padding and without a mask, and as rows end to end under the mask."""
    got, tolerance = whole
    streams = ("log_probs", "old_log_probs", "ref_log_probs", "rollout_weights")
    counts = batch.mask.sum(1)
    packed = batch.replace(
        **{name: getattr(batch, name)[batch.mask] for name in streams},
        mask=None,
        cu_seqlens=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(dtype),
    )
    again = run_loss(impl, packed, **OPTIONS)
    close(again.loss, got.loss, tolerance)
    assert torch.equal(again.grad, got.grad[batch.mask])

    flat = batch.replace(
        **{name: getattr(batch, name).reshape(-1) for name in (*streams, "mask")},
        cu_seqlens=(torch.arange(len(LENGTHS) + 1, device=counts.device) * WIDTH).to(dtype),
    )
    again = run_loss(impl, flat, **OPTIONS)
    close(again.loss, got.loss, tolerance)
    assert torch.equal(again.grad.reshape(got.grad.shape), got.grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_pieces_of_a_packed_stream(impl, make_batch, run_loss, truth):
    """Micro-batches of packed input: any run of sequences, at any alignment."""
    batch = make_batch([3, 700, 0, 41, 1], layout="packed")
    got = run_loss(impl, batch)
    losses, grads = [], []
    for first, last in ((0, 1), (1, 4), (4, 5)):
        start, end = batch.cu_seqlens[first].item(), batch.cu_seqlens[last].item()
        piece = batch.replace(
            log_probs=batch.log_probs[start:end],
            old_log_probs=batch.old_log_probs[start:end],
            advantages=batch.advantages[first:last],
            weights=batch.weights[first:last],
            cu_seqlens=batch.cu_seqlens[first : last + 1] - start,
        )
        # One sequence of one token would make (N,) and (G,) the same shape: also the same thing.
        part = run_loss(impl, piece)
        losses.append(part.loss.double())
        grads.append(part.grad)
    close(sum(losses), got.loss, 1e-6 * truth(batch).loss_scale)
    assert torch.equal(torch.cat(grads), got.grad)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides(impl, batch, whole, run_loss):
    """The same numbers at other addresses: same order of summation, so the loss is the same too
    where tiles do not depend on the strides."""
    got, tolerance = whole
    streams = ("log_probs", "old_log_probs", "ref_log_probs", "rollout_weights", "mask")
    for changed in (
        batch.replace(**{name: getattr(batch, name).t().contiguous().t() for name in streams}),
        batch.replace(
            **{name: torch.cat([getattr(batch, name)] * 2, 1)[:, WIDTH:] for name in streams}
        ),
    ):
        again = run_loss(impl, changed, **OPTIONS)
        close(again.loss, got.loss, tolerance)
        assert torch.equal(again.grad, got.grad)
        if impl == "triton":
            assert torch.equal(again.loss, got.loss)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_advantages_spread_over_the_tokens(impl, batch, whole, run_loss):
    """One number per sequence or that number at each of its tokens."""
    got, tolerance = whole
    spread = batch.replace(advantages=batch.spread(batch.advantages).contiguous())
    again = run_loss(impl, spread, **OPTIONS)
    close(again.loss, got.loss, tolerance)
    assert torch.equal(again.grad, got.grad)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_every_time(dtype, impl, make_batch, run_loss):
    batch = make_batch([1025, 3, 0, 800], 1025, dtype=dtype, holes=True, ref=True)
    first = run_loss(impl, batch, **OPTIONS, return_metrics=True)
    for _ in range(5):
        again = run_loss(impl, batch, **OPTIONS, return_metrics=True)
        assert torch.equal(again.loss, first.loss)
        assert torch.equal(again.grad, first.grad)
        for name, value in again.metrics.summary().items():
            assert torch.equal(value, first.metrics.summary()[name])


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_inputs_are_left_alone(impl, batch, run_loss):
    """Nothing is written into an argument, although much is computed in place."""
    before = {name: t.clone() for name, t in vars(batch).items() if t is not None}
    run_loss(impl, batch, upstream=3.0, **OPTIONS, return_metrics=True)
    for name, values in before.items():
        assert torch.equal(getattr(batch, name), values), name
