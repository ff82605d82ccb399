"""Experiment (a): the closed forms of bias and variance against sampled gradients.

    python -m bench.experiments.synthetic            about a minute on one CPU core
    python -m bench.experiments.synthetic --draws 40000 --output /tmp/quick

Sequence gradients are drawn from the model, g_i = mu + sqrt(V L_i^beta / D) z, or as sums of L_i
correlated token noises, aggregated with the weights of every method, and their mean and variance
held against dl_norm.theory: variance within 1 %, mean within 4 standard errors, identities between
methods to 1e-12. Writes samples.csv, summary.json and synthetic.png; exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from bench.experiments import RESULTS
from dl_norm import theory

BETAS = (0.5, 1.0, 1.5, 2.0)
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
SIGMA = 0.8  # of the lognormal lengths
LABELS = {"grpo": "GRPO", "dapo": "DAPO", "dr_grpo": "Dr. GRPO", "luspo": "LUSPO"}
VARIANCE_TOLERANCE, MEAN_TOLERANCE, IDENTITY_TOLERANCE = 0.01, 4.0, 1e-12
DIMENSIONS = 8  # D; mu is a unit vector


@dataclass(frozen=True)
class Row:
    """One aggregation of one batch of lengths: the closed form and what was sampled."""

    lengths: str
    noise: str
    method: str
    alpha: float | None
    expectation: float
    sampled_expectation: float
    standard_errors: float  # between the two
    variance: float
    sampled_variance: float
    relative_error: float


def all_weights(lengths: np.ndarray) -> dict[tuple[str, float | None], np.ndarray]:
    """The weights of every method and every alpha, M = 1."""
    others = [m for m in theory.METHODS if m != "delta_l"]
    weights = {(m, None): theory.sequence_weights(lengths, m) for m in others}
    delta_l = {("delta_l", a): theory.sequence_weights(lengths, alpha=a) for a in ALPHAS}
    return {**weights, **delta_l}


def compare(
    name: str,
    noise: str,
    lengths: np.ndarray,
    variances: np.ndarray,
    draw: Callable[[np.random.Generator, int, int], np.ndarray],
    draws: int,
    seed: int,
) -> list[Row]:
    """Rows of one batch. ``draw(random, i, n)``: n values of the noise of sequence i, variance
    variances[i]; gradients of D = DIMENSIONS coordinates use D of them, scaled by 1/sqrt(D)."""
    random = np.random.default_rng(seed)
    weights = all_weights(lengths)
    matrix = np.stack(list(weights.values()))  # (methods, G)
    values = draws * DIMENSIONS
    # Added up a sequence at a time: memory stays at methods x draws x D whatever G is.
    gradients = np.zeros((len(weights), values))
    for i in range(len(lengths)):
        gradients += matrix[:, i, None] * draw(random, i, values)
    gradients = gradients.reshape(len(weights), draws, DIMENSIONS) / np.sqrt(DIMENSIONS)
    mu = np.full(DIMENSIONS, DIMENSIONS**-0.5)
    gradients += matrix.sum(1)[:, None, None] * mu
    means = gradients.mean(1)
    sampled_variances = gradients.var(1, ddof=1).sum(1)
    rows = []
    for (method, alpha), x, mean, variance in zip(
        weights, matrix, means, sampled_variances, strict=True
    ):
        closed = theory.aggregation_statistics(x, variances)
        error = np.sqrt(closed.variance / DIMENSIONS / draws)
        rows.append(
            Row(
                name, noise, method, alpha,
                closed.expectation, float(mean @ mu),
                float((mean @ mu - closed.expectation) / error),
                closed.variance, float(variance), float(variance / closed.variance - 1),
            )
        )  # fmt: skip
    return rows


def power_law_rows(name: str, lengths: np.ndarray, draws: int, seed: int) -> list[Row]:
    """The paper's model, with its exponent."""
    rows = []
    for beta in BETAS:
        variances = theory.power_law(lengths, beta)

        def draw(random, i, n, scale=variances**0.5):
            return scale[i] * random.standard_normal(n)

        rows += compare(name, f"beta={beta}", lengths, variances, draw, draws, seed)
    return rows


