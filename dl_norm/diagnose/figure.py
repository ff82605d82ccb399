"""A diagnosis as a figure."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .. import theory
from .._aggregations import AGGREGATIONS
from .analysis import BETA_RANGE, Diagnosis, MethodSummary, split_batches, squared_norms
from .rollouts import Rollouts

# Those that are drawn: DAPO and LUSPO weigh as Dr. GRPO does, up to the scale.
_STYLES = {"grpo": ("tab:orange", "--"), "dapo": ("tab:green", "-."), "dr_grpo": ("tab:gray", ":")}


def save_figure(path: Path, rollouts: Rollouts, diagnosis: Diagnosis, batch_size: int | None):
    """Lengths, weights, the cost of alpha; and the scale of each batch or the gradient norms,
    where the file has several batches or norms. The format follows the name of ``path``.

    Raises:
        ValueError: a name that ends in no format.
    """
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        raise ValueError(f"{path}: expected a figure's name to end in one of {', '.join(formats)}")
    batches = split_batches(rollouts, batch_size)
    full = rollouts.lengths[rollouts.lengths > 0]
    squares = squared_norms(rollouts)
    panels = ["lengths", "weights", "alpha"]
    panels += ["swing"] if len(batches) > 1 else []
    panels += ["norms"] if squares is not None else []
    rows = 1 if len(panels) == 3 else 2
    figure = Figure(figsize=(4.4 * math.ceil(len(panels) / rows), 3.6 * rows), layout="constrained")
    axes = dict(zip(panels, np.ravel(figure.subplots(rows, -(-len(panels) // rows))), strict=False))
    for unused in figure.axes[len(panels) :]:
        unused.remove()
    _draw_lengths(axes["lengths"], full)
    _draw_weights(axes["weights"], full, diagnosis)
    _draw_alpha(axes["alpha"], batches, diagnosis)
    if "swing" in axes:
        _draw_swing(axes["swing"], batches, diagnosis)
    if "norms" in axes and squares is not None:
        _draw_norms(axes["norms"], rollouts.lengths, squares, diagnosis)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _style(row: MethodSummary, diagnosis: Diagnosis):
    if row.alpha is None:
        return _STYLES.get(row.method)
    return ("tab:blue", "-") if row.alpha == diagnosis.best_alpha else None


def _draw_lengths(axes, full):
    edges = np.geomspace(full.min(), max(full.max(), full.min() + 1), 41)
    axes.hist(full, edges, color="lightgray", edgecolor="gray", linewidth=0.3)
    axes.axvline(full.mean(), color="black", linestyle="--", lw=1, label="mean")
    axes.axvline(1 / (1 / full).mean(), color="black", linestyle=":", lw=1, label="harmonic mean")
    axes.set(title="Lengths", xlabel="length (tokens)", ylabel="responses", xscale="log")
    axes.legend(frameon=False, fontsize=8)


def _draw_weights(axes, full, diagnosis):
    grid = np.unique(np.geomspace(full.min(), full.max(), 60).round())
    # GRPO dashed on top: DeltaL(1) may lie on its line.
    for row in sorted(diagnosis.methods, key=lambda row: row.alpha is None):
        aggregation = AGGREGATIONS[row.method]
        if row.method in ("dapo", "luspo") or aggregation.takes_groups:
            continue  # equal weights, like Dr. GRPO; or no function of the length alone
        exponent, _ = aggregation.exponents(row.alpha or 0.0)
        style = _style(row, diagnosis) or ("tab:cyan" if row.alpha == 1 else "tab:purple", "-")
        label = "DAPO, Dr. GRPO, LUSPO" if row.method == "dr_grpo" else row.name
        weight = grid**exponent / np.mean(full**exponent)
        axes.plot(grid, weight, style[1], color=style[0], label=label)
    axes.set(title="Weight of a token", xlabel="length (tokens)", ylabel="weight / mean weight")
    axes.set(xscale="log", yscale="log")
    axes.legend(frameon=False, fontsize=8)


def _draw_alpha(axes, batches, diagnosis):
    exponent = diagnosis.exponent
    grid = np.linspace(0, max(1.5, diagnosis.best_alpha + 0.5), 61)
    batches = batches[:: -(-len(batches) // 50)]  # 50 batches show the curve of thousands

    def cost(alpha, beta):
        return np.mean([theory.excess_variance(batch, alpha, beta) for batch in batches])

    axes.plot(grid, [cost(a, exponent.beta) for a in grid], color="tab:blue",
              label=f"$\\beta$ = {exponent.beta:.2f}")  # fmt: skip
    if exponent.estimate is not None:
        interval = np.clip([exponent.estimate.low, exponent.estimate.high], *BETA_RANGE)
        bounds = [[cost(a, b) for a in grid] for b in interval]
        axes.fill_between(grid, *bounds, color="tab:blue", alpha=0.2, label="its interval")
    axes.axvline(diagnosis.best_alpha, color="black", lw=0.8, linestyle=":")
    axes.set(title="Cost of $\\alpha$", xlabel="$\\alpha$", ylabel="variance / least variance")
    axes.legend(frameon=False, fontsize=8)


def _draw_swing(axes, batches, diagnosis):
    for row in diagnosis.methods:
        style = _style(row, diagnosis)
        if style is None:
            continue
        factors = np.array(
            [
                theory.method_statistics(
                    batch, row.method, alpha=1.0 if row.alpha is None else row.alpha
                ).expectation
                for batch in batches
            ]
        )
        width = 2.5 if row.method == "dr_grpo" else 1.5
        axes.plot(factors / factors.mean(), style[1], color=style[0], label=row.name, lw=width)
    axes.set(title="Scale of the gradient", xlabel="batch", ylabel="E / its mean")
    axes.legend(frameon=False, fontsize=8)


def _draw_norms(axes, lengths, squares, diagnosis):
    usable = (lengths > 0) & (squares > 0)
    x, y = lengths[usable], squares[usable]
    # A sample is enough for the eye, and keeps a vector graphic small.
    shown = np.random.default_rng(0).permutation(len(x))[:3000]
    axes.plot(x[shown], y[shown], ".", color="gray", ms=2, alpha=0.5)
    grid = np.array([x.min(), x.max()])
    beta = diagnosis.exponent.beta
    level = np.exp(np.log(y).mean() - beta * np.log(x).mean())
    axes.plot(grid, level * grid**beta, color="tab:blue", label=f"slope {beta:.2f}")
    axes.set(title="Squared gradient norms", xlabel="length (tokens)", xscale="log", yscale="log")
    axes.legend(frameon=False, fontsize=8)
