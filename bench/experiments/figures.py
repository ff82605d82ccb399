# ruff: noqa: RUF001
"""Figures, summaries and the report's tables, from the committed data alone.

python -m bench.experiments.figures              # rewrites the figures and summary.json
python -m bench.experiments.figures --markdown   # and prints the tables of REPORT.md
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from bench.experiments import RESULTS, countdown_analysis, tables, variance_analysis
from bench.experiments.countdown import finished
from bench.experiments.tables import LABELS, TITLES

CURVES = {
    "length": "response length",
    "entropy": "entropy (nats a token)",
    "gradient_norm": "gradient norm",
    "clip_rate": "clipped tokens",
}


def variance_figure(folder: Path, summary: dict) -> Path:
    """Squared deviation against length for every model, and the noise of the methods."""
    models = variance_analysis.load(folder)
    figure, axes = plt.subplots(
        1,
        2 * len(models),
        figsize=(4.6 * len(models) * 2, 3.8),
        squeeze=False,
        layout="constrained",
    )
    for column, measured in enumerate(models):
        numbers = summary[measured.name]["blocks"]["all"]
        left, right = axes[0][2 * column : 2 * column + 2]
        values = variance_analysis.per_advantage(measured.table, "deviation2_all")
        lengths = measured.table.length.to_numpy(float)
        left.scatter(lengths, values, s=5, alpha=0.35, linewidths=0)
        ends = np.array([lengths.min(), lengths.max()])
        centre = np.exp(np.log(lengths).mean()), np.exp(np.log(values).mean())
        slope = numbers["exponent"]
        for beta, style, label in (
            (slope["beta"], "k-", f"fit: β = {tables.band(slope, 'beta')}"),
            (1.0, "k:", "β = 1, the paper's law"),
        ):
            left.plot(ends, centre[1] * (ends / centre[0]) ** beta, style, label=label)
        left.set(
            xscale="log", yscale="log", xlabel="response length L (tokens)",
            ylabel="|g - mean|² / A²", title=TITLES[measured.name],
        )  # fmt: skip
        left.legend(fontsize=8)
        methods = ["delta_l 1", "delta_l 0.75", "delta_l 0.5", "dr_grpo"]
        batches = numbers["batches"]
        ratios = [batches[f"variance ratio {m}"] for m in methods]
        right.errorbar(
            range(len(methods)), [r["value"] for r in ratios],
            yerr=[1.96 * r["error"] for r in ratios], fmt="o", capsize=4, label="measured",
        )  # fmt: skip
        for beta, marker, label in ((1.0, "x", "β = 1"), (slope["beta"], "_", "measured β")):
            predicted = [variance_analysis.predicted_ratio(measured, m, beta) for m in methods]
            right.plot(methods, predicted, "k" + marker, markersize=9, label=f"model, {label}")
        right.set(ylabel="variance of the mean gradient\nover that of ΔL α=1", title="batches")
        right.set_xticks(range(len(methods)), ["α=1\n= GRPO", "0.75", "0.5", "0\n= DAPO, Dr."])
        right.legend(fontsize=8)
    return save(figure, folder / "variance.png")


def countdown_figure(folder: Path) -> Path:
    """Held-out accuracy and the training curves, mean over the seeds."""
    table = countdown_analysis.matched(finished(folder / "runs.jsonl"))
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.6), layout="constrained")
    panels = axes.ravel()
    for method, by_seed in table.items():
        runs = list(by_seed.values())
        steps = [e["step"] for e in runs[0]["evaluations"]]
        for panel, key in zip(panels[:2], ("avg", "pass"), strict=True):
            scores = np.array([[e[key] for e in run["evaluations"]] for run in runs])
            panel.plot(steps, scores.mean(0), marker=".", label=LABELS[method])
            panel.fill_between(steps, scores.min(0), scores.max(0), alpha=0.08)
        for panel, key in zip(panels[2:], CURVES, strict=True):
            values = np.array([run["curve"][key] for run in runs]).mean(0)
            panel.plot(values, linewidth=1)
    labels = ["held-out Avg@8", "held-out Pass@8", *CURVES.values()]
    for panel, label in zip(panels, labels, strict=True):
        panel.set(xlabel="step", ylabel=label)
    panels[0].legend(fontsize=7)
    seeds = len(next(iter(table.values())))
    figure.suptitle(f"CountDown: mean over {seeds} seeds; bands are their range")
    return save(figure, folder / "countdown.png")


def save(figure, path: Path) -> Path:
    """A small PNG: a palette takes a third of the bytes."""
    pixels = io.BytesIO()
    figure.savefig(pixels, dpi=90, format="png")
    plt.close(figure)
    Image.open(pixels).convert("RGB").quantize(128).save(path, optimize=True)
    return path


def main(arguments: list[str] | None = None) -> None:
    """Rewrite what follows from the data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print the tables of the report")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    variance, countdown = options.results / "variance", options.results / "countdown"
    if any(variance.glob("*-gram.json")):
        summary = {m.name: variance_analysis.summarize(m) for m in variance_analysis.load(variance)}
        (variance / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(variance_figure(variance, summary))
        if options.markdown:
            print(tables.exponents(summary), tables.batches(summary), sep="\n\n")
    if (countdown / "runs.jsonl").exists():
        start = json.loads((countdown / "start.json").read_text())
        summary = {  # a file for each setting: learning rate, scale
            path.stem: countdown_analysis.summarize(finished(path), start)
            for path in sorted(countdown.glob("runs*.jsonl"))
        }
        (countdown / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(countdown_figure(countdown))
        if options.markdown:
            for name, numbers in summary.items():
                print(f"\n{name}\n", tables.countdown(numbers), sep="\n")


if __name__ == "__main__":
    main()
