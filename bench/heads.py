"""Logits and hidden states: shapes, seeded inputs, the float64 truth, the check against it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import dl_norm
import dl_norm.reference
from bench.cases import EPS_HIGH, EPS_LOW, draw_lengths
from bench.contest import Expected, Prepared
from bench.parity import Wrong
from bench.roofline import matmul_dtype

CHUNK = 1024  # rows of logits that exist at a time in float64

# Log-ratios to the old policy. All lie 8 % or more from the clip bounds log 0.8 and log 1.3: more
# than what a bfloat16 logit is rounded by, so that every contestant is on the same branch.
LOG_RATIOS = (-0.6, -0.35, -0.1, 0.0, 0.1, 0.18, 0.4, 0.6)
# Norm of the gradient's error relative to its norm. In bfloat16 the logits that a contestant
# multiplies out are rounded to 8 bits, and so is the gradient; half of all errors one can make (a
# weight, a branch, a mask) are larger than this. In float32 it is the rounding of long sums.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class HeadCase:
    """One shape. entry: "logits" and "token_log_probs" start at (B, T, V) logits, "linear" and
    "cross_entropy" at (B, T, D) hidden states and a (V, D) head."""

    name: str
    entry: str
    sequences: int
    max_length: int
    vocabulary: int
    hidden: int = 64  # of logits: the rank they are made of
    fill: float = 1.0
    scaled_from: str | None = None
    itemsize: int = 2

    def lengths(self) -> Tensor:
        return draw_lengths(self.sequences, self.max_length, self.fill)

    @property
    def tokens(self) -> int:
        return int(self.lengths().sum())

    def bytes_moved(self) -> int:
        """A logit of a counted token is read and, unless only log-probs are asked for, its
        gradient written; what a second pass over the row reads comes out of the cache. Where the
        logits are given, the gradient of the other rows is written as well. The bytes of hidden
        states and head are left to the matrix products."""
        read = self.itemsize * self.tokens * self.vocabulary
        if self.entry == "token_log_probs":
            return read
        if self.entry == "logits":
            return read + self.itemsize * self.sequences * self.max_length * self.vocabulary
        return 2 * read

    def flops(self) -> int:
        """Three matrix products over the counted tokens: logits, d hidden, d head."""
        if self.entry in ("logits", "token_log_probs"):
            return 0
        return 3 * 2 * self.tokens * self.hidden * self.vocabulary


@dataclass(frozen=True)
class HeadInputs:
    """leaves: (logits,) or (hidden, head). Everything else is a constant of the loss."""

    leaves: tuple[Tensor, ...]
    token_ids: Tensor  # (B, T)
    old_log_probs: Tensor  # (B, T)
    advantages: Tensor  # (B,)
    mask: Tensor  # bool (B, T)
    weights: Tensor  # (B,) ΔL
    tokens: int  # counted, known to the host as a trainer knows it from generation

    @property
    def loss_tensors(self) -> tuple[Tensor, ...]:
        """From token_ids to weights, as the losses of the package take them."""
        return self.token_ids, self.old_log_probs, self.advantages, self.mask, self.weights


def cases_for(entry: str, device: torch.device) -> tuple[HeadCase, ...]:
    return (GPU_CASES if device.type == "cuda" else CPU_CASES)[entry]


GPU_CASES = {
    "logits": (
        HeadCase("8192x151936", "logits", 8, 1024, 151_936),
        HeadCase("8192x151936 40%", "logits", 8, 1024, 151_936, fill=0.4),
    ),
    "token_log_probs": (HeadCase("8192x151936", "token_log_probs", 8, 1024, 151_936),),
    "linear": (
        HeadCase("8192x4096x151936", "linear", 8, 1024, 151_936, 4096),
        HeadCase("8192x4096x151936 40%", "linear", 8, 1024, 151_936, 4096, fill=0.4),
        HeadCase("32768x2048x151936", "linear", 32, 1024, 151_936, 2048),
        HeadCase("16384x2048x248320", "linear", 16, 1024, 248_320, 2048),
    ),
    "cross_entropy": (HeadCase("4096x4096x128256", "cross_entropy", 4, 1024, 128_256, 4096),),
}
_CPU = {"scaled_from": "8192x151936", "itemsize": 4}
CPU_CASES = {
    "logits": (
        HeadCase("512x16384", "logits", 4, 128, 16_384, **_CPU),
        HeadCase("512x16384 40%", "logits", 4, 128, 16_384, fill=0.4, **_CPU),
    ),
    "token_log_probs": (HeadCase("512x16384", "token_log_probs", 4, 128, 16_384, **_CPU),),
    "linear": (
        HeadCase("1024x256x16384", "linear", 8, 128, 16_384, 256, **_CPU),
        HeadCase("1024x256x16384 40%", "linear", 8, 128, 16_384, 256, fill=0.4, **_CPU),
    ),
    "cross_entropy": (HeadCase("512x256x16384", "cross_entropy", 4, 128, 16_384, 256, **_CPU),),
}


def tiny_cases(entry: str) -> tuple[HeadCase, ...]:
    fill = 1.0 if entry == "cross_entropy" else 0.6
    return (HeadCase("3x8x64", entry, 3, 8, 64, 16, fill, itemsize=4),)


def _row_chunks(rows: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, rows, CHUNK))


def _log_probs(leaves: tuple[Tensor, ...], rows: slice, token_ids: Tensor) -> Tensor:
    """Of some rows, from (N, V) logits or (N, D) hidden states and a head."""
    first = leaves[0][rows]
    logits = first if len(leaves) == 1 else first @ leaves[1].t()
    return logits.log_softmax(-1).gather(-1, token_ids[rows, None])[:, 0]


def make_inputs(case: HeadCase, device: torch.device, seed: int = 0) -> HeadInputs:
    """Hidden states and a head of which the logits have a standard deviation of 2, tokens sampled
    from the softmax, an old policy at one of LOG_RATIOS, ΔL weights with alpha = 1."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = matmul_dtype(device)
    shape = (case.sequences, case.max_length)
    rows = case.sequences * case.max_length
    draw = {"generator": generator, "device": device, "dtype": torch.float32}
    hidden = torch.randn(rows, case.hidden, **draw).to(dtype)
    head = (torch.randn(case.vocabulary, case.hidden, **draw) * 2 / case.hidden**0.5).to(dtype)
    from_logits = case.entry in ("logits", "token_log_probs")
    logits = torch.empty(rows, case.vocabulary, dtype=dtype, device=device) if from_logits else None
    token_ids = torch.empty(rows, dtype=torch.int64, device=device)
    for chunk in _row_chunks(rows):
        values = hidden[chunk] @ head.t()
        if logits is not None:
            logits[chunk] = values
        gumbel = -torch.log(-torch.log(torch.rand(values.shape, **draw).clamp_(1e-20, 1 - 1e-7)))
        token_ids[chunk] = (values.float() + gumbel).argmax(-1)
    flat = (logits,) if logits is not None else (hidden, head)
    exact = torch.cat(
        [_log_probs(tuple(t.float() for t in _some(flat, c)), slice(None), token_ids[c])
         for c in _row_chunks(rows)]
    )  # fmt: skip
    ratios = torch.tensor(LOG_RATIOS, device=device)
    picked = ratios[torch.randint(len(ratios), (rows,), generator=generator, device=device)]
    lengths = case.lengths().to(device)
    if case.entry == "cross_entropy":
        weights = dl_norm.sequence_weights(lengths, "dapo")
    else:
        weights = dl_norm.sequence_weights(lengths, "delta_l", max_length=case.max_length)
    leaves = (flat[0].view(*shape, -1), *flat[1:])
    return HeadInputs(
        leaves=tuple(leaf.requires_grad_(case.entry != "token_log_probs") for leaf in leaves),
        token_ids=token_ids.view(shape),
        old_log_probs=(exact - picked).view(shape),
        advantages=torch.randn(case.sequences, **draw),
        mask=torch.arange(case.max_length, device=device) < lengths[:, None],
        weights=weights,
        tokens=case.tokens,
    )


