"""What the committed runs of the CountDown experiment say."""

from __future__ import annotations

import math

import numpy as np

from bench.experiments.variance_analysis import spearman

BASELINE = "delta_l 1"  # the paper's choice for CountDown; the others are compared with it
# 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: list[float]) -> dict:
    """Mean and 95 % interval of a few independent numbers (Student's t)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "low": math.nan, "high": math.nan}
    half = STUDENT[len(values) - 2] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def matched(runs: list[dict]) -> dict[str, dict[int, dict]]:
    """method -> seed -> run, for the seeds that every method has finished.

    Raises ValueError if the runs differ in more than method and seed.
    """
    configs = [config_of(run) for run in runs]
    for config in configs:
        if config != configs[0]:
            raise ValueError(
                f"runs of different settings in one file: {configs[0]} and {config}. Give each "
                "setting a file of its own (--output)"
            )
    by_method: dict[str, dict[int, dict]] = {}
    for run in runs:
        by_method.setdefault(run["method"], {})[run["seed"]] = run
    common = set.intersection(*(set(seeds) for seeds in by_method.values()))
    return {m: {s: seeds[s] for s in sorted(common)} for m, seeds in by_method.items()}


def summarize(runs: list[dict], start: dict) -> dict:
    """Per method: held-out accuracy after training, and the difference to BASELINE by seed."""
    methods = {}
    table = matched(runs)
    for method, by_seed in table.items():
        final = {s: r["final"] for s, r in by_seed.items()}
        base = {s: table[BASELINE][s]["final"] for s in by_seed}
        record = {
            "avg": interval([final[s]["avg"] for s in final]),
            "pass": interval([final[s]["pass"] for s in final]),
            "length": interval([final[s]["length"] for s in final]),
            "avg_by_seed": {str(s): final[s]["avg"] for s in final},
            "monotonicity": interval([monotonicity(r) for r in by_seed.values()]),
            "gradient_norm_variation": interval([variation(r) for r in by_seed.values()]),
            "entropy_at_end": interval([r["curve"]["entropy"][-1] for r in by_seed.values()]),
            "clip_rate": interval(
                [float(np.mean(r["curve"]["clip_rate"])) for r in by_seed.values()]
            ),
        }
        if method != BASELINE:
            for key in ("avg", "pass"):
                difference = interval([base[s][key] - final[s][key] for s in final])
                difference["excludes_0"] = bool(difference["low"] > 0 or difference["high"] < 0)
                record[f"baseline_minus_this_{key}"] = difference
        methods[method] = record
    return {
        "config": config_of(runs[0]),
        "seeds": sorted(next(iter(table.values()))),
        "before": {key: start[key] for key in ("avg", "pass", "length")},
        "methods": methods,
    }


RESULTS_OF_A_RUN = ("method", "seed", "constant", "seconds", "final", "evaluations", "curve")


def config_of(run: dict) -> dict:
    return {k: v for k, v in run.items() if k not in RESULTS_OF_A_RUN}


def monotonicity(run: dict) -> float:
    """Spearman(step, held-out accuracy): our own definition, the paper's is not published."""
    steps = np.array([e["step"] for e in run["evaluations"]])
    return spearman(steps, np.array([e["avg"] for e in run["evaluations"]]))


def variation(run: dict) -> float:
    """Deviation over mean of the gradient norms of the steps: free of a method's scale."""
    norms = np.array(run["curve"]["gradient_norm"])
    return float(norms.std() / norms.mean()) if norms.any() else math.nan
