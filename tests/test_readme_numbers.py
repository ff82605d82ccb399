# ruff: noqa: RUF001
"""The figures of the pages are those of the files in bench/results/, which bench/ wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "bench" / "README.md").read_text()
README = (ROOT / "README.md").read_text()


def results(name: str) -> dict[str, Any]:
    (path,) = (ROOT / "bench" / "results").glob(f"amd-epyc-cpu-2-threads-{name}-2*.json")
    return json.loads(path.read_text())


def measured(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(case, contestant) -> row, of those that ran."""
    rows = results(name)["rows"]
    return {(row["case"], row["contestant"]): row for row in rows if row["time"]}


def microseconds(row: dict[str, Any]) -> str:
    return f"{row['time']['median'] * 1e6:,.0f}"


def milliseconds(row: dict[str, Any]) -> str:
    value = row["time"]["median"] * 1e3
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def line(label: str, *cells: str) -> str:
    return f"| {' | '.join((label, *cells))} |"


def log_prob_lines() -> Iterator[str]:
    rows = measured("log-probs")
    for label, case in {
        "8×128": "8x128",
        "64×1024": "64x1024",
        "64×2048": "64x2048",
        "128×4096, 40 % filled": "128x4096 40%",
        "packed, 0.2 M tokens": "packed 0.2M",
    }.items():
        cells = [microseconds(rows[case, "dl_norm"])]
        for name in ("reference", "torch.compile", "TRL", "verl"):
            row = rows.get((case, name))
            cells.append(f"{microseconds(row)} ({row['ratio_to_ours']:.1f}×)" if row else "–")
        yield line(label, *cells)


def kept_lines() -> Iterator[str]:
    (path,) = (ROOT / "bench" / "results").glob("amd-epyc-cpu-1-threads-kept-*.json")
    rows = {(r["case"], r["contestant"]): r for r in json.loads(path.read_text())["rows"]}
    for label, case in {
        "256×896, V = 151,936": "256x896x151936",
        "the same, and momentum of the head": "256x896x151936 momentum",
        "the same, head frozen": "256x896x151936 frozen head",
    }.items():
        cells = []
        for name in ("dl_norm", "masked logits", "full head"):
            row = rows[case, name]
            more = "" if name == "dl_norm" else f" ({row['ratio_to_ours']:.0f}×)"
            time = f"{row['time']['median'] * 1e3:,.{1 if name == 'dl_norm' else 0}f}"
            cells.append(f"{time}, {row['peak_bytes'] / 1e6:,.0f}{more}")
        yield line(label, *cells)


def traffic_lines() -> Iterator[str]:
    path = sorted((ROOT / "bench" / "results").glob("sm-90-ptx-traffic-*.json"))[-1]
    rows = {(row["entry"], row["contestant"]): row for row in json.loads(path.read_text())["rows"]}
    for label, entry, contestant in (
        ("log-probs", "log_probs 64x1024 100% float32", "dl_norm"),
        ("with metrics", "log_probs 64x1024 100% float32", "dl_norm + metrics"),
        ("bfloat16", "log_probs 64x1024 100% bfloat16", "dl_norm"),
        ("bfloat16 with metrics", "log_probs 64x1024 100% bfloat16", "dl_norm + metrics"),
        ("log-probs, 40 % filled", "log_probs 16x8192 40% float32", "dl_norm"),
        ("logits, bfloat16", "logits 24x151936 none clipped bfloat16", "dl_norm"),
        ("– Liger-Kernel", "logits 24x151936 none clipped bfloat16", "Liger"),
        ("– TRL", "logits 24x151936 none clipped bfloat16", "TRL"),
        ("log-probs of logits, bfloat16", "token_log_probs 24x151936 bfloat16", "dl_norm"),
        ("– Liger-Kernel", "token_log_probs 24x151936 bfloat16", "Liger"),
        ("– TRL", "token_log_probs 24x151936 bfloat16", "TRL"),
    ):
        row = rows[entry, contestant]
        total = {k: sum(w[k] for w in row["work"]) for k in ("bytes", "instructions", "special")}
        yield line(
            label, f"{row['floor'] / row['units']:.1f}", f"{total['bytes'] / row['units']:.2f}",
            f"{32 * total['instructions'] / row['units']:.1f}",
            f"{32 * total['special'] / row['units']:.2f}", f"{row['barriers']:.0f}",
        )  # fmt: skip