def token_rows(lengths: np.ndarray, rho: float, draws: int, seed: int) -> list[Row]:
    """Sums of correlated token noises, drawn token by token."""

    def ar1(random, i, n):
        token = random.standard_normal(n)
        total = token.copy()
        for _ in range(int(lengths[i]) - 1):
            token *= rho
            token += np.sqrt(1 - rho**2) * random.standard_normal(n)
            total += token
        return total

    def compound_symmetric(random, i, n):
        common = np.sqrt(rho) * random.standard_normal(n)
        total = np.zeros(n)
        for _ in range(int(lengths[i])):
            total += common + np.sqrt(1 - rho) * random.standard_normal(n)
        return total

    rows = []
    for noise, draw, variances in (
        (f"AR(1), rho={rho}", ar1, theory.ar1(lengths, rho)),
        (f"compound-symmetric, rho={rho}", compound_symmetric,
         theory.compound_symmetric(lengths, rho)),
    ):  # fmt: skip
        rows += compare("short", noise, lengths, variances, draw, draws, seed)
    return rows


def identities(lengths: np.ndarray) -> dict[str, float]:
    """Relative deviations of what should be equal, at every beta or at beta = 1."""

    def off(a: float, b: float) -> float:
        return abs(a / b - 1)

    result = {}
    for beta in BETAS:
        rows = {m: theory.method_statistics(lengths, m, beta=beta) for m in theory.METHODS}
        result[f"CV GRPO = DeltaL(1), beta={beta}"] = off(rows["grpo"].cv, rows["delta_l"].cv)
        result[f"CV DAPO = Dr. GRPO, beta={beta}"] = off(rows["dapo"].cv, rows["dr_grpo"].cv)
        for method, row in rows.items():
            from_weights = theory.aggregation_statistics(
                theory.sequence_weights(lengths, method), theory.power_law(lengths, beta)
            )
            result[f"closed form = weights, {method}, beta={beta}"] = off(row.cv, from_weights.cv)
    paper = {m: theory.method_statistics(lengths, m) for m in theory.METHODS}
    harmonic, arithmetic = 1 / (1 / lengths).mean(), lengths.mean()
    result["Var Dr. GRPO / DeltaL(1) = AM/HM"] = off(
        paper["dr_grpo"].variance / paper["delta_l"].variance, arithmetic / harmonic
    )
    result["CV DeltaL(1) = (sum 1/L)^-1/2"] = off(paper["delta_l"].cv, (1 / lengths).sum() ** -0.5)
    result["CV DAPO = sqrt(sum L) / G"] = off(
        paper["dapo"].cv, np.sqrt(lengths.sum()) / len(lengths)
    )
    return result


def lognormal_cost(lengths: np.ndarray) -> list[dict[str, float]]:
    """Var(alpha) / least variance for many lognormal lengths, beside exp(sigma^2 (a - b)^2)."""
    return [
        {
            "alpha": alpha,
            "beta": beta,
            "lengths": theory.excess_variance(lengths, alpha, beta),
            "formula": theory.lognormal_excess_variance(SIGMA, alpha, beta),
        }
        for alpha in (0.0, 0.75, 1.0)
        for beta in BETAS
    ]


