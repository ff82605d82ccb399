"""How the gradient of a sequence varies with its length, and what that does to a batch.

    python -m bench.experiments.variance                  # SmolLM2-135M, then the tiny model
    python -m bench.experiments.variance --device cuda --samples 64

Weights are fixed, sampling is at temperature 1, the reward is 0 or 1 and its group mean the
baseline; prompts whose responses all score alike (A = 0) are dropped. A finished prompt is a file
under out/, which a second start skips; ``--collect-only`` reduces what is there to the committed
data: one row per sequence, and the inner products of the prompts' weighted gradient sums.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import logging

from bench.experiments import RAW, RESULTS, tiny
from bench.experiments import countdown_task as task
from bench.experiments.gradients import BLOCKS, score_function
from bench.experiments.smollm import Products
from dl_norm import sequence_weights
from dl_norm.monitor import variance_proxy

EXPONENTS = (0.0, 0.5, 0.75, 1.0)  # sums of L^-e g: every method is one of them, times a scalar
SIZE = 4096  # numbers kept of a gradient


class CountDown:
    """The warm-started tiny model of the CountDown experiment, on its training problems."""

    max_tokens = tiny.MAX_TOKENS

    def __init__(self, folder: Path, prompts: int, seed: int, device: str):
        warm = tiny.WarmStart()
        self.model = tiny.warm_start(folder, warm, device).eval()
        self.problems = task.split(warm.held_out)[0][:prompts]
        self.device = device

    def prompt(self, index: int) -> Tensor:
        """(P,) token ids of one prompt."""
        return torch.tensor(self.problems[index].prompt(), device=self.device)

    def sample(self, index: int, samples: int, seed: int) -> list[Tensor]:
        """Responses at temperature 1, (L,) token ids each."""
        generator = torch.Generator(self.device).manual_seed(seed)
        prompts = self.prompt(index).expand(samples, -1)
        tokens, _, mask = tiny.sample(self.model, prompts, task.END, self.max_tokens, generator)
        return [row[:length] for row, length in zip(tokens, mask.sum(1).tolist(), strict=True)]

    def rewards(self, index: int, responses: list[Tensor]) -> list[float]:
        """1 for a valid derivation."""
        return [task.reward(self.problems[index], row.tolist()) for row in responses]


SOURCES = {"smollm2": Products, "tiny": CountDown}
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "tiny": "tiny"}


def measure(name: str, prompts: int, samples: int, seed: int, device: str) -> None:
    """Sample every prompt that is not on disk yet, with the score of each response."""
    folder = raw_folder(name, samples, seed)
    missing = [i for i in range(prompts) if not (folder / f"{i}.npz").exists()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    source = SOURCES[name](RAW / MODELS[name], prompts, seed, device)
    score = score_function(source.model, SIZE)
    for index in tqdm(missing, desc=name, mininterval=5):
        responses = source.sample(index, samples, seed=10_000 * seed + index)
        rewards = np.array(source.rewards(index, responses))
        arrays = {
            "length": np.array([len(r) for r in responses]),
            "truncated": np.array([len(r) == source.max_tokens for r in responses]),
            "reward": rewards,
        }
        if rewards.min() < rewards.max():
            prompt = source.prompt(index)
            scores = [score(torch.cat([prompt, r]), len(prompt)) for r in responses]
            arrays["vocabulary_proxy"] = np.array([s.vocabulary_proxy for s in scores])
            arrays["proxy"] = np.array(
                [variance_proxy(s.log_probs[None], torch.ones(1, len(s.log_probs))).item()
                 for s in scores]
            )  # fmt: skip
            for block in BLOCKS:
                arrays[f"sketch_{block}"] = torch.stack([s.sketch[block] for s in scores]).numpy()
                arrays[f"norm2_{block}"] = np.array([s.squared_norm[block] for s in scores])
        unfinished = folder / f"{index}.part.npz"
        np.savez(unfinished, **arrays)
        unfinished.rename(folder / f"{index}.npz")


def raw_folder(name: str, samples: int, seed: int) -> Path:
    """Where the prompts of a configuration are kept."""
    return RAW / "variance" / f"{name}-{samples}-{seed}"


def collect(name: str, prompts: int, samples: int, seed: int, output: Path) -> None:
    """Reduce the finished prompts to the committed data."""
    folder = raw_folder(name, samples, seed)
    frames, sketches, dropped = [], {block: [] for block in BLOCKS}, 0
    for index in range(prompts):
        if not (folder / f"{index}.npz").exists():
            continue
        with np.load(folder / f"{index}.npz") as arrays:
            if "proxy" not in arrays:
                dropped += 1
                continue
            columns = ("length", "truncated", "reward", "proxy", "vocabulary_proxy")
            columns += tuple(f"norm2_{block}" for block in BLOCKS)
            frame = pd.DataFrame({column: arrays[column] for column in columns})
            frame.insert(0, "prompt", index)
            frame.insert(4, "advantage", frame.reward - frame.reward.mean())
            frames.append(frame)
            for block in BLOCKS:
                sketches[block].append(arrays[f"sketch_{block}"])
    table = pd.concat(frames, ignore_index=True)
    advantages = table.advantage.to_numpy()[:, None]
    grams, checks = {}, {}
    for block in BLOCKS:
        scores = np.concatenate(sketches[block]).astype(np.float64)
        gradients = advantages * scores
        exact = table[f"norm2_{block}"].to_numpy() * advantages[:, 0] ** 2
        table[f"sketch2_{block}"] = (scores**2).sum(1)
        # |g_i - mean of the others|^2, the norm of g_i itself exact
        table[f"deviation2_{block}"] = deviations(gradients, exact, np.zeros(len(table)))
        table[f"group_deviation2_{block}"] = deviations(gradients, exact, table.prompt.to_numpy())
        grams[block] = gram(gradients, table)
        checks[block] = same_batch_cosines(gradients, table, SOURCES[name].max_tokens)
    output.mkdir(parents=True, exist_ok=True)
    table.to_csv(output / f"{name}-sequences.csv", index=False, float_format="%.7g")
    record = {
        "config": {
            "model": MODELS[name], "samples": samples, "seed": seed, "temperature": 1.0,
            "max_tokens": SOURCES[name].max_tokens, "sketch": SIZE,
            "prompts": len(frames) + dropped, "prompts_dropped": dropped, "sequences": len(table),
            "torch": torch.__version__,
        },
        "prompts": sorted(table.prompt.unique().tolist()),
        "exponents": EXPONENTS,
        "same_batch_cosine_minimum": checks,
        "gram": grams,
    }  # fmt: skip
    (output / f"{name}-gram.json").write_text(json.dumps(record))
    print(f"{name}: {len(frames)} prompts with a gradient, {dropped} dropped; {output}", flush=True)


def deviations(gradients: np.ndarray, exact: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """|g_i - mean of the other sequences of i's group|^2, given the exact |g_i|^2."""
    result = np.empty(len(gradients))
    for group in np.unique(groups):
        rows = groups == group
        mine = gradients[rows]
        others = (mine.sum(0) - mine) / (len(mine) - 1)
        cross = (mine * others).sum(1)
        result[rows] = exact[rows] - 2 * cross + (others**2).sum(1)
    return result


