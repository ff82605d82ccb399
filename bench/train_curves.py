"""The same training with TRL's loss and with ours: do the curves lie on each other?

python -m bench.train_curves                  200 steps of a small model, float32
python -m bench.train_curves --shape 0.5b     Qwen2.5-0.5B's shape, on a GPU
python -m bench.train_curves --from FILE.json the figure and table of an earlier run

A randomly initialised model is rewarded for even tokens. Every contestant starts from the same
weights and draws from the same random numbers, so until rounding flips a sampled token the
rollouts are the same too. TRL with another seed shows how far apart trainings are that differ by
chance alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import record
from bench.train_step import KINDS, SHAPES, Shape, make_model, make_trainer

CURVES = {"reward": "reward", "entropy": "entropy", "grad_norm": "gradient norm"}
BASE = "TRL"
CHANCE = "TRL, another seed"
SMALL = Shape(64, 128, 2, 4, 2, 64, 32, 4, 32)  # <eos> is 1 token of 64: lengths differ
TINY = Shape(16, 32, 1, 2, 1, 32, 8, 2, 8)


def reward(completion_ids: list[list[int]], **_) -> list[float]:
    """The share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def train(kind: str, seed: int, shape: Shape, steps: int, device: torch.device) -> dict[str, list]:
    """name -> its value at every step."""
    model = make_model(shape, torch.float32, seed=seed).to(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            kind, model, shape, folder, reward, max_steps=steps, learning_rate=1e-3, seed=seed,
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
            max_grad_norm=1.0,
        )  # fmt: skip
        trainer.train()
    history = [record for record in trainer.state.log_history if "reward" in record]
    return {name: [record[name] for record in history] for name in CURVES}


def run(shape: Shape, steps: int, device: torch.device) -> dict[str, dict[str, list]]:
    """contestant -> curves."""
    curves = {kind: train(kind, 0, shape, steps, device) for kind in KINDS}
    return {**curves, CHANCE: train(BASE, 1, shape, steps, device)}


def distances(curves: dict[str, dict[str, list]]) -> dict[str, dict[str, float]]:
    """Mean over the steps of the distance to TRL's curve, over the mean of TRL's curve."""
    return {
        name: {
            key: float(np.abs(np.subtract(own[key], curves[BASE][key])).mean())
            / float(np.mean(curves[BASE][key]))
            for key in CURVES
        }
        for name, own in curves.items()
        if name != BASE
    }


def same_steps(curves: dict[str, dict[str, list]], name: str) -> int:
    """Steps before the rewards differ: the rollouts are then no longer the same."""
    differ = np.not_equal(curves[name]["reward"], curves[BASE]["reward"]).nonzero()[0]
    return int(differ[0]) if differ.size else len(curves[name]["reward"])


def show(report: dict[str, Any]) -> None:
    curves = report["curves"]
    table = Table(
        "", *CURVES.values(), "same rollouts, steps",
        title=f"{report['device']}: mean relative distance to {BASE}, {report['steps']} steps",
    )  # fmt: skip
    for name, found in distances(curves).items():
        cells = (f"{found[key]:.1e}" for key in CURVES)
        table.add_row(name, *cells, str(same_steps(curves, name)))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(CURVES), figsize=(13, 3.6), layout="constrained")
    for panel, (key, label) in zip(axes, CURVES.items(), strict=True):
        for number, (name, own) in enumerate(report["curves"].items()):
            style = {"color": "0.75", "zorder": 0} if name == CHANCE else {}
            if name != CHANCE:
                style = {"linewidth": 4 - number, "alpha": 0.8}
            panel.plot(range(1, len(own[key]) + 1), own[key], label=name, **style)
        panel.set(xlabel="step", ylabel=label)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train_curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source", type=Path, help="show this result, run nothing")
    parser.add_argument("--shape", choices=SHAPES, help="default: a small model of its own")
    parser.add_argument("--tiny", action="store_true", help="4 steps of a toy, to try the command")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    options = parser.parse_args(arguments)
    if options.source:
        report, path = json.loads(options.source.read_text()), options.source
    else:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        shape = TINY if options.tiny else SHAPES[options.shape] if options.shape else SMALL
        steps = min(options.steps, 4) if options.tiny else options.steps
        report = {
            "suite": "train_curves",
            **record.origin(device, record.command_line("bench.train_curves", arguments)),
            "shape": asdict(shape),
            "steps": steps,
            "notes": KINDS,
            "curves": run(shape, steps, device),
        }
        path = record.save(report, report["suite"], options.results, indent=None)
    draw(report, path.with_suffix(".png"))
    show(report)
    print(f"written: {path} and {path.with_suffix('.png').name}")
    return path


if __name__ == "__main__":
    main()
