"""What the committed data of the variance experiment say; `bench.experiments.figures` shows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from bench.experiments.gradients import BLOCKS
from dl_norm import theory

CONSISTENT = (0.7, 1.3)  # an interval of the exponent inside this agrees with the paper's 1
SPLITS = 2000  # random pairs of disjoint batches
# name -> (method, exponent of the length in its weights)
METHODS = {
    "delta_l 1": ("delta_l", 1.0),
    "delta_l 0.75": ("delta_l", 0.75),
    "delta_l 0.5": ("delta_l", 0.5),
    "grpo": ("grpo", 1.0),
    "dapo": ("dapo", 0.0),
    "dr_grpo": ("dr_grpo", 0.0),
}


@dataclass(frozen=True)
class Measured:
    """The committed data of one model."""

    name: str
    table: pd.DataFrame  # a row per sequence
    record: dict  # configuration, and inner products of the prompts' weighted gradient sums


def load(folder: Path) -> list[Measured]:
    """Every model in the folder."""
    return [
        Measured(
            path.name.removesuffix("-gram.json"),
            pd.read_csv(path.with_name(path.name.replace("-gram.json", "-sequences.csv"))),
            json.loads(path.read_text()),
        )
        for path in sorted(folder.glob("*-gram.json"))
    ]


def per_advantage(table: pd.DataFrame, column: str) -> np.ndarray:
    """A column of squared norms of g_i over A_i^2."""
    return (table[column] / table.advantage**2).to_numpy()


def exponent(table: pd.DataFrame, values: np.ndarray) -> dict:
    """The slope of log values on log length, with its bootstrap interval over prompts."""
    found = theory.estimate_exponent(table.length, values, table.prompt)
    return {"beta": found.beta, "low": found.low, "high": found.high}


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation; NaN where one of them is constant."""
    ranks = [pd.Series(v).rank() for v in (x, y)]
    if min(r.std() for r in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def summarize(measured: Measured) -> dict:
    """The headline numbers of one model."""
    table = measured.table
    low, high = CONSISTENT
    blocks = {}
    for block in BLOCKS:
        truth = per_advantage(table, f"deviation2_{block}")
        slope = exponent(table, truth)
        length = np.log(table.length.to_numpy())
        blocks[block] = {
            "exponent": slope | {"consistent": low <= slope["low"] and slope["high"] <= high},
            "exponent_against_group_mean": exponent(
                table, per_advantage(table, f"group_deviation2_{block}")
            ),
            "exponent_of_complete_responses": exponent(
                table[~table.truncated], truth[~table.truncated.to_numpy()]
            ),
            "exponent_within_prompts": within_prompts(table, truth),
            "rank_correlation_with_length": spearman(length, truth),
            "rank_correlation_with_proxy": spearman(table.proxy.to_numpy(), truth),
            "rank_correlation_with_proxy_per_token": spearman(
                (table.proxy / table.length).to_numpy(), truth / table.length.to_numpy()
            ),
            "same_batch_cosine_minimum": measured.record["same_batch_cosine_minimum"][block],
            "batches": aggregated(measured, block),
        }
    return {
        "config": measured.record["config"],
        "lengths": {
            "mean": float(table.length.mean()),
            "min": int(table.length.min()),
            "max": int(table.length.max()),
            "truncated": float(table.truncated.mean()),
            "reward": float(table.reward.mean()),
        },
        "exponent_of_proxy": exponent(table, table.proxy.to_numpy()),
        "exponent_of_vocabulary_proxy": exponent(table, table.vocabulary_proxy.to_numpy()),
        "blocks": blocks,
    }


def within_prompts(table: pd.DataFrame, values: np.ndarray) -> dict:
    """The exponent from differences inside a prompt: easy and hard prompts cannot make it."""
    logs = pd.DataFrame({"p": table.prompt, "x": np.log(table.length), "y": np.log(values)})
    centred = logs[["x", "y"]] - logs.groupby("p")[["x", "y"]].transform("mean")
    sums = pd.DataFrame({"xx": centred.x**2, "xy": centred.x * centred.y}).groupby(logs.p).sum()
    draws = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), 2000)
    xx, xy = (draws @ sums[c].to_numpy() for c in ("xx", "xy"))
    low, high = np.quantile(xy[xx > 0] / xx[xx > 0], [0.025, 0.975])
    return {"beta": float(sums.xy.sum() / sums.xx.sum()), "low": float(low), "high": float(high)}


