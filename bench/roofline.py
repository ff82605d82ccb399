"""The ceilings of this machine, measured in the same run as the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.timing import Clock, Stats


@dataclass(frozen=True)
class Ceilings:
    copy_bytes_per_s: float  # device copy, bytes read plus bytes written
    matmul_flops: float  # bf16 square matrix product


def copy_bandwidth(clock: Clock, *, elements: int | None = None, rounds: int = 30) -> float:
    """Bytes per second of `out.copy_(x)`, reads and writes counted, far beyond every cache."""
    if elements is None:
        elements = 2**28 if clock.device.type == "cuda" else 2**24
    source = torch.ones(elements, device=clock.device)
    target = torch.empty_like(source)
    taken = Stats.of(clock.repeat(lambda: target.copy_(source), rounds))
    return 2 * 4 * elements / taken.median


def matmul_rate(clock: Clock, *, size: int | None = None, rounds: int = 20) -> float:
    """FLOP/s of a square bf16 product of random matrices (zeros would run faster)."""
    if size is None:
        size = 8192 if clock.device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=clock.device).bfloat16() for _ in range(2))
    taken = Stats.of(clock.repeat(lambda: a @ b, rounds))
    return 2 * size**3 / taken.median


def measure(clock: Clock) -> Ceilings:
    return Ceilings(copy_bandwidth(clock), matmul_rate(clock))
