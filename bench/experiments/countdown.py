"""CountDown with reinforcement learning: a tiny transformer, every aggregation, several seeds.

    python -m bench.experiments.countdown                  # two CPU cores, under an hour
    python -m bench.experiments.countdown --device cuda --prompts 64 --steps 400 --seeds 10

One supervised model is the start of every run. Runs of one seed see the same prompts in the same
order and differ in the weights of the sequences alone. A finished run is a line of the output
file; a second start skips it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bench.experiments import RAW, RESULTS, tiny
from bench.experiments import countdown_task as task
from dl_norm import policy_loss, sequence_weights

MICRO_BATCH = 4  # of the official code's "DAPO Norm"

# name -> (method, alpha) of sequence_weights; the last has weights of its own
METHODS = {
    "delta_l 1": ("delta_l", 1.0),
    "delta_l 0.75": ("delta_l", 0.75),
    "delta_l 0.5": ("delta_l", 0.5),
    "grpo": ("grpo", None),
    "dapo": ("dapo", None),
    "dr_grpo": ("dr_grpo", None),
    "dapo micro 4": (None, None),
}


@dataclass(frozen=True)
class Setting:
    """One run. ``prompts`` x ``samples`` responses a step, in ``updates`` mini-batches."""

    method: str = "delta_l 1"
    seed: int = 0
    scale: str = "matched"
    steps: int = 32
    prompts: int = 16
    samples: int = 8
    updates: int = 2
    learning_rate: float = 3e-4
    eps_low: float = 0.2
    eps_high: float = 0.3
    grad_clip: float = 1.0
    evaluate_every: int = 8
    evaluation_prompts: int = 64


def weights_of(method: str, lengths: Tensor) -> Tensor:
    """(G,) weights x_i over the rollout batch; M is the maximum response length."""
    if method == "dapo micro 4":
        # Token mean of each micro-batch, then the mean of those: not the token mean of the batch.
        sums = lengths.view(-1, MICRO_BATCH).sum(1, keepdim=True)
        return (1 / (sums * len(sums)).expand(-1, MICRO_BATCH)).reshape(-1).float()
    name, alpha = METHODS[method]
    options = {} if alpha is None else {"alpha": alpha}
    if name in ("delta_l", "dr_grpo"):
        options["max_length"] = tiny.MAX_TOKENS
    return sequence_weights(lengths, name, **options)


def scale_of(method: str, scale: str, lengths: Tensor) -> float:
    """The constant on a method's weights: 1, or what makes their sum 1/M at the start.

    The expected gradient is that sum times the true one. DeltaL and Dr. GRPO have 1/M already.
    """
    if scale == "raw":
        return 1.0
    return (1 / tiny.MAX_TOKENS / weights_of(method, lengths).sum()).item()


def advantages_of(rewards: Tensor, samples: int) -> Tensor:
    """Reward less the group's mean, over the group's deviation (GRPO)."""
    groups = rewards.view(-1, samples)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-6)).reshape(-1)


def rewards_of(problems: list[task.Problem], tokens: Tensor, mask: Tensor) -> Tensor:
    """One reward per response; the responses of a problem are next to each other."""
    rows = tiny.responses(tokens, mask)
    each = len(rows) // len(problems)
    return torch.tensor([task.reward(problems[i // each], row) for i, row in enumerate(rows)])


def evaluate(model, problems: list[task.Problem], samples: int, seed: int, device: str) -> dict:
    """Avg@n: mean reward; Pass@n: the share of problems with a right response among n."""
    generator = torch.Generator(device).manual_seed(seed)
    prompts = prompt_tensor(problems, samples, device)
    tokens, _, mask = tiny.sample(model, prompts, task.END, tiny.MAX_TOKENS, generator)
    rewards = rewards_of(problems, tokens, mask).view(-1, samples)
    return {
        "avg": rewards.mean().item(),
        "pass": rewards.amax(1).mean().item(),
        "length": mask.sum(1).float().mean().item(),
    }


def prompt_tensor(problems: list[task.Problem], samples: int, device: str) -> Tensor:
    """(problems x samples, PROMPT_TOKENS) ids, the copies of a prompt next to each other."""
    ids = torch.tensor([problem.prompt() for problem in problems], device=device)
    return ids.repeat_interleave(samples, dim=0)


def run(setting: Setting, folder: Path, warm: tiny.WarmStart, device: str = "cpu") -> dict:
    """Train one setting from the warm start; its curves."""
    model = tiny.warm_start(folder, warm, device)
    training, held_out = task.split(warm.held_out)
    random.Random(setting.seed).shuffle(training)
    generator = torch.Generator(device).manual_seed(setting.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setting.learning_rate, weight_decay=0.0, betas=(0.9, 0.95)
    )
    evaluations, steps, constant = [], [], None
    started = time.perf_counter()
    bar = tqdm(
        range(setting.steps + 1), desc=f"{setting.method}, seed {setting.seed}", mininterval=5
    )
    for step in bar:
        if step % setting.evaluate_every == 0 or step == setting.steps:
            score = evaluate(model, held_out[: setting.evaluation_prompts], 8, 1000 + step, device)
            evaluations.append({"step": step, **score})
            bar.set_postfix({k: f"{v:.2f}" for k, v in score.items()}, refresh=False)
        if step == setting.steps:
            break
        first = step * setting.prompts % (len(training) - setting.prompts)
        problems = training[first : first + setting.prompts]
        prompts = prompt_tensor(problems, setting.samples, device)
        tokens, old, mask = tiny.sample(model, prompts, task.END, tiny.MAX_TOKENS, generator)
        rewards = rewards_of(problems, tokens, mask).to(device)
        advantages = advantages_of(rewards, setting.samples)
        lengths = mask.sum(1)
        if constant is None:
            constant = scale_of(setting.method, setting.scale, lengths)
        weights = weights_of(setting.method, lengths) * constant * setting.updates
        record = {"reward": rewards.mean().item(), "length": lengths.float().mean().item()}
        updates = []
        for piece in torch.arange(len(tokens), device=device).chunk(setting.updates):
            inputs = torch.cat([prompts[piece], tokens[piece]], 1)
            logits = model(input_ids=inputs[:, :-1]).logits[:, task.PROMPT_TOKENS - 1 :]
            distribution = logits.float().log_softmax(-1)
            log_probs = distribution.gather(2, tokens[piece][:, :, None])[:, :, 0]
            loss, metrics = policy_loss(
                log_probs, old[piece], advantages[piece], mask[piece], weights[piece],
                eps_low=setting.eps_low, eps_high=setting.eps_high, return_metrics=True,
            )  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), setting.grad_clip)
            optimizer.step()
            with torch.no_grad():
                entropy = -(distribution.exp() * distribution).sum(-1)
                entropy = (entropy * mask[piece]).sum() / mask[piece].sum()
            summary = metrics.summary()
            clipped = summary["clip_fraction_low"] + summary["clip_fraction_high"]
            updates.append(torch.stack([entropy, norm, clipped]))
        means = torch.stack(updates).mean(0).tolist()
        record["entropy"], record["gradient_norm"], record["clip_rate"] = means
        steps.append(record)
    final = evaluate(model, held_out, 8, 999, device)  # on all of them, which the curve is not
    return {
        **asdict(setting),
        "warm_start": asdict(warm),
        "constant": constant,
        "seconds": round(time.perf_counter() - started, 1),
        "final": rounded(final),
        "evaluations": [rounded(e) for e in evaluations],
        "curve": {key: [float(f"{s[key]:.4g}") for s in steps] for key in steps[0]},
    }


def rounded(record: dict) -> dict:
    """Floats to six decimals, for a file that can be read."""
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}


def finished(path: Path) -> list[dict]:
    """The runs in an output file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def settings(options: argparse.Namespace) -> list[Setting]:
    """All runs that were asked for: every method of a seed before the next seed."""
    base = Setting(
        steps=options.steps,
        prompts=options.prompts,
        samples=options.samples,
        learning_rate=options.learning_rate,
        scale=options.scale,
        evaluation_prompts=options.evaluation_prompts,
    )
    return [
        replace(base, method=method, seed=seed)
        for seed in range(options.first_seed, options.first_seed + options.seeds)
        for method in options.methods
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run what is not in the output file yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Setting()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--scale", choices=["matched", "raw"], default=default.scale)
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--prompts", type=int, default=default.prompts, help="per step")
    parser.add_argument("--samples", type=int, default=default.samples, help="per prompt")
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    parser.add_argument("--evaluation-prompts", type=int, default=default.evaluation_prompts)
    parser.add_argument("--held-out", type=int, default=tiny.WarmStart().held_out, help="problems")
    parser.add_argument("--warm-steps", type=int, default=tiny.WarmStart().steps)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "countdown" / "runs.jsonl")
    parser.add_argument("--model", type=Path, default=RAW / "tiny", help="folder of the warm start")
    options = parser.parse_args(arguments)
    if options.samples % MICRO_BATCH:
        parser.error(f"--samples must be a multiple of {MICRO_BATCH}, got {options.samples}")
    warm = tiny.WarmStart(steps=options.warm_steps, held_out=options.held_out)
    done = [{k: r[k] for k in asdict(default)} for r in finished(options.output)]
    todo = [s for s in settings(options) if asdict(s) not in done]
    one = {"method": "", "seed": 0}  # all else is the same in a file
    if any({**record, **one} != {**asdict(todo[0]), **one} for record in done if todo):
        parser.error(f"{options.output} holds runs of other settings: name another with --output")
    print(f"{len(todo)} runs to do; results in {options.output}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    start = options.output.with_name("start.json")
    if not start.exists():  # what the final scores are to be compared with
        model = tiny.warm_start(options.model, warm, options.device)
        score = evaluate(model, task.split(warm.held_out)[1], 8, 999, options.device)
        start.write_text(json.dumps({**rounded(score), "warm_start": asdict(warm)}) + "\n")
    for setting in todo:
        line = json.dumps(run(setting, options.model, warm, options.device))
        with options.output.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