def gram(gradients: np.ndarray, table: pd.DataFrame) -> list[list[float]]:
    """Inner products of the prompts' sums of L^-e g; rows by exponent, then by prompt."""
    sums = []
    for exponent in EXPONENTS:
        weighted = table.length.to_numpy()[:, None] ** -exponent * gradients
        sums += [weighted[rows].sum(0) for rows in table.groupby("prompt").indices.values()]
    stacked = np.stack(sums)
    return [[float(f"{value:.6g}") for value in row] for row in stacked @ stacked.T]


def same_batch_cosines(gradients: np.ndarray, table: pd.DataFrame, limit: int) -> dict[str, float]:
    """The smallest cosine over 64 batches of half the prompts, with the package's weights."""
    random = np.random.default_rng(0)
    prompts = table.prompt.unique()
    smallest = {"grpo, delta_l 1": 1.0, "dapo, dr_grpo": 1.0}
    for _ in range(64):
        rows = table.prompt.isin(random.choice(prompts, len(prompts) // 2, replace=False))
        lengths = torch.tensor(table.length[rows].to_numpy())
        batch = {}
        for method in ("grpo", "delta_l", "dapo", "dr_grpo"):
            constant = {"max_length": limit} if method in ("delta_l", "dr_grpo") else {}
            weights = sequence_weights(lengths, method, **constant).numpy()
            batch[method] = weights @ gradients[rows.to_numpy()]
        for pair, (a, b) in zip(smallest, (("grpo", "delta_l"), ("dapo", "dr_grpo")), strict=True):
            cosine = batch[a] @ batch[b] / np.linalg.norm(batch[a]) / np.linalg.norm(batch[b])
            smallest[pair] = min(smallest[pair], float(cosine))
    return smallest


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, then collect."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, help="per prompt (default: smollm2 12, tiny 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--collect-only", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "variance")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in options.models:
        samples = options.samples or {"smollm2": 12, "tiny": 64}[name]
        if not options.collect_only:
            measure(name, options.prompts, samples, options.seed, options.device)
        collect(name, options.prompts, samples, options.seed, options.output)


if __name__ == "__main__":
    main()
