"""The ceilings of this machine, measured in the same run as the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.timing import Clock, Stats


@dataclass(frozen=True)
class Ceilings:
    copy_bytes_per_s: float  # device copy, bytes read plus bytes written
    matmul_flops: float  # square matrix product
    matmul_dtype: str


def copy_bandwidth(clock: Clock, *, elements: int | None = None, rounds: int = 30) -> float:
    """Bytes per second of `out.copy_(x)`, reads and writes counted, far beyond every cache."""
    if elements is None:
        elements = 2**28 if clock.device.type == "cuda" else 2**24
    source = torch.ones(elements, device=clock.device)
    target = torch.empty_like(source)
    taken = Stats.of(clock.repeat(lambda: target.copy_(source), rounds))
    return 2 * 4 * elements / taken.median


def matmul_rate(clock: Clock, *, size: int | None = None, rounds: int = 20) -> float:
    """FLOP/s of a square product of random matrices (zeros would run faster)."""
    if size is None:
        size = 8192 if clock.device.type == "cuda" else 1024
    dtype = matmul_dtype(clock.device)
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    taken = Stats.of(clock.repeat(lambda: a @ b, rounds))
    return 2 * size**3 / taken.median


def matmul_dtype(device: torch.device) -> torch.dtype:
    """Of the cases: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def measure(clock: Clock, *, quick: bool = False) -> Ceilings:
    """quick: small and few, to try a command; such ceilings mean nothing."""
    dtype = str(matmul_dtype(clock.device)).removeprefix("torch.")
    if quick:
        copy = copy_bandwidth(clock, elements=2**20, rounds=3)
        return Ceilings(copy, matmul_rate(clock, size=64, rounds=3), dtype)
    return Ceilings(copy_bandwidth(clock), matmul_rate(clock), dtype)
