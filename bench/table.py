"""The comparison as one command.

python -m bench.table                        measure, print, write bench/results/
python -m bench.table --suite linear         another entry: logits, token_log_probs, linear, ...
python -m bench.table --from FILE.json       print an earlier run again
python -m bench.table ... --markdown         also the table for the README
python -m bench.table ... --figure FILE.png  also a picture
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench import contest, parity, predict, record, roofline, timing
from bench.cases import Case
from bench.contest import OURS, AnyCase, AnyInputs, Contestant, NotHere, Suite
from bench.roofline import Ceilings
from bench.suites import LOG_PROBS, SUITES
from bench.timing import Clock, Stats, Trial

PASSES = ("forward", "backward", "both")


@dataclass
class Row:
    """One contestant on one case and pass. Times in seconds; `refused` says why there are none."""

    case: str
    contestant: str
    pass_: str
    time: Stats | None = None  # on the device's clock, see timing.Clock
    wall: Stats | None = None  # host time until the device is idle; only on a GPU
    graph: Stats | None = None  # replay as a CUDA graph; only on a GPU
    ratio_to_ours: float | None = None
    bytes_model: int | None = None
    flops_model: int | None = None
    floor: float | None = None  # seconds that both models take at the measured ceilings
    of_floor: float | None = None  # floor / median
    predicted: float | None = None  # seconds; on a GPU, see bench/predict.py
    peak_bytes: int | None = None
    launches: int | None = None
    first_call: float | None = None  # seconds, compilation included
    refused: str | None = None


@dataclass
class Report:
    """A run: where, with what, and its rows."""

    suite: str
    device: str
    date: str
    command: str
    versions: dict[str, str]
    ceilings: dict[str, float]
    cases: dict[str, dict[str, Any]]
    notes: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    extra_compiles: dict[str, Any] | None = None

    def save(self, folder: Path) -> Path:
        return record.save(asdict(self), self.suite, folder)

    @classmethod
    def load(cls, path: Path) -> Report:
        data = json.loads(path.read_text())
        rows = data.pop("rows")
        for row in rows:
            for clock in ("time", "wall", "graph"):
                row[clock] = Stats(**row[clock]) if row[clock] else None
        return cls(**data, rows=[Row(**row) for row in rows])


def make_trial(contestant: Contestant, inputs: AnyInputs, pass_: str) -> Trial:
    """What `timing.compare` times: set-up, then the call of one pass.

    The upstream gradient is a tensor that is there already, as in the middle of a graph.
    """
    prepared = contest.prepare(contestant, inputs)
    loss, leaves = prepared.result, prepared.leaves
    if pass_ == "forward":

        def forward():
            prepared.restore()
            return loss

        return forward
    one = torch.ones((), device=leaves[0].device)
    if pass_ == "both":

        def both():
            prepared.restore()
            return lambda: torch.autograd.grad(loss(), leaves, one)

        return both

    def backward():
        prepared.restore()
        value = loss()
        return lambda: torch.autograd.grad(value, leaves, one)

    return backward


def first_call(prepared: contest.Prepared, clock: Clock) -> float:
    """Seconds of the first call, compilation included."""
    prepared.restore()

    def call():
        result = prepared.result()
        return torch.autograd.grad(result, prepared.leaves) if prepared.leaves else result

    return Clock(clock.device, "wall")(call)


def measure_case(
    suite: Suite,
    case: AnyCase,
    clock: Clock,
    ceilings: Ceilings,
    contestants: Sequence[Contestant] | None = None,
    *,
    rounds: int,
    passes: Sequence[str] | None = None,
) -> list[Row]:
    """All contestants on one case. A wrong or absent contestant gets a row with the reason."""
    device = clock.device
    contestants = suite.contestants if contestants is None else contestants
    passes = suite.passes if passes is None else passes
    if hasattr(torch, "compiler"):
        torch.compiler.reset()  # each case compiles for itself, whatever came before
    bytes_model, flops_model = case.bytes_moved(), case.flops()
    floor = bytes_model / ceilings.copy_bytes_per_s + flops_model / ceilings.matmul_flops
    count = timing.buffer_sets(bytes_model, device)
    sets = [suite.make_inputs(case, device, seed) for seed in range(count)]
    expected = suite.truth(sets[0])

    rows: list[Row] = []
    able: dict[str, Contestant] = {}
    first_calls: dict[str, float] = {}
    for contestant in contestants:
        try:
            prepared = contest.prepare(contestant, sets[0])
            first_calls[contestant.name] = first_call(prepared, clock)
            suite.check(prepared, expected)
        except (NotHere, parity.Wrong, torch.OutOfMemoryError) as problem:
            rows += [Row(case.name, contestant.name, p, refused=str(problem)) for p in passes]
            continue
        able[contestant.name] = contestant
    del expected

    whole = "both" if "both" in passes else passes[-1]  # the pass that the floor is of
    for pass_ in passes:
        trials = {
            name: [make_trial(contestant, inputs, pass_) for inputs in sets]
            for name, contestant in able.items()
        }
        times = timing.compare(trials, clock, rounds=rounds)
        on_gpu = clock.kind == "device"
        walls = timing.compare(trials, Clock(device, "wall"), rounds=rounds) if on_gpu else {}
        for name, contestant in able.items():
            median = times[name].median
            row = Row(
                case.name,
                name,
                pass_,
                time=times[name],
                wall=walls.get(name),
                ratio_to_ours=median / times[OURS].median if OURS in times else None,
                first_call=first_calls[name],
            )
            if pass_ == whole:
                call = trials[name][0]()
                row.bytes_model, row.flops_model = bytes_model, flops_model
                row.floor, row.of_floor = floor, floor / median
                row.peak_bytes = timing.peak_memory(call, device)
                row.launches = timing.count_launches(call, device)
                if on_gpu and contestant.graphable:
                    row.graph = _time_graph(name, call, clock, rounds)
            rows.append(row)
    order = [contestant.name for contestant in contestants]
    return sorted(rows, key=lambda row: (passes.index(row.pass_), order.index(row.contestant)))


def _time_graph(name: str, call: timing.Call, clock: Clock, rounds: int) -> Stats | None:
    two_caches = 2 * torch.cuda.get_device_properties(clock.device).L2_cache_size
    try:
        return timing.time_graph(call, clock, rounds=rounds, flush_bytes=two_caches)
    except RuntimeError as problem:
        tqdm.write(f"{name}: cannot be captured as a CUDA graph: {problem}")
        return None


def extra_compiles(device: torch.device, lengths: Sequence[int]) -> dict[str, Any]:
    """Triton compilations for every T after the first: 0 is the target."""

    def run(max_length: int) -> None:
        inputs = LOG_PROBS.make_inputs(Case(str(max_length), 4, max_length, fill=0.5), device, 0)
        prepared = contest.prepare(LOG_PROBS.contestants[0], inputs)
        torch.autograd.grad(prepared.result(), prepared.leaves)

    with timing.count_compiles() as first:
        run(lengths[0])
    with timing.count_compiles() as later:
        for max_length in lengths[1:]:
            run(max_length)
    return {"lengths": list(lengths), "first": list(first), "extra": list(later)}


def recompile_lengths(count: int = 20) -> list[int]:
    """Different T: multiples of 16 and not, odd, below and above a block, and T = 1."""
    return [256, 1, 2, 15, 16, 17, 100, 128, 255, 257, 333, 512, 777, 1000, 1024, 1025, 2047, 2048,
            3001, 4096][:count]  # fmt: skip


def run(
    suite: Suite,
    device: torch.device,
    cases: Iterable[AnyCase],
    *,
    rounds: int,
    contestants: Sequence[Contestant] | None = None,
    passes: Sequence[str] | None = None,
    command: str = "",
    quick_ceilings: bool = False,
) -> Report:
    """Measure the ceilings, then every case."""
    clock = Clock(device)
    ceilings = roofline.measure(clock, quick=quick_ceilings)
    cases = list(cases)
    contestants = suite.contestants if contestants is None else contestants
    report = Report(
        suite=suite.name,
        **record.origin(device, command),
        ceilings=asdict(ceilings),
        cases={
            case.name: {**vars(case), "tokens": case.tokens, "scaled_from": case.scaled_from}
            for case in cases
        },
        notes={contestant.name: contestant.note for contestant in contestants},
    )
    for case in tqdm(cases, desc=f"{suite.name} cases", disable=None):
        report.rows += measure_case(
            suite, case, clock, ceilings, contestants, rounds=rounds, passes=passes
        )
    if device.type == "cuda":
        predicted = predict.for_table(suite.name, ceilings)
        for row in whole_rows(report).values():
            row.predicted = predicted.get((row.case, row.contestant))
    if device.type == "cuda" and suite is LOG_PROBS:
        report.extra_compiles = extra_compiles(device, recompile_lengths())
    return report


COLUMNS = ("", "median µs", "p20-p80", "predicted µs", "x ours", "% of floor", "peak MB",
           "launches", "wall µs", "graph µs")  # fmt: skip


def cells(row: Row) -> list[str]:
    """A timed row as text, in the order of COLUMNS."""
    assert row.time is not None

    def micro(stats: Stats | None) -> str:
        return f"{stats.median * 1e6:.1f}" if stats else ""

    return [
        row.contestant,
        micro(row.time),
        f"{row.time.p20 * 1e6:.1f}-{row.time.p80 * 1e6:.1f}",
        "" if row.predicted is None else f"{row.predicted * 1e6:.1f}",
        "" if row.ratio_to_ours is None else f"{row.ratio_to_ours:.2f}",
        "" if row.of_floor is None else f"{row.of_floor * 100:.0f}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.2f}",
        "" if row.launches is None else str(row.launches),
        micro(row.wall),
        micro(row.graph),
    ]


def title(report: Report, case: str, pass_: str) -> str:
    about = report.cases[case]
    text = f"{case}, {pass_}: {about['tokens']:,} tokens"
    row = next((r for r in report.rows if (r.case, r.pass_) == (case, pass_) and r.floor), None)
    if row is not None and row.floor is not None:
        if row.flops_model:
            text += f", {row.flops_model / 1e12:.3g} TFLOP"
        text += f", {(row.bytes_model or 0) / 1e6:.2f} MB to move, floor {row.floor * 1e6:.1f} µs"
    if about["scaled_from"]:
        text += f" (scaled down from {about['scaled_from']} for a CPU)"
    return text


def tables(report: Report) -> Iterable[tuple[str, list[Row]]]:
    """Title and rows, one table per case and pass."""
    for case in report.cases:
        for pass_ in PASSES:
            rows = [row for row in report.rows if (row.case, row.pass_) == (case, pass_)]
            if rows:
                yield title(report, case, pass_), rows


def heading(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    ceilings = report.ceilings
    return (
        f"{report.device}, {report.date}: {versions}; measured copy "
        f"{ceilings['copy_bytes_per_s'] / 1e9:.0f} GB/s, {ceilings['matmul_dtype']} matmul "
        f"{ceilings['matmul_flops'] / 1e12:.2f} TFLOP/s"
    )


def show(report: Report, console: Console) -> None:
    console.print(heading(report))
    for name, rows in tables(report):
        table = Table(*COLUMNS, title=name, title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            if row.time:
                table.add_row(*cells(row))
        console.print(table)
        for row in rows:
            if row.refused:
                console.print(f"{row.contestant}: no time, {row.refused}", style="dim")
    if report.extra_compiles:
        new = report.extra_compiles
        console.print(
            f"{len(new['lengths'])} different T: {len(new['extra'])} compilations after the first"
        )
    for name, note in report.notes.items():
        console.print(f"{name}: {note}")


def whole_rows(report: Report) -> dict[tuple[str, str], Row]:
    """The rows of the pass that the floor is of, by case and contestant."""
    passes = {row.pass_ for row in report.rows}
    whole = "both" if "both" in passes else "forward"
    return {(r.case, r.contestant): r for r in report.rows if r.pass_ == whole}


def markdown(report: Report) -> str:
    """One table: a line per case, a column per contestant. Large times in ms, with peak memory."""
    rows = whole_rows(report)
    names = [name for name in report.notes if any(rows.get((c, name)) for c in report.cases)]
    slow = min((r.time.median for r in rows.values() if r.time), default=0) > 1e-3
    unit, scale = ("ms", 1e3) if slow else ("µs", 1e6)
    head = f"{unit}, forward + backward" if "both" in {r.pass_ for r in rows.values()} else unit
    lines = [
        f"| {head} (x ours){', peak MB' if slow else ''} | "
        + " | ".join(names)
        + " | % of floor |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for case in report.cases:
        line = [case]
        for name in names:
            row = rows.get((case, name))
            if row is None or row.time is None:
                line.append("-")
                continue
            text = f"{row.time.median * scale:,.1f}"
            if name != OURS and row.ratio_to_ours is not None:
                text += f" ({row.ratio_to_ours:.1f}x)"
            if slow and row.peak_bytes is not None:
                text += f", {row.peak_bytes / 1e6:,.0f}"
            line.append(text)
        ours = rows.get((case, OURS))
        line.append(f"{ours.of_floor * 100:.0f} %" if ours and ours.of_floor else "-")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join([*lines, "", heading(report)])


def figure(report: Report, path: Path) -> None:
    """Time of every contestant, one group of bars per case, and the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {key: row for key, row in whole_rows(report).items() if row.time}
    names = [name for name in report.notes if "metrics" not in name]
    cases = list(report.cases)
    width = 0.8 / len(names)
    fig, axes = plt.subplots(figsize=(1.8 * len(cases) + 2, 4.2), layout="constrained")
    for number, name in enumerate(names):
        shown = [(i, rows[case, name]) for i, case in enumerate(cases) if (case, name) in rows]
        centre = [i + (number - (len(names) - 1) / 2) * width for i, _ in shown]
        heights = [row.time.median * 1e6 for _, row in shown if row.time]
        axes.bar(centre, heights, width, label=name)
    for i, case in enumerate(cases):
        floor = next((r.floor for r in rows.values() if r.case == case and r.floor), None)
        if floor:
            axes.plot([i - 0.45, i + 0.45], [floor * 1e6] * 2, color="black", linewidth=1)
    axes.plot([], [], color="black", linewidth=1, label="floor at the measured ceilings")
    axes.set_yscale("log")
    axes.set_ylabel(f"{report.suite}: µs (median)")
    axes.set_xticks(range(len(cases)), cases)
    axes.set_title(f"{report.device}, torch {report.versions['torch']}", fontsize=9)
    axes.legend(fontsize=8, ncols=2)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source", type=Path, help="show this result, run nothing")
    parser.add_argument("--suite", choices=list(SUITES), default=LOG_PROBS.name)
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--cases", nargs="+", help="names of cases, default all for the device")
    parser.add_argument("--contestants", nargs="+", help="names, default all")
    parser.add_argument(
        "--passes", nargs="+", choices=PASSES, help="default all that tell something"
    )
    parser.add_argument(
        "--rounds", type=int, help="timed rounds, default 100 on a GPU, 30 on a CPU"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the command")
    parser.add_argument(
        "--results", type=Path, default=record.RESULTS, help="folder for the JSON file"
    )
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--figure", type=Path)
    return parser.parse_args(arguments)


def pick(wanted: Sequence[str] | None, offered: Iterable[Any]) -> list[Any]:
    """Those of `offered` whose name is wanted, in their own order; all if none is named."""
    offered = list(offered)
    unknown = set(wanted or ()) - {one.name for one in offered}
    if unknown:
        raise SystemExit(f"unknown {sorted(unknown)}: choose from {[one.name for one in offered]}")
    return [one for one in offered if not wanted or one.name in wanted]


def main(arguments: Sequence[str] | None = None) -> Report:
    options = parse(arguments)
    # A pipe has no width: the tables are then as wide as they are, not cut to 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.source:
        report = Report.load(options.source)
    else:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        suite = SUITES[options.suite]
        report = run(
            suite,
            device,
            pick(options.cases, suite.tiny if options.tiny else suite.cases(device)),
            rounds=options.rounds or (100 if device.type == "cuda" else 30),
            contestants=pick(options.contestants, suite.contestants),
            passes=options.passes or suite.passes,
            command=record.command_line("bench.table", arguments),
            quick_ceilings=options.tiny,
        )
        console.print(f"written: {report.save(options.results)}")
    show(report, console)
    if options.markdown:
        print(markdown(report))
    if options.figure:
        figure(report, options.figure)
        console.print(f"written: {options.figure}")
    return report


if __name__ == "__main__":
    main()
