"""What a loss moves and executes, counted by executing its compiled kernels on a CPU: no GPU.

python -m bench.traffic                 count, print, write bench/results/
python -m bench.traffic --target sm_80  compiled for another GPU than the H100
python -m bench.traffic --from FILE     print an earlier count again

requested: bytes that threads ask for. moved: distinct sectors of 32 bytes in each launch, which is
DRAM traffic where the caches hold all that a launch uses, and none of what the one before it used.
floor: what any implementation has to move. Instructions are PTX, for 32 threads each, as warps
issue them, without moves and loads of parameters, which do not survive ptxas. Barriers are those of
the largest kernel, for one of its programs. Operations of PyTorch count with their operands and
results as bytes, and with no instructions; beside matrix products only these, as the bytes of the
others do not grow with the rows alone. The second table is a prediction, see bench/predict.py.

For Liger's kernels: pip install --no-deps --target .venv-peers liger-kernel==0.8.5
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm
from triton.runtime.driver import driver as triton_driver

from bench import contest, predict, record
from bench.cases import Case
from bench.contest import OURS, AnyCase, AnyInputs, NotHere
from bench.heads import HeadCase
from bench.kept import KeptCase
from bench.predict import Work
from bench.suites import SUITES

V = 151_936
METRICS = "dl_norm + metrics"
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Entry:
    """What is counted: a case small enough to be executed here, of a suite of bench.table.

    stands_for: the cases of bench.table whose time is predicted from it. clipped: whether rows of
    logits have the ratios of bench.table; else these are 1, and every row has a gradient.
    """

    suite: str
    case: AnyCase
    contestants: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    upstream: float = 1.0
    stands_for: tuple[str, ...] = ()
    clipped: bool = True

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        upstream = f", upstream gradient {self.upstream}" if self.upstream != 1 else ""
        return f"{self.suite} {self.case.name} {dtype}{upstream}"

    @property
    def units(self) -> int:
        """Positions of log-probs, or logits; padding included. Of kept sets tokens."""
        if isinstance(self.case, Case):
            return self.case.positions
        if isinstance(self.case, KeptCase):
            return self.case.tokens
        assert isinstance(self.case, HeadCase)
        return self.case.sequences * self.case.max_length * self.case.vocabulary

    def floor(self) -> int:
        """Bytes by the model of the case, for this dtype."""
        if isinstance(self.case, Case):
            return self.case.bytes_moved(self.dtype.itemsize)
        return self.case.bytes_moved()


UNITS = {"log_probs": "position", "kept": "token"}  # others: "logit"
LOSSES = (OURS, METRICS, "TRL", "verl")
LOGITS = (OURS, "dl_norm copy", "plain", "TRL", "Liger")
ROWS = 24  # of logits: what a launch costs besides them does not show
ENTRIES = (
    Entry("log_probs", Case("64x1024 100%", 64, 1024), LOSSES),
    Entry("log_probs", Case("64x1024 100%", 64, 1024), (OURS, METRICS), BF16),
    Entry("log_probs", Case("64x1024 100%", 64, 1024), (OURS,), upstream=0.5),
    Entry("log_probs", Case("64x1024", 64, 1024, 0.4), LOSSES, stands_for=("64x1024",)),
    Entry("log_probs", Case("64x2048", 64, 2048, 0.4), LOSSES, stands_for=("64x2048",)),
    Entry("log_probs", Case("8x128", 8, 128, 0.4), LOSSES, stands_for=("8x128",)),
    Entry("log_probs", Case("16x8192 40%", 16, 8192, 0.4), LOSSES, stands_for=("1024x8192 40%",)),
    Entry("log_probs", Case("16x8192 40%", 16, 8192, 0.4), (OURS,), BF16),
    Entry("log_probs", Case("16x8192 100%", 16, 8192), LOSSES, stands_for=("1024x8192 100%",)),
    Entry("log_probs", Case("packed 16x8192", 16, 8192, 0.4, True), (OURS, METRICS),
          stands_for=("packed 3.4M",)),
    Entry("logits", HeadCase("24x151936 none clipped", "logits", 1, ROWS, V), LOGITS, BF16,
          clipped=False),
    Entry("logits", HeadCase("24x151936", "logits", 1, ROWS, V), LOGITS, BF16,
          stands_for=("8192x151936",)),
    Entry("logits", HeadCase("24x151936 40%", "logits", 2, ROWS // 2, V, fill=0.4), LOGITS, BF16,
          stands_for=("8192x151936 40%",)),
    Entry("token_log_probs", HeadCase("24x151936", "token_log_probs", 1, ROWS, V),
          (OURS, "TRL", "Liger"), BF16, stands_for=("8192x151936",)),
    Entry("linear", HeadCase("24x8x151936", "linear", 1, ROWS, V, 8), (OURS, "TRL"), BF16,
          stands_for=("8192x4096x151936", "32768x2048x151936", "16384x2048x248320")),
    Entry("linear", HeadCase("24x8x151936 40%", "linear", 2, ROWS // 2, V, 8, 0.4),
          (OURS, "dl_norm max_tokens", "TRL"), BF16, stands_for=("8192x4096x151936 40%",)),
    Entry("kept", KeptCase("128x1024x2048", 1, 128, 2048, 1024), (OURS,), BF16),
)  # fmt: skip


@dataclass
class Row:
    """One contestant of an entry; the sums over its launches are those of ``work``."""

    entry: str
    suite: str
    contestant: str
    unit: str
    units: int
    floor: int
    # Cases that this stands for -> how many times as much they have, of rows and of products.
    stands_for: dict[str, tuple[float, float]] = field(default_factory=dict)
    requested: int = 0
    barriers: float = 0.0
    classes: dict[str, int] = field(default_factory=dict)  # instructions by class
    work: list[Work] = field(default_factory=list)
    refused: str | None = None

    def total(self, name: str) -> float:
        return sum(getattr(work, name) for work in self.work)


class Operations(TorchDispatchMode):
    """Notes the operations of PyTorch that are kernels on a GPU."""

    def __init__(self):
        super().__init__()
        self.work: list[Work] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        name = func._schema.name.removeprefix("aten::")
        if view or any(part in name for part in ("empty", "view", "scalar", "detach")):
            return out  # no kernel
        read = args[1:] if name in ("fill_", "zero_", "copy_") else args
        tensors = [t for t in tree_leaves((read, kwargs, out)) if isinstance(t, Tensor)]
        count = flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"), None))  # addmm_ too
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        size = 0 if flops else sum(map(_bytes, tensors))
        if size or flops:
            self.work.append(Work(name, bytes=size, flops=flops))
        return out


def _bytes(tensor: Tensor) -> int:
    size = tensor.element_size()
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= n if stride else 1
    return size


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """No check of the package looks at values, which costs nothing on a CPU alone."""
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("dl_norm.") and hasattr(module, "values_are_free"):
                stack.enter_context(mock.patch.object(module, "values_are_free", lambda _: False))
        yield


def count(entry: Entry, name: str, inputs: AnyInputs) -> Row:
    """One forward and backward of a contestant."""
    active: Any = triton_driver.active
    suite = SUITES[entry.suite]
    (contestant,) = (c for c in suite.contestants if c.name == name)
    row = Row(
        entry.name, entry.suite, name, UNITS.get(entry.suite, "logit"), entry.units,
        entry.floor(), {case: _scales(entry, case) for case in entry.stands_for},
    )  # fmt: skip
    operations = Operations()
    try:
        prepared = contest.prepare(contestant, inputs)
        prepared.restore()
        upstream = torch.tensor(entry.upstream)
        active.launches.clear()
        with as_on_a_gpu(), operations:
            result = prepared.result()
            if prepared.leaves:
                torch.autograd.grad(result, prepared.leaves, upstream)
    except NotHere as problem:
        row.refused = str(problem)
        return row
    launches = list(active.launches)
    classes: Counter[str] = sum((launch.instructions for launch in launches), Counter())
    row.classes = dict(classes)
    row.requested = sum(launch.requested.total() for launch in launches)
    products = any(work.flops for work in operations.work)
    row.work = [work for work in operations.work if work.flops or not products] + [
        Work(
            launch.kernel,
            bytes=32 * launch.sectors.total(),
            instructions=launch.issued,
            special=launch.instructions["special"],
        )
        for launch in launches
    ]
    if launches:
        largest = max(launches, key=lambda launch: launch.sectors.total())
        warps = largest.ctas * largest.threads // 32
        row.barriers = largest.instructions["barrier"] / warps
    return row


def _scales(entry: Entry, name: str) -> tuple[float, float]:
    cases = SUITES[entry.suite].cases(torch.device("cuda"))
    (case,) = (case for case in cases if case.name == name)
    flops = entry.case.flops()
    units = dataclasses.replace(entry, case=case).units
    return units / entry.units, case.flops() / flops if flops else 1.0


def make_inputs(entry: Entry) -> Any:
    inputs = SUITES[entry.suite].make_inputs(entry.case, torch.device("cpu"), 0)
    if entry.dtype == torch.float32:
        return inputs
    if entry.suite == "log_probs":
        return dataclasses.replace(
            inputs,
            log_probs=_as(inputs.log_probs, entry.dtype),
            old_log_probs=inputs.old_log_probs.to(entry.dtype),
        )
    leaves = tuple(_as(leaf, entry.dtype) for leaf in inputs.leaves)
    if not entry.clipped:
        log_probs = leaves[0].detach().float().log_softmax(-1)
        old_log_probs = log_probs.gather(-1, inputs.token_ids[..., None])[..., 0]
        return dataclasses.replace(inputs, leaves=leaves, old_log_probs=old_log_probs)
    return dataclasses.replace(inputs, leaves=leaves)


def _as(leaf: Tensor, dtype: torch.dtype) -> Tensor:
    return leaf.detach().to(dtype).requires_grad_(leaf.requires_grad)


COLUMNS = ("", "requested", "moved", "floor", "instructions", "special", "barriers", "launches",
           "of PyTorch")  # fmt: skip


def cells(row: Row) -> list[str]:
    def per_unit(number: float) -> str:
        return f"{number / row.units:.2f}"

    kernels = [work for work in row.work if work.instructions]
    return [
        row.contestant,
        f"{per_unit(row.requested)} B" if kernels else "",
        f"{per_unit(row.total('bytes'))} B",
        f"{per_unit(row.floor)} B",
        per_unit(32 * row.total("instructions")) if kernels else "",
        per_unit(32 * row.total("special")) if kernels else "",
        f"{row.barriers:.0f}" if kernels else "",
        str(len(row.work)),
        str(len(row.work) - len(kernels)),
    ]


def show(report: dict[str, Any], rows: list[Row], console: Console) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    console.print(
        f"compiled for {report['target']}, executed on a CPU, {report['date']}: {versions}"
    )
    for name in dict.fromkeys(row.entry for row in rows):
        some = [row for row in rows if row.entry == name]
        table = Table(*COLUMNS, title=f"{name}, per {some[0].unit}", title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in some:
            if row.refused is None:
                table.add_row(*cells(row))
            else:
                table.add_row(row.contestant, f"not here: {row.refused}")
        console.print(table)
    predict.show(rows, predict.H100, console)


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    report = json.loads(path.read_text())
    rows = [
        Row(**{**row, "work": [Work(**work) for work in row["work"]]}) for row in report["rows"]
    ]
    return report, rows


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source", type=Path, help="show this result, count nothing")
    parser.add_argument("--target", default="sm_90", choices=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("--entries", nargs="+", help="parts of names of entries, default all")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.source:
        report, rows = load(options.source)
        show(report, rows, console)
        return rows
    from ci.ptx import driver

    driver.install(options.target)
    wanted = options.entries or [""]
    rows = []
    for entry in tqdm(ENTRIES, desc="entries", disable=None):
        if any(part in entry.name for part in wanted):
            inputs = make_inputs(entry)
            rows += [count(entry, name, inputs) for name in entry.contestants]
    command = record.command_line("bench.traffic", arguments)
    report = {
        **record.origin(torch.device("cpu"), command),
        "device": f"{options.target} PTX",
        "target": options.target,
        "rows": [asdict(row) for row in rows],
    }
    show(report, rows, console)
    if not options.entries:
        console.print(f"written: {record.save(report, 'traffic', options.results)}")
    return rows


if __name__ == "__main__":
    main()
