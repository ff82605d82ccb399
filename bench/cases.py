"""What is measured: shapes, fills, seeded inputs, and the bytes that each must move."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import dl_norm

EPS_LOW, EPS_HIGH = 0.2, 0.3
# No ratio lies closer to a clip bound than this, so that rounding cannot change a branch and every
# contestant has to give the same gradient everywhere.
BOUNDARY = 1e-4


def draw_lengths(sequences: int, max_length: int, fill: float, seed: int = 0) -> Tensor:
    """Lognormal lengths in 1..T whose mean is fill * T (to within rounding)."""
    if fill >= 1:
        return torch.full((sequences,), max_length)
    generator = torch.Generator().manual_seed(seed)
    draw = torch.exp(0.6 * torch.randn(sequences, generator=generator, dtype=torch.double))
    scaled = draw
    # Clipping at T lowers the mean: a few fixed-point steps restore it.
    factor = fill * max_length / draw.mean()
    for _ in range(50):
        scaled = (draw * factor).clamp(1, max_length)
        factor = factor * (fill * max_length / scaled.mean())
    return scaled.round().long().clamp(1, max_length)


@dataclass(frozen=True)
class Case:
    """One shape.

    sequences: G. max_length: T. fill: mean length / T. packed: one flat stream of tokens without
    padding and without mask, else (G, T) with a bool mask. scaled_from: the GPU case that this one
    stands for on a CPU.
    """

    name: str
    sequences: int
    max_length: int
    fill: float = 1.0
    packed: bool = False
    scaled_from: str | None = None

    def lengths(self) -> Tensor:
        return draw_lengths(self.sequences, self.max_length, self.fill)

    @property
    def tokens(self) -> int:
        return int(self.lengths().sum())

    @property
    def positions(self) -> int:
        """Elements of log_probs, padding included."""
        return self.tokens if self.packed else self.sequences * self.max_length

    def bytes_moved(self, element_size: int = 4) -> int:
        """Bytes that a loss with its gradient must read and write, by the model:

        log_probs and old_log_probs are read where the mask is set, the gradient is written
        everywhere, and the mask is 1 byte per position: 13 B per position when dense in fp32,
        8·fill + 5 with padding, 12 when packed. Tensors of one entry per sequence are left out.
        """
        mask = 0 if self.packed else 1
        return 2 * element_size * self.tokens + (element_size + mask) * self.positions

    def flops(self) -> int:
        """Matrix products, of which this entry has none."""
        return 0


GPU_CASES = (
    Case("64x1024", 64, 1024, fill=0.4),
    Case("64x2048", 64, 2048, fill=0.4),
    Case("8x128", 8, 128, fill=0.4),
    Case("1024x8192 40%", 1024, 8192, fill=0.4),
    Case("1024x8192 100%", 1024, 8192),
    Case("packed 3.4M", 1024, 8192, fill=0.4, packed=True),
)
CPU_CASES = (
    Case("64x1024", 64, 1024, fill=0.4),
    Case("64x2048", 64, 2048, fill=0.4),
    Case("8x128", 8, 128, fill=0.4),
    Case("128x4096 40%", 128, 4096, fill=0.4, scaled_from="1024x8192 40%"),
    Case("128x4096 100%", 128, 4096, scaled_from="1024x8192 100%"),
    Case("packed 0.2M", 128, 4096, fill=0.4, packed=True, scaled_from="packed 3.4M"),
)
TINY_CASES = (
    Case("4x48", 4, 48, fill=0.5),
    Case("packed 4x48", 4, 48, fill=0.5, packed=True),
)


def cases_for(device: torch.device) -> tuple[Case, ...]:
    return GPU_CASES if device.type == "cuda" else CPU_CASES


@dataclass(frozen=True)
class Inputs:
    """The tensors of one case: log_probs is a leaf that requires a gradient."""

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor  # (G,)
    mask: Tensor | None  # bool (G, T), None when packed
    weights: Tensor  # (G,) ΔL
    lengths: Tensor  # (G,)
    cu_seqlens: Tensor | None  # (G+1,), None when padded
    max_length: int

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.log_probs,)

    def per_token(self, per_sequence: Tensor) -> Tensor:
        """(G,) spread to the shape of log_probs."""
        if self.cu_seqlens is None:
            return per_sequence[:, None].expand_as(self.log_probs)
        return torch.repeat_interleave(per_sequence, self.lengths)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values with every floating tensor in another dtype."""
        log_probs = self.log_probs.detach().to(dtype).requires_grad_()
        return Inputs(
            log_probs,
            self.old_log_probs.to(dtype),
            self.advantages.to(dtype),
            self.mask,
            self.weights.to(dtype),
            self.lengths,
            self.cu_seqlens,
            self.max_length,
        )


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Log-probs, an old policy at a log-ratio of about 0.2, ΔL weights with alpha = 1.

    The log-ratio stays far below both the clamp (20) and the dual clip (log 3), which not every
    contestant can do or leave out; many ratios lie beyond the clip bounds.
    """
    generator = torch.Generator(device).manual_seed(seed)
    lengths = case.lengths().to(device)
    shape = (case.positions,) if case.packed else (case.sequences, case.max_length)
    old = -torch.rand(shape, generator=generator, device=device) - 0.5
    log_ratio = 0.2 * torch.randn(shape, generator=generator, device=device)
    log_probs = old + log_ratio.clamp(-1, 1)
    exact = log_probs.double() - old.double()
    for bound in (math.log(1 - EPS_LOW), math.log(1 + EPS_HIGH)):
        log_probs = torch.where((exact - bound).abs() < BOUNDARY, old, log_probs)
    mask = cu_seqlens = None
    if case.packed:
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    else:
        mask = torch.arange(case.max_length, device=device) < lengths[:, None]
    return Inputs(
        log_probs=log_probs.requires_grad_(),
        old_log_probs=old,
        advantages=torch.randn(case.sequences, generator=generator, device=device),
        mask=mask,
        weights=dl_norm.sequence_weights(lengths, "delta_l", max_length=case.max_length),
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        max_length=case.max_length,
    )