def aggregated(measured: Measured, block: str) -> dict:
    """Noise of a batch gradient under each method, with jackknife errors over prompts.

    Two batches without a common prompt are independent, so the inner product of their gradients
    estimates |mean|^2 without bias (a U-statistic); the mean of the squared norms less that is the
    variance. ``variance`` is that of the gradient over sum_i x_i, the weighted mean of the g_i.
    """
    count = len(measured.record["prompts"])
    everything = np.arange(count)
    full = _batch_statistics(measured, block, everything, count)
    left_out = [
        _batch_statistics(measured, block, np.delete(everything, p), count) for p in range(count)
    ]
    result = {}
    for key, value in full.items():
        others = np.array([statistics[key] for statistics in left_out])
        error = np.sqrt((count - 1) / count * ((others - others.mean()) ** 2).sum())
        result[key] = {"value": value, "error": float(error)}
    return result


def _batch_statistics(
    measured: Measured, block: str, prompts: np.ndarray, count: int
) -> dict[str, float]:
    size = (count - 1) // 2  # prompts in a batch, the same with one prompt left out
    random = np.random.default_rng(0)
    order = np.argsort(random.random((SPLITS, len(prompts))), axis=1)
    halves = np.zeros((2, SPLITS, len(prompts)))
    np.put_along_axis(halves[0], order[:, :size], 1, axis=1)
    np.put_along_axis(halves[1], order[:, size : 2 * size], 1, axis=1)

    exponents = list(measured.record["exponents"])
    products = np.array(measured.record["gram"][block])
    products = products.reshape(len(exponents), count, len(exponents), count)
    by_prompt = [
        rows.length.to_numpy(float) for _, rows in measured.table.groupby("prompt", sort=True)
    ]

    # Over sum_i x_i every method is sum_i L^-e g_i / sum_i L^-e: two of them share a direction,
    # and their scales, which differ from batch to batch, are put back below.
    def total(power: float) -> np.ndarray:
        per_prompt = np.array([(by_prompt[p] ** power).sum() for p in prompts])
        return halves @ per_prompt  # (2, SPLITS)

    scale = {
        method: {"delta_l": 1 / total(-e), "dr_grpo": 1 / total(0), "grpo": 1 / total(0)}.get(
            kind, 1 / total(1)
        )
        for method, (kind, e) in METHODS.items()
    }
    unbiased = {method: 1 / total(-e) for method, (_, e) in METHODS.items()}

    def inner(a: str, b: str, scales: dict, first: int, second: int) -> float:
        rows, columns = (exponents.index(METHODS[m][1]) for m in (a, b))
        part = products[rows][prompts][:, columns][:, prompts]
        values = ((halves[first] @ part) * halves[second]).sum(1)
        return float((values * scales[a][first] * scales[b][second]).mean())

    def moments(method: str, scales: dict) -> tuple[float, float]:
        square = inner(method, method, scales, 0, 0) + inner(method, method, scales, 1, 1)
        mean = inner(method, method, scales, 0, 1)
        return mean, square / 2 - mean

    result = {}
    first_mean, first_variance = moments("delta_l 1", unbiased)
    for method in METHODS:
        mean, variance = moments(method, scale)
        result[f"cv2 {method}"] = variance / mean
        result[f"signal {method}"] = mean / (mean + variance)  # share of E|g|^2 that is |mean|^2
        _, variance = moments(method, unbiased)
        result[f"variance ratio {method}"] = variance / first_variance
    other_mean, _ = moments("dr_grpo", unbiased)
    cross = inner("delta_l 1", "dr_grpo", unbiased, 0, 1)
    cross = (cross + inner("delta_l 1", "dr_grpo", unbiased, 1, 0)) / 2
    norms = first_mean * other_mean
    result["cosine of means delta_l 1, dr_grpo"] = (
        cross / norms**0.5 if norms > 0 and first_mean > 0 else float("nan")
    )
    result["norm of mean dr_grpo over delta_l 1"] = (
        (other_mean / first_mean) ** 0.5 if norms > 0 and first_mean > 0 else float("nan")
    )
    return result


def predicted_ratio(measured: Measured, method: str, beta: float) -> float:
    """The paper's model's ``variance ratio`` for the lengths of all sequences as one batch."""
    lengths = measured.table.length.to_numpy(float)

    def noise(e: float) -> float:
        weights = lengths**-e / (lengths**-e).sum()
        return float((weights**2 * lengths**beta).sum())

    return noise(METHODS[method][1]) / noise(1.0)
