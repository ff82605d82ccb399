# ruff: noqa: RUF001
"""How much larger the gradients of GRPO and DAPO are than those of DeltaL and Dr. GRPO.

    python -m bench.scale                                            the table, as Markdown
    python -m bench.scale --max-length 3072 --mean 745 --sigma 0.8   one row of one's own

A method's batch gradient is E times the true one (dl_norm.theory): E = 1/M for DeltaL and Dr. GRPO,
1/HM for GRPO and 1/AM for DAPO, with HM and AM the harmonic and arithmetic mean of the lengths. So
the ratios to DeltaL are M/HM and M/AM. Nothing is sampled: the lengths are the quantiles of a
lognormal distribution, whole tokens, cut off at M as responses are, with the given mean after the
cut. For lengths of one's own ``python -m dl_norm diagnose`` prints these numbers (M E) and sigma.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from dl_norm import theory

CASES = ((1024, 300), (3072, 745), (8192, 1500), (32768, 800), (32768, 8000))  # M, mean length
SIGMAS = (0.5, 0.8, 1.0)  # of the logarithm of the lengths
QUANTILES = 10_000


@functools.cache
def normal_quantiles() -> np.ndarray:
    steps = (np.arange(QUANTILES) + 0.5) / QUANTILES
    return np.array([NormalDist().inv_cdf(step) for step in steps])


def lognormal_lengths(max_length: int, mean: float, sigma: float) -> np.ndarray:
    """Quantiles of lognormal lengths, cut off at ``max_length``, whose mean is then ``mean``."""
    if not 1 <= mean < max_length:
        raise ValueError(f"the mean must lie in [1, M = {max_length}), got {mean}")
    shape = np.exp(sigma * normal_quantiles())
    low, high = 0.0, 1e3 * max_length  # of the median
    for _ in range(60):
        median = (low + high) / 2
        lengths = np.clip(np.round(median * shape), 1, max_length)
        low, high = (median, high) if lengths.mean() < mean else (low, median)
    return lengths


def ratio(method: theory.Method, max_length: int, mean: float, sigma: float) -> float:
    """E of the method over E of DeltaL."""
    lengths = lognormal_lengths(max_length, mean, sigma)
    return max_length * theory.method_statistics(lengths, method).expectation


def table(cases: Sequence[tuple[int, float]] = CASES, sigmas: Sequence[float] = SIGMAS) -> str:
    """Markdown: gradients as multiples of DeltaL's (and Dr. GRPO's, which has the same scale)."""
    heads = ["M", "mean length", "DAPO", *(f"GRPO, σ = {sigma:g}" for sigma in sigmas)]
    lines = [heads, ["---:"] * len(heads)]
    for max_length, mean in cases:
        # DAPO's depends on the mean alone, whatever sigma.
        cells = [ratio("dapo", max_length, mean, sigmas[0])]
        cells += [ratio("grpo", max_length, mean, sigma) for sigma in sigmas]
        lines.append([f"{max_length:,}", f"{mean:,.0f}", *(f"{cell:.1f}×" for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale",
        description="How much larger the gradients of GRPO and DAPO are than those of DeltaL.",
    )
    parser.add_argument("--max-length", type=int, metavar="M", help="default: those of the page")
    parser.add_argument("--mean", type=float, help="mean length, cut off at M")
    parser.add_argument("--sigma", type=float, nargs="+", default=list(SIGMAS))
    options = parser.parse_args()
    if (options.max_length is None) != (options.mean is None):
        parser.error("--max-length and --mean go together")
    given = options.max_length is not None
    cases = [(options.max_length, options.mean)] if given else CASES
    try:
        print(table(cases, options.sigma))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
