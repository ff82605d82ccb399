"""The comparison as one command.

python -m bench.table                        measure, print, write bench/results/
python -m bench.table --from FILE.json       print an earlier run again
python -m bench.table ... --markdown         also the table for the README
python -m bench.table ... --figure FILE.png  also a picture
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import bench.cases
from bench import parity, peers, roofline, timing
from bench.cases import Case, Inputs, make_inputs
from bench.peers import CONTESTANTS, OURS, Contestant, NotHere
from bench.timing import Clock, Stats, Trial

RESULTS = Path(__file__).parent / "results"
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
    bandwidth: float | None = None  # bytes_model / median
    of_copy: float | None = None  # bandwidth / measured copy bandwidth
    peak_bytes: int | None = None
    launches: int | None = None
    first_call: float | None = None  # seconds, compilation included
    refused: str | None = None


@dataclass
class Report:
    """A run: where, with what, and its rows."""

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
        folder.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        path = folder / f"{slug}-{self.date[:10]}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> Report:
        data = json.loads(path.read_text())
        rows = data.pop("rows")
        for row in rows:
            for clock in ("time", "wall", "graph"):
                row[clock] = Stats(**row[clock]) if row[clock] else None
        return cls(**data, rows=[Row(**row) for row in rows])


def make_trial(contestant: Contestant, inputs: Inputs, pass_: str) -> Trial:
    """What `timing.compare` times: set-up, then the call of one pass.

    The upstream gradient is a tensor that is there already, as in the middle of a graph.
    """
    loss = peers.prepare(contestant, inputs)
    one = torch.ones((), device=inputs.log_probs.device)
    if pass_ == "forward":
        return lambda: loss
    if pass_ == "both":
        return lambda: lambda: torch.autograd.grad(loss(), inputs.log_probs, one)

    def backward():
        value = loss()
        return lambda: torch.autograd.grad(value, inputs.log_probs, one)

    return backward


def measure_case(
    case: Case,
    clock: Clock,
    copy_bandwidth: float,
    contestants: Sequence[Contestant] = CONTESTANTS,
    *,
    rounds: int,
    passes: Sequence[str] = PASSES,
) -> list[Row]:
    """All contestants on one case. A wrong or absent contestant gets a row with the reason."""
    device = clock.device
    if hasattr(torch, "compiler"):
        torch.compiler.reset()  # each case compiles for itself, whatever came before
    bytes_model = case.bytes_moved()
    count = timing.buffer_sets(bytes_model, device)
    sets = [make_inputs(case, device, seed) for seed in range(count)]
    expected = parity.truth(sets[0])

    rows: list[Row] = []
    able: dict[str, Contestant] = {}
    first_call: dict[str, float] = {}
    for contestant in contestants:
        try:
            loss = peers.prepare(contestant, sets[0])
            first_call[contestant.name] = Clock(device, "wall")(
                lambda loss=loss: torch.autograd.grad(loss(), sets[0].log_probs)
            )
            parity.check(sets[0], loss, expected)
        except (NotHere, parity.Wrong) as problem:
            rows += [Row(case.name, contestant.name, p, refused=str(problem)) for p in passes]
            continue
        able[contestant.name] = contestant
    del expected

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
            call = trials[name][0]()
            row = Row(
                case.name,
                name,
                pass_,
                time=times[name],
                wall=walls.get(name),
                ratio_to_ours=median / times[OURS].median if OURS in times else None,
                first_call=first_call[name],
            )
            if pass_ == "both":
                row.bytes_model = bytes_model
                row.bandwidth = bytes_model / median
                row.of_copy = row.bandwidth / copy_bandwidth
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
        inputs = make_inputs(Case(str(max_length), 4, max_length, fill=0.5), device)
        loss = peers.prepare(CONTESTANTS[0], inputs)()
        torch.autograd.grad(loss, inputs.log_probs)

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


def describe(device: torch.device) -> tuple[str, dict[str, str]]:
    """The device's name, and the versions of everything that a number may depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = "not installed"
    versions |= peers.versions()
    if device.type == "cuda":
        versions["driver"] = _first_line(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
        versions["cuda"] = str(torch.version.cuda)
        return torch.cuda.get_device_name(device), versions
    versions["threads"] = str(torch.get_num_threads())
    return _cpu_name(), versions


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} CPU {torch.get_num_threads()} threads"


def run(
    device: torch.device,
    cases: Iterable[Case],
    *,
    rounds: int,
    contestants: Sequence[Contestant] = CONTESTANTS,
    passes: Sequence[str] = PASSES,
    command: str = "",
    quick_ceilings: bool = False,
) -> Report:
    """Measure the ceilings, then every case."""
    clock = Clock(device)
    name, versions = describe(device)
    if quick_ceilings:
        ceilings = roofline.Ceilings(
            roofline.copy_bandwidth(clock, elements=2**20, rounds=3),
            roofline.matmul_rate(clock, size=64, rounds=3),
        )
    else:
        ceilings = roofline.measure(clock)
    cases = list(cases)
    report = Report(
        device=name,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        versions=versions,
        ceilings=asdict(ceilings),
        cases={case.name: {**asdict(case), "tokens": int(case.lengths().sum())} for case in cases},
        notes={contestant.name: contestant.note for contestant in contestants},
    )
    for case in tqdm(cases, desc="cases", disable=None):
        report.rows += measure_case(
            case,
            clock,
            ceilings.copy_bytes_per_s,
            contestants,
            rounds=rounds,
            passes=passes,
        )
    if device.type == "cuda":
        report.extra_compiles = extra_compiles(device, recompile_lengths())
    return report