def head_lines() -> Iterator[str]:
    for label, suite, case, names in (
        ("hidden 1024×256, V = 16,384", "linear", "1024x256x16384",
         ("plain", "torch.compile", "TRL", "Liger chunked")),
        ("the same, 40 % filled", "linear", "1024x256x16384 40%",
         ("plain", "torch.compile", "TRL", "Liger chunked")),
        ("hidden, with an entropy bonus", "entropy", "1024x256x16384",
         ("plain", "torch.compile", "", "")),
        ("the same, 40 % filled", "entropy", "1024x256x16384 40%",
         ("plain", "torch.compile", "", "")),
        ("logits 512×16,384", "logits", "512x16384", ("plain", "torch.compile", "TRL", "")),
        ("the same, 40 % filled", "logits", "512x16384 40%",
         ("plain", "torch.compile", "TRL", "")),
        ("log-probs of logits, no gradient", "token-log-probs", "512x16384",
         ("plain", "", "TRL", "")),
    ):  # fmt: skip
        rows = measured(suite)
        ours = rows[case, "dl_norm"]
        cells = [f"{milliseconds(ours)}, {ours['peak_bytes'] / 1e6:.0f}"]
        for name in names:
            row = rows.get((case, name))
            cells.append(
                f"{milliseconds(row)}, {row['peak_bytes'] / 1e6:.0f} ({row['ratio_to_ours']:.1f}×)"
                if row
                else "–"
            )
        yield line(label, *cells)


def step_lines() -> Iterator[str]:
    rows = {row["kind"]: row for row in results("train-step-cpu")["rows"]}
    ours = rows["dl_norm fused"]
    for label, cell in (
        (
            "tokens per second",
            lambda row: (
                f"{row['tokens_per_s']:,.0f}"
                + ("" if row is ours else f" ({ours['tokens_per_s'] / row['tokens_per_s']:.1f}×)")
            ),
        ),
        ("peak MB", lambda row: f"{row['peak_bytes'] / 1e6:,.0f}"),
    ):
        yield line(label, *(cell(rows[name]) for name in ("dl_norm fused", "plain", "TRL")))


def sentences() -> Iterator[str]:
    rows = measured("log-probs")
    ours, verl, trl = (
        microseconds(rows["8x128", f"{name} + metrics"]) for name in ("dl_norm", "verl", "TRL")
    )
    yield f"8×128 takes us {ours} µs, verl {verl} and TRL {trl}"
    yield f"{milliseconds(measured('logits')['512x16384', 'dl_norm copy'])} into a new buffer"
    rows = measured("cross-entropy")
    ours, compiled = (rows["512x256x16384", name] for name in ("dl_norm", "torch.compile"))
    yield (
        f"we take {milliseconds(ours)} ms and {ours['peak_bytes'] / 1e6:.0f} MB, torch.compile "
        f"{milliseconds(compiled)} ms and {compiled['peak_bytes'] / 1e6:.0f} MB"
    )

    rows = measured("precision")
    case = "1024x256x16384"
    fp32_logits, bf16_logits, fp32_head = (
        milliseconds(rows[case, name])
        for name in ("dl_norm", "dl_norm bfloat16 logits", "dl_norm float32 head")
    )
    yield (
        f"with `fp32_logits=True` takes {fp32_logits} ms, with bfloat16 logits {bf16_logits}, made "
        f"float32 first {fp32_head}"
    )


@pytest.mark.parametrize(
    "expected", [log_prob_lines, head_lines, step_lines, kept_lines, traffic_lines, sentences]
)
def test_numbers_are_those_measured(expected: Callable[[], Iterator[str]]) -> None:
    text = " ".join(PAGE.split())
    for one in expected():
        assert one in text, one


def test_the_first_screen_has_rows_of_that_page() -> None:
    """Three of them, without the columns of the others."""
    first = {
        "log-probs 64×2048, µs": ("64×2048", log_prob_lines),
        "logits 512×16,384, ms, peak MB": ("logits 512×16,384", head_lines),
        "hidden states, 40 % filled, ms, peak MB": ("the same, 40 % filled", head_lines),
    }
    for label, (of_page, lines) in first.items():
        (row,) = (line for line in README.splitlines() if line.startswith(f"| {label} |"))
        (full, *_) = (line for line in lines() if line.startswith(f"| {of_page} |"))
        assert row.split("|")[2:6] == full.split("|")[2:6]
