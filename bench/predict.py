"""Times predicted from counts and a stated model of a GPU. Nothing here is measured.

Every launch takes the longest of what it needs of DRAM, of the multiprocessors' issue slots, of
their special function units and of the tensor cores, and a fixed time to start. No latency, no
tail, and perfect overlap inside a launch are assumed: what is measured later says how far from that
a kernel is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bench import record
from bench.contest import OURS

if TYPE_CHECKING:
    from bench.roofline import Ceilings
    from bench.traffic import Row


@dataclass
class Work:
    """Of one launch: bytes of DRAM, instructions of warps, operations of matrix products."""

    name: str
    bytes: int = 0
    instructions: int = 0
    special: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Machine:
    """Each per second, but ``launch``: seconds from one kernel's end to the next one's start."""

    name: str
    bytes: float
    instructions: float
    special: float
    flops: float
    launch: float = 2e-6

    def seconds(self, work: Work) -> dict[str, float]:
        """What a launch needs of each."""
        return {
            "bytes": work.bytes / self.bytes,
            "issue": work.instructions / self.instructions,
            "special": work.special / self.special,
            "products": work.flops / self.flops,
        }


def machine(
    name: str, multiprocessors: int, clock: float, bytes_per_s: float, flops: float
) -> Machine:
    """Of compute capability 8.0, 9.0 and 10.0: four schedulers issue an instruction a cycle each,
    and 16 special functions a cycle are half an instruction of a warp."""
    return Machine(
        name, bytes_per_s, 4 * multiprocessors * clock, multiprocessors * clock / 2, flops
    )


# SXM: 132 multiprocessors, 1.755 GHz; copies and bf16 products at rates that H100s are known to
# reach. With a GPU at hand bench.table puts in what it has measured for these two.
H100 = machine("H100 SXM", 132, 1.755e9, 3.0e12, 790e12)


@dataclass(frozen=True)
class Prediction:
    seconds: float
    bound: str  # what most of the time goes to


def predict(row: Row, case: str, on: Machine) -> Prediction:
    """The time of a case that the row stands for: what depends on the size is scaled, the number
    of launches is not."""
    rows, products = row.stands_for[case]
    spent = {"launches": on.launch * len(row.work)}
    for work in row.work:
        scale = products if work.flops else rows
        need = {kind: scale * seconds for kind, seconds in on.seconds(work).items()}
        kind = max(need, key=lambda k: need[k])
        spent[kind] = spent.get(kind, 0.0) + need[kind]
    return Prediction(sum(spent.values()), max(spent, key=lambda k: spent[k]))


def show(rows: Iterable[Row], on: Machine, console: Console) -> None:
    table = Table(
        "case", "", "predicted µs", "x ours", "mostly", title_justify="left",
        title=f"Predicted, not measured: {on.name}, {on.bytes / 1e12:.1f} TB/s, "
        f"{on.instructions / 1e9:.0f} G instructions/s, {on.special / 1e9:.0f} G special/s, "
        f"{on.flops / 1e12:.0f} TFLOP/s, {on.launch * 1e6:.0f} µs a launch",
    )  # fmt: skip
    found = [
        (f"{row.suite} {case}", row.contestant, predict(row, case, on))
        for row in rows
        for case in (row.stands_for if row.refused is None else ())
    ]
    ours = {case: time.seconds for case, name, time in found if name == OURS}
    for case, name, time in sorted(found, key=lambda entry: list(ours).index(entry[0])):
        ratio = f"{time.seconds / ours[case]:.2f}"
        table.add_row(case, name, f"{time.seconds * 1e6:,.1f}", ratio, time.bound)
    for column in table.columns[2:4]:
        column.justify = "right"
    console.print(table)


def for_table(
    suite: str, ceilings: Ceilings, results: Path = record.RESULTS
) -> dict[tuple[str, str], float]:
    """(case, contestant) of a suite of bench.table -> seconds, by the latest counts in ``results``
    and the ceilings of the run."""
    from bench import traffic

    files = sorted(results.glob("sm-90-ptx-traffic-*.json"))
    if not files:
        return {}
    on = replace(H100, bytes=ceilings.copy_bytes_per_s, flops=ceilings.matmul_flops)
    _, rows = traffic.load(files[-1])
    return {
        (case, row.contestant): predict(row, case, on).seconds
        for row in rows
        for case in (row.stands_for if row.suite == suite and row.refused is None else ())
    }