def save_figure(path: Path, rows: list[Row], lengths: np.ndarray) -> None:
    """Sampled points on the curves of the closed form."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [row for row in rows if row.lengths == "lognormal"]
    grid = np.linspace(0, 2, 101)
    for beta, color in zip(BETAS, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True):
        ours = [row for row in rows if row.noise == f"beta={beta}"]
        best = theory.method_statistics(lengths, alpha=beta, beta=beta).variance
        curve = [theory.excess_variance(lengths, alpha, beta) for alpha in grid]
        left.plot(grid, curve, color=color, label=f"$\\beta$ = {beta:g}")
        points = [(r.alpha, r.sampled_variance / best) for r in ours if r.method == "delta_l"]
        left.plot(*zip(*points, strict=True), "o", ms=4, color=color)
        others = [(LABELS[r.method], r) for r in ours if r.method in LABELS]
        names = [name for name, _ in others]
        # Over the exact expectation: it has its own check, and its sampling error is not a CV's.
        cvs = [np.sqrt(r.sampled_variance / best) / r.expectation for _, r in others]
        right.plot(names, cvs, "o", color=color, ms=5)
        for place, (_, r) in enumerate(others):
            level = np.sqrt(r.variance) / r.expectation / np.sqrt(best)
            right.hlines(level, place - 0.3, place + 0.3, color=color)
    left.set(
        title=f"DeltaL: cost of the wrong $\\alpha$, {len(lengths)} lognormal lengths",
        xlabel="$\\alpha$", ylabel="variance / least variance", yscale="log",
    )  # fmt: skip
    left.legend(frameon=False)
    right.set(
        title="Noise of the others (lines: closed form, points: sampled)",
        ylabel="CV / CV of DeltaL at $\\alpha = \\beta$", yscale="log",
    )  # fmt: skip
    for axes, ticks in ((left, [1, 1.5, 2, 3, 4, 6, 8]), (right, [1, 1.5, 2, 3])):
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    figure.savefig(path, dpi=110)


def run(draws: int, seed: int) -> tuple[list[Row], dict, np.ndarray]:
    """All rows, the summary, and the lognormal lengths."""
    random = np.random.default_rng(seed)
    lognormal = np.ceil(random.lognormal(6.0, SIGMA, 64))
    many = np.ceil(random.lognormal(6.0, SIGMA, 1_000_000))
    vector = np.array([10.0, 100.0, 1000.0])
    short = np.array([1, 2, 4, 8, 8, 16, 16, 32, 32, 64, 96, 128], dtype=np.float64)
    jobs = [
        lambda: power_law_rows("10, 100, 1000", vector, draws, seed + 1),
        lambda: power_law_rows("lognormal", lognormal, draws, seed + 2),
        *(lambda rho=rho: token_rows(short, rho, draws, seed + 3) for rho in (0.2, 0.8)),
    ]
    rows = [row for job in tqdm(jobs, "batches", disable=None) for row in job()]
    deviations = identities(lognormal) | {
        f"{name} (10, 100, 1000)": value for name, value in identities(vector).items()
    }
    summary = {
        "command": f"python -m bench.experiments.synthetic --draws {draws} --seed {seed}",
        "numpy": np.__version__,
        "dimensions": DIMENSIONS,
        "lognormal_lengths": lognormal.astype(int).tolist(),
        "short_lengths": short.astype(int).tolist(),
        "rows": len(rows),
        "largest_relative_error_of_variance": max(abs(row.relative_error) for row in rows),
        "largest_standard_errors_of_mean": max(abs(row.standard_errors) for row in rows),
        "identities": len(deviations),
        "largest_deviation_of_an_identity": max(deviations.values()),
        "lognormal_cost": lognormal_cost(many),
    }
    summary["passed"] = bool(
        summary["largest_relative_error_of_variance"] < VARIANCE_TOLERANCE
        and summary["largest_standard_errors_of_mean"] < MEAN_TOLERANCE
        and summary["largest_deviation_of_an_identity"] < IDENTITY_TOLERANCE
    )
    return rows, summary, lognormal


def main(arguments: list[str] | None = None) -> int:
    """Run, write, and say whether the closed forms held."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.experiments.synthetic",
        description="Closed forms of bias and variance against sampled gradients.",
    )
    parser.add_argument("--draws", type=int, default=100_000, help="gradients per sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "synthetic")
    options = parser.parse_args(arguments)
    rows, summary, lengths = run(options.draws, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    with open(options.output / "samples.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row).items()
            writer.writerow({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in values})
    (options.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    save_figure(options.output / "synthetic.png", rows, lengths)
    print(
        f"{summary['rows']} comparisons: variance within "
        f"{summary['largest_relative_error_of_variance']:.2%}, mean within "
        f"{summary['largest_standard_errors_of_mean']:.1f} standard errors, "
        f"{summary['identities']} identities to {summary['largest_deviation_of_an_identity']:.0e}"
        f"\n{'passed' if summary['passed'] else 'FAILED'}: {options.output}"
    )
    return 0 if summary["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
