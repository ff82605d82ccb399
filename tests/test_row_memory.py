"""What the losses over logits and hidden states hold in memory, and where they write.

Peaks are running sums of all allocations and frees of the CPU allocator (or the GPU allocator's own
peak), so they see what no name holds: temporaries inside operators, blocks, casts. The slope
from N to 2 N tokens says what one token costs.
"""

from __future__ import annotations

import os

import pytest
import torch

import dl_norm
from bench.timing import peak_memory
from dl_norm._options import make_token_loss
from dl_norm._rows import closed_form as logits_closed_form
from dl_norm._rows import passes as row_passes
from dl_norm._rows.records import RowSettings, TokenRows

# Lanes of no logit: see test_no_invalid_arithmetic in test_logits.py.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
SIZE = 8
# Tokens enough for many chunks, and a vocabulary that dwarfs everything else of a token.
SIZES = {"torch": (256, 4096, 32), "triton": (16, 1024, 4)}  # the interpreter is slow
# Bytes of a token that is neither hidden state nor logit: ids, masks, float32 values of the row
# and of what the row is made of. About 25 of at most 8 bytes are alive at a time.
PER_TOKEN = 200


@pytest.fixture
def small_blocks(monkeypatch):
    """The closed form works on logits of a fixed size: less than these tests have in all."""
    monkeypatch.setattr(logits_closed_form, "_BLOCK_ELEMENTS", 1 << 14)


@pytest.fixture
def make(device):
    def make(tokens, vocabulary, dtype=torch.float32):
        """hidden (2, tokens / 2, D), head, and the other tensors by name. Three tokens of four
        count, so that all chunks have the same size."""
        random = torch.Generator().manual_seed(0)
        shape = (2, tokens // 2)
        hidden = torch.randn(*shape, SIZE, generator=random).to(device, dtype)
        head = torch.randn(vocabulary, SIZE, generator=random).to(device, dtype)
        given = {
            "token_ids": torch.randint(vocabulary, shape, generator=random),
            "old_log_probs": torch.full(shape, -7.0),
            "advantages": torch.tensor([1.0, -1.0]),
            "mask": (torch.arange(shape[1]) % 4 != 1).expand(shape),
            "weights": torch.tensor([1e-3, 2e-3]),
        }
        return hidden, head, {name: tensor.to(device) for name, tensor in given.items()}

    return make


def per_token(peak_of, tokens):
    """Bytes by which the peak grows with each token, from ``tokens`` to twice as many."""
    return (peak_of(2 * tokens) - peak_of(tokens)) / tokens


@pytest.mark.parametrize(
    "impl, dtype, options",
    [
        ("torch", torch.float32, {}),
        ("torch", torch.bfloat16, {}),
        ("torch", torch.bfloat16, {"entropy": True, "return_metrics": True}),
        ("triton", torch.bfloat16, {"entropy": True, "return_metrics": True}),
    ],
)
def test_hidden_states_have_no_term_of_tokens_times_vocabulary(
    impl, dtype, options, make, device, small_blocks
):
    tokens, vocabulary, chunk = SIZES[impl]
    itemsize = dtype.itemsize

    def peak_of(count, backward=True):
        hidden, head, given = make(count, vocabulary, dtype)

        def call():
            leaves = [tensor.detach().requires_grad_(backward) for tensor in (hidden, head)]
            result = dl_norm.linear_policy_loss(
                *leaves, **given, chunk_size=chunk, impl=impl, **options
            )
            loss = result[0] if isinstance(result, tuple) else result
            if backward:
                torch.autograd.grad(3.0 * loss, leaves)

        return peak_memory(call, device)

    # A hidden state, its gradient, and copies of either in 16 bits.
    assert per_token(peak_of, tokens) <= 4 * SIZE * itemsize + PER_TOKEN
    if impl == "triton":
        return  # the same code around either, and the interpreter is slow
    forward = per_token(lambda count: peak_of(count, False), tokens)
    assert forward <= 4 * SIZE * itemsize + PER_TOKEN
    # In all: the logits of one chunk, which has less than twice the tokens asked for, blocks of
    # them in float32, and the head's gradient, in the dtype of the head and in float32.
    blocks = 6 * 4 * (1 << 14)
    head = (4 + itemsize) * vocabulary * SIZE + 4 * vocabulary * SIZE
    limit = 2 * chunk * vocabulary * itemsize + blocks + head + (2 * tokens) * (
        4 * SIZE * itemsize + PER_TOKEN
    )  # fmt: skip
    assert limit < 2 * tokens * vocabulary * itemsize  # so that the limit says something
    assert peak_of(2 * tokens) <= limit


def test_the_measurement_sees_logits(make, device):
    """The plain computation holds the logits, its log-softmax and gradients."""
    tokens, vocabulary, _ = SIZES["torch"]

    def peak_of(count):
        hidden, head, given = make(count, vocabulary)

        def call():
            leaves = [tensor.detach().requires_grad_() for tensor in (hidden, head)]
            log_probs = (leaves[0] @ leaves[1].T).log_softmax(-1)
            log_probs = log_probs.gather(-1, given["token_ids"][..., None])[..., 0]
            rest = {name: tensor for name, tensor in given.items() if name != "token_ids"}
            loss = dl_norm.reference.policy_loss(log_probs, **rest)
            torch.autograd.grad(loss, leaves)

        return peak_memory(call, device)

    assert per_token(peak_of, tokens) >= 2 * 4 * vocabulary


@pytest.mark.parametrize(
    "impl, dtype",
    [
        ("torch", torch.float32), ("torch", torch.bfloat16), ("torch", torch.float16),
        ("triton", torch.float16),
    ],
)  # fmt: skip
def test_logits_in_place_have_no_second_buffer(impl, dtype, make, device, small_blocks):
    """And without in_place exactly one, which is the gradient."""
    tokens, vocabulary, _ = SIZES[impl]

    def peak_of(count, in_place):
        hidden, head, given = make(count, vocabulary, dtype)
        values = hidden @ head.T
        leaf = torch.zeros((), device=device, dtype=dtype, requires_grad=True)

        class Logits(torch.autograd.Function):  # logits that no leaf is, and that cost nothing
            @staticmethod
            def forward(ctx, leaf):
                return values.view_as(values)

            @staticmethod
            def backward(ctx, grad):
                return torch.zeros_like(leaf)

        def call():
            loss = dl_norm.logits_policy_loss(
                Logits.apply(leaf), **given, impl=impl, in_place=in_place
            )
            torch.autograd.grad(loss, leaf, torch.full_like(loss, 3.0))

        return peak_memory(call, device)

    row = vocabulary * dtype.itemsize
    assert per_token(lambda n: peak_of(n, True), tokens) <= PER_TOKEN
    assert row <= per_token(lambda n: peak_of(n, False), tokens) <= row + PER_TOKEN


@pytest.mark.parametrize(
    "impl, dtype",
    [("torch", torch.float32), ("torch", torch.bfloat16), ("triton", torch.bfloat16)],
)
@pytest.mark.parametrize("from_hidden", [True, False])
def test_token_log_probs_have_no_term_of_tokens_times_vocabulary(
    impl, dtype, from_hidden, make, device, small_blocks
):
    tokens, vocabulary, chunk = SIZES[impl]

    def peak_of(count):
        hidden, head, given = make(count, vocabulary, dtype)
        logits = None if from_hidden else hidden @ head.T
        options = {"mask": given["mask"], "entropy": True, "impl": impl}

        def call():
            if logits is None:
                dl_norm.token_log_probs(
                    hidden, given["token_ids"], head, chunk_size=chunk, **options
                )
            else:
                dl_norm.token_log_probs(logits, given["token_ids"], **options)

        return peak_memory(call, device)

    assert per_token(peak_of, tokens) <= 2 * SIZE * dtype.itemsize + PER_TOKEN


# -- beyond 2^31 elements ------------------------------------------------------------------------


class LastPrograms:
    """A kernel, of whose grid the last few programs alone are run where there is no GPU."""

    def __init__(self, kernel, count):
        self.kernel, self.count = kernel, count

    def __getitem__(self, grid):
        from triton.runtime.driver import driver
        from triton.runtime.interpreter import interpreter_builder

        def launch_compiled(*args, **options):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(driver.active, "last", self.count)
                self.kernel[grid](*args, **options)

        if "DL_NORM_TEST_TARGET" in os.environ:
            return launch_compiled

        def set_grid_idx(x, y, z):
            interpreter_builder.grid_idx = (x + grid[0] - self.count, y, z)

        def launch(*args, **options):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)
                self.kernel[(self.count,)](*args, **options)

        return launch


