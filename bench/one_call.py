"""One forward and backward of one case, for a profiler: `ncu ... python -m bench.one_call`.

`--read FILE.csv` reads what ncu wrote and sets the DRAM traffic beside the model of bytes.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path

import torch

from bench import contest
from bench.cases import GPU_CASES, make_inputs
from bench.peers import CONTESTANTS

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
UNITS = {
    "byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9,
    "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3,
}  # fmt: skip


def read_csv(lines: Iterable[str]) -> dict[str, dict[str, float]]:
    """Read ncu's CSV as {kernel: {metric: value in bytes or seconds}}, skipping other output."""
    table = [line for line in lines if line.startswith('"')]
    kernels: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(table):
        value = float(row["Metric Value"].replace(",", "")) * UNITS[row["Metric Unit"]]
        kernels.setdefault(row["Kernel Name"], {})[row["Metric Name"]] = value
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.one_call", description=__doc__)
    parser.add_argument("--case", default="1024x8192 40%", choices=[c.name for c in GPU_CASES])
    parser.add_argument("--read", type=Path)
    options = parser.parse_args()
    case = next(c for c in GPU_CASES if c.name == options.case)
    if options.read is None:
        inputs = make_inputs(case, torch.device("cuda"))
        prepared = contest.prepare(CONTESTANTS[0], inputs)
        torch.autograd.grad(prepared.result(), prepared.leaves)
        torch.cuda.synchronize()
        return
    model = case.bytes_moved()
    total = 0.0
    for kernel, measured in read_csv(options.read.read_text().splitlines()).items():
        read, written, seconds = (measured.get(metric, 0.0) for metric in METRICS)
        total += read + written
        print(
            f"{kernel}: {read / 1e6:.2f} MB read, {written / 1e6:.2f} MB written, "
            f"{seconds * 1e6:.1f} us"
        )
    print(f"{case.name}: {total / 1e6:.2f} MB of DRAM traffic, model {model / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