def _some(flat: tuple[Tensor, ...], rows: slice) -> tuple[Tensor, ...]:
    return (flat[0][rows], *flat[1:])


def truth(inputs: HeadInputs) -> Expected:
    """Loss and gradients in float64 under autograd, some rows at a time: first the log-probs, then
    the loss's gradient at them, then its way on to the leaves."""
    leaves = inputs.leaves
    flat = (leaves[0].detach().flatten(0, 1), *(leaf.detach() for leaf in leaves[1:]))
    token_ids = inputs.token_ids.flatten()
    exact = torch.empty(token_ids.shape, dtype=torch.float64, device=token_ids.device)
    for chunk in _row_chunks(token_ids.numel()):
        some = tuple(t.double() for t in _some(flat, chunk))
        exact[chunk] = _log_probs(some, slice(None), token_ids[chunk])
    log_probs = exact.view_as(inputs.token_ids)
    if not leaves[0].requires_grad:
        return Expected(log_probs.masked_fill(~inputs.mask, 0.0), (), 1.0)
    log_probs.requires_grad_()
    loss = dl_norm.reference.policy_loss(
        log_probs, inputs.old_log_probs.double(), inputs.advantages.double(), inputs.mask,
        inputs.weights.double(), eps_low=EPS_LOW, eps_high=EPS_HIGH,
    )  # fmt: skip
    (upstream,) = torch.autograd.grad(loss, log_probs)
    gradients = _pull_back(flat, token_ids, upstream.flatten(), leaves)
    # Every term of the loss is about as large as its gradient, which is x·A·r.
    return Expected(loss.detach(), gradients, upstream.abs().sum().item())