COLUMNS = ("", "median µs", "p20-p80", "x ours", "% of copy", "peak MB", "launches", "wall µs",
           "graph µs")  # fmt: skip


def cells(row: Row) -> list[str]:
    """A timed row as text, in the order of COLUMNS."""
    assert row.time is not None

    def micro(stats: Stats | None) -> str:
        return f"{stats.median * 1e6:.1f}" if stats else ""

    return [
        row.contestant,
        micro(row.time),
        f"{row.time.p20 * 1e6:.1f}-{row.time.p80 * 1e6:.1f}",
        "" if row.ratio_to_ours is None else f"{row.ratio_to_ours:.2f}",
        "" if row.of_copy is None else f"{row.of_copy * 100:.0f}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.2f}",
        "" if row.launches is None else str(row.launches),
        micro(row.wall),
        micro(row.graph),
    ]


def title(report: Report, case: str, pass_: str) -> str:
    about = report.cases[case]
    text = f"{case}, {pass_}: {about['tokens']:,} tokens"
    model = next((r.bytes_model for r in report.rows if r.case == case and r.bytes_model), None)
    if pass_ == "both" and model:
        floor = model / report.ceilings["copy_bytes_per_s"]
        text += f", {model / 1e6:.2f} MB to move, floor {floor * 1e6:.1f} µs"
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
        f"{ceilings['copy_bytes_per_s'] / 1e9:.0f} GB/s, bf16 matmul "
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


def markdown(report: Report) -> str:
    """Forward + backward of every case as one table: a line per case, a column per contestant."""
    both = {(r.case, r.contestant): r for r in report.rows if r.pass_ == "both"}
    names = [name for name in report.notes if any(both.get((c, name)) for c in report.cases)]
    lines = [
        "| µs, forward + backward (x ours) | " + " | ".join(names) + " | % of copy |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for case in report.cases:
        line = [case]
        for name in names:
            row = both.get((case, name))
            if row is None or row.time is None:
                line.append("-")
                continue
            text = f"{row.time.median * 1e6:,.1f}"
            if name != OURS and row.ratio_to_ours is not None:
                text += f" ({row.ratio_to_ours:.1f}x)"
            line.append(text)
        ours = both.get((case, OURS))
        line.append(f"{ours.of_copy * 100:.0f} %" if ours and ours.of_copy else "-")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join([*lines, "", heading(report)])


def figure(report: Report, path: Path) -> None:
    """Forward + backward time of every contestant, one group of bars per case, and the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    both = {(r.case, r.contestant): r for r in report.rows if r.pass_ == "both" and r.time}
    names = [name for name in report.notes if "metrics" not in name]
    cases = list(report.cases)
    width = 0.8 / len(names)
    fig, axes = plt.subplots(figsize=(1.8 * len(cases) + 2, 4.2), layout="constrained")
    for number, name in enumerate(names):
        shown = [(i, both[case, name]) for i, case in enumerate(cases) if (case, name) in both]
        centre = [i + (number - (len(names) - 1) / 2) * width for i, _ in shown]
        heights = [row.time.median * 1e6 for _, row in shown if row.time]
        axes.bar(centre, heights, width, label=name)
    floors = [
        next((r.bytes_model for r in both.values() if r.case == case and r.bytes_model), 0)
        / report.ceilings["copy_bytes_per_s"]
        for case in cases
    ]
    edges = [(i - 0.45, i + 0.45) for i in range(len(cases))]
    for floor, (left, right) in zip(floors, edges, strict=True):
        axes.plot([left, right], [floor * 1e6] * 2, color="black", linewidth=1)
    axes.plot([], [], color="black", linewidth=1, label="bytes / copy bandwidth")
    axes.set_yscale("log")
    axes.set_ylabel("forward + backward, µs (median)")
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
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--cases", nargs="+", help="names of cases, default all for the device")
    parser.add_argument("--contestants", nargs="+", help="names, default all")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument(
        "--rounds", type=int, help="timed rounds, default 100 on a GPU, 30 on a CPU"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the command")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file")
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
        cases = bench.cases.TINY_CASES if options.tiny else bench.cases.cases_for(device)
        report = run(
            device,
            pick(options.cases, cases),
            rounds=options.rounds or (100 if device.type == "cuda" else 30),
            contestants=pick(options.contestants, CONTESTANTS),
            passes=options.passes,
            command=shlex.join(["python", "-m", "bench.table", *(arguments or sys.argv[1:])]),
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
