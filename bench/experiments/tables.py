# ruff: noqa: RUF001
"""The tables of REPORT.md, from the summaries."""

from __future__ import annotations

from collections.abc import Callable

from bench.experiments.gradients import BLOCKS

TITLES = {"smollm2": "SmolLM2-135M-Instruct", "tiny": "tiny transformer"}
BLOCK_TITLES = {"all": "all parameters", "qkv": "Q/K/V of three layers"}
LABELS = {
    "delta_l 1": "ΔL α=1",
    "delta_l 0.75": "ΔL α=0.75",
    "delta_l 0.5": "ΔL α=0.5",
    "grpo": "GRPO",
    "dapo": "DAPO",
    "dr_grpo": "Dr. GRPO",
    "dapo micro 4": "DAPO, micro-batches of 4",
}
# key of the summary of a block -> label
EXPONENTS = {
    "exponent_within_prompts": "– from differences within prompts",
    "exponent_of_complete_responses": "– without responses that were cut off",
    "exponent_against_group_mean": "– with the prompt's own mean subtracted",
}


def band(numbers: dict, key: str = "mean", digits: int = 2) -> str:
    """``1.02 [0.98, 1.05]``."""
    value, low, high = (f"{numbers[k]:.{digits}f}" for k in (key, "low", "high"))
    return f"{value} [{low}, {high}]"


def row(label: str, items: list, cell: Callable[[dict], str]) -> str:
    """A line of Markdown, one cell an item."""
    return f"| {label} | " + " | ".join(cell(item) for item in items) + " |"


def header(label: str, titles: list[str]) -> list[str]:
    """The first two lines of a table."""
    return [row(label, titles, str), "|---|" + "---:|" * len(titles)]


def exponents(summary: dict) -> str:
    """The exponent of the variance in length, per model and block."""
    models = list(summary.values())
    lines = header("", [TITLES[name] for name in summary])
    lines += [
        row("prompts with a gradient, responses", models, _sizes),
        row("length: mean, range, cut off", models, _lengths),
        row("mean reward", models, lambda m: f"{m['lengths']['reward']:.2f}"),
    ]
    for block in BLOCKS:
        parts = [model["blocks"][block] for model in models]
        lines.append(
            row(f"**β̂, {BLOCK_TITLES[block]}**", parts, lambda p: band(p["exponent"], "beta"))
        )
        lines.append(
            row(
                "– within [0.7, 1.3]",
                parts,
                lambda p: "yes" if p["exponent"]["consistent"] else "**no**",
            )
        )
        for key, label in EXPONENTS.items():
            lines.append(row(label, parts, lambda p, key=key: band(p[key], "beta")))
        for what in ("length", "proxy"):
            key = f"rank_correlation_with_{what}"
            lines.append(row(f"– Spearman with the {what}", parts, lambda p, k=key: f"{p[k]:.2f}"))
    lines += [
        row("β̂ of the monitor's proxy", models, lambda m: band(m["exponent_of_proxy"], "beta")),
        row(
            "β̂ of the same from all logits",
            models,
            lambda m: band(m["exponent_of_vocabulary_proxy"], "beta"),
        ),
    ]
    return "\n".join(lines)


def _sizes(model: dict) -> str:
    config = model["config"]
    used = config["prompts"] - config["prompts_dropped"]
    return f"{used} of {config['prompts']}, {config['sequences']}"


def _lengths(model: dict) -> str:
    return "{mean:.0f}, {min}–{max}, {truncated:.0%}".format(**model["lengths"])


def batches(summary: dict) -> str:
    """Noise of a batch gradient under each method, ± one standard error."""
    columns = [(name, block) for name in summary for block in BLOCKS]
    parts = [summary[name]["blocks"][block] for name, block in columns]
    lines = header("", [f"{TITLES[name]}, {BLOCK_TITLES[block]}" for name, block in columns])

    def statistic(label: str, key: str, digits: int) -> str:
        def cell(part: dict) -> str:
            numbers = part["batches"][key]
            return f"{numbers['value']:.{digits}f} ± {numbers['error']:.{digits}f}"

        return row(label, parts, cell)

    methods = [method for method in LABELS if method != "dapo micro 4"]
    lines += [statistic(f"CV², {LABELS[m]}", f"cv2 {m}", 2) for m in methods]
    lines += [
        statistic(f"variance, {LABELS[m]} over ΔL α=1", f"variance ratio {m}", 3)
        for m in ("delta_l 0.75", "delta_l 0.5", "dr_grpo")
    ]
    lines += [
        statistic("cos(mean ΔL α=1, mean Dr. GRPO)", "cosine of means delta_l 1, dr_grpo", 3),
        statistic(
            "norm of the mean, Dr. GRPO over ΔL α=1", "norm of mean dr_grpo over delta_l 1", 3
        ),
        row(
            "1 - smallest cosine in one batch",
            parts,
            lambda p: f"{1 - min(p['same_batch_cosine_minimum'].values()):.0e}",
        ),
    ]
    return "\n".join(lines)


def countdown(summary: dict) -> str:
    """Held-out accuracy after training, and the difference to the baseline, by seed."""
    lines = [
        "| | Avg@8 | ΔL α=1 less this | Pass@8 | ΔL α=1 less this | length | entropy "
        "| CV of the gradient norm | monotonicity |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    before = summary["before"]
    cells = [f"{before['avg']:.3f}", "–", f"{before['pass']:.3f}", "–", f"{before['length']:.1f}"]
    lines.append(row("before", [*cells, "–", "–", "–"], str))
    for method, numbers in summary["methods"].items():
        cells = []
        for key in ("avg", "pass"):
            cells.append(band(numbers[key], digits=3))
            difference = numbers.get(f"baseline_minus_this_{key}")
            mark = "**" if difference and difference["excludes_0"] else ""
            cells.append(mark + band(difference, digits=3) + mark if difference else "–")
        cells.append(f"{numbers['length']['mean']:.1f}")
        for key in ("entropy_at_end", "gradient_norm_variation", "monotonicity"):
            cells.append(f"{numbers[key]['mean']:.2f}")
        lines.append(row(LABELS[method], cells, str))
    return "\n".join(lines)