def cross_entropy_truth(inputs: HeadInputs) -> Expected:
    """The gradients of the mean cross-entropy of all tokens. Its value is not compared: that of a
    policy loss whose ratio is 1 is another."""
    leaves = inputs.leaves
    flat = (leaves[0].detach().flatten(0, 1), *(leaf.detach() for leaf in leaves[1:]))
    mask = inputs.mask.flatten()
    upstream = -mask.double() / mask.sum()
    gradients = _pull_back(flat, inputs.token_ids.flatten(), upstream, leaves)
    return Expected(torch.zeros((), device=mask.device), gradients, 1.0)


def _pull_back(
    flat: tuple[Tensor, ...], token_ids: Tensor, upstream: Tensor, leaves: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """d/d leaves of sum(upstream * log_probs). Rows in float32: they are many, and compared at a
    tolerance that is far wider."""
    rows = torch.empty(flat[0].shape, dtype=torch.float32, device=upstream.device)
    shared = tuple(t.double().requires_grad_() for t in flat[1:])
    sums = [torch.zeros_like(t) for t in shared]
    for chunk in _row_chunks(token_ids.numel()):
        some = (flat[0][chunk].double().requires_grad_(), *shared)
        log_probs = _log_probs(some, slice(None), token_ids[chunk])
        first, *others = torch.autograd.grad(log_probs, some, upstream[chunk])
        rows[chunk] = first
        for total, other in zip(sums, others, strict=True):
            total += other
    return (rows.view(leaves[0].shape), *sums)


def check(prepared: Prepared, expected: Expected) -> None:
    """Raise `parity.Wrong`, in words, unless loss and gradients are those of the truth."""
    prepared.restore()
    loss = prepared.result()
    gradients = torch.autograd.grad(loss, prepared.leaves)
    check_gradients(prepared.gradients(gradients), expected)
    tolerance = TOLERANCE[prepared.leaves[0].dtype]
    error = (loss.double() - expected.result).abs().item() / expected.scale
    if not error <= tolerance:
        raise Wrong(f"loss off by {error:.1e} of its terms (allowed {tolerance:.0e})")


def check_cross_entropy(prepared: Prepared, expected: Expected) -> None:
    gradients = torch.autograd.grad(prepared.result(), prepared.leaves)
    check_gradients(prepared.gradients(gradients), expected)


def check_gradients(gradients: tuple[Tensor, ...], expected: Expected) -> None:
    for number, (got, exact) in enumerate(zip(gradients, expected.gradients, strict=True)):
        tolerance = TOLERANCE[got.dtype]
        error = _relative_error(got.flatten(0, -2), exact.flatten(0, -2))
        if not error <= tolerance:  # also true for NaN
            raise Wrong(
                f"gradient {number} off by {error:.1e} of its norm (allowed {tolerance:.0e})"
            )


def check_log_probs(prepared: Prepared, expected: Expected) -> None:
    error = (prepared.result().double() - expected.result).abs().max().item()
    if not error <= 1e-4:  # float32 arithmetic on logits that are given
        raise Wrong(f"a log-prob off by {error:.1e} (allowed 1e-4)")


def _relative_error(got: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth, some rows at a time."""
    wrong = right = 0.0
    for chunk in _row_chunks(exact.shape[0]):
        truth = exact[chunk].double()
        wrong += (got[chunk].double() - truth).square().sum().item()
        right += truth.square().sum().item()
    return (wrong / right) ** 0.5