@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_beyond_32_bits(in_place, device, monkeypatch):
    """N V > 2^31: the last three rows, one of them masked, are read and written where they lie.

    In the interpreter only they are worked on, so that only their pages become memory: 4.3 GB of
    logits, or of a gradient, are addresses. Not in place the logits are one row, repeated by a
    stride of 0. The closed form has no addresses of its own.
    """
    from dl_norm._rows import launch as logits_launch

    # In place every row starts at another distance from a 16-byte boundary. Else rows whose
    # distances differ are copied, all of them.
    vocabulary = 1003 if in_place else 1008
    rows = 2**31 // vocabulary + 4
    assert (rows - 3) * vocabulary > 2**31
    last = slice(rows - 3, rows)
    given = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0)).bfloat16()
    try:
        grad = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device=device)
    except RuntimeError:
        pytest.skip("4.3 GB of addresses not available")
    if in_place:
        logits = grad
        logits[last] = given.to(device)
    else:
        given = given[:1].expand(3, -1)
        logits = given[:1].to(device).expand(rows, -1)
        grad[last] = float("nan")
    if device.type == "cpu":
        kernel = LastPrograms(logits_launch.logits_policy_loss_kernel, 3)
        monkeypatch.setattr(logits_launch, "logits_policy_loss_kernel", kernel)

    def column(*values):
        tensor = torch.zeros(rows, device=device)
        tensor[last] = torch.tensor(values, device=device)
        return tensor

    ids = column(5, 0, vocabulary - 1).int()
    active = column(1, 0, 1) != 0
    token_rows = TokenRows(ids, active, column(1.0, 0.0, -2.0), column(1.0, 0.0, 0.5))
    settings = RowSettings(terms=make_token_loss())
    loss, log_probs, *_ = row_passes.logits_forward(logits, grad, token_rows, settings, "triton")

    wide = given.double().detach().requires_grad_()
    true = wide.log_softmax(-1)[torch.arange(3), ids[last].cpu().long()]
    coefficients = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)  # advantage times weight
    # The ratio is 1: the loss has the gradient of -A x log_prob.
    (true_grad,) = torch.autograd.grad(-(true * coefficients).sum(), wide)
    true = true.detach() * active[last].cpu()
    torch.testing.assert_close(log_probs[last].cpu().double(), true, rtol=1e-6, atol=1e-6)
    # To a rounding to bfloat16, which the interpreter does by truncation.
    torch.testing.assert_close(grad[last].cpu().double(), true_grad, rtol=2**-7, atol=1e-9)
    assert loss.item() == pytest.approx(-1.0 + 2 * 0.5, abs=1e-6)
