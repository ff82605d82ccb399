"""This tree against another commit of it, on this machine's CPU: is anything slower?

    OMP_NUM_THREADS=1 python -m bench.against a46adfb --rounds 60

One process holds the package as it is here and one as it was there. Both run the cases of this
tree's `bench`, each case in turn, a call here and a call there, so that the machine's moods are
both's. A row is the ratio of the times below which a fifth of the calls are, as what comes on top
is the machine's; below 1 this tree is faster. Forward and backward pass. HEAD against itself says
what a ratio is worth here; without a GPU `dl_norm` and `dl_norm torch` are the same code as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
# Else glibc gives large blocks back to the system in one process and not in the other, by chance,
# and the page faults of the one are most of its time.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**36)}


def jobs() -> Iterator[tuple[str, Any, Any, Any]]:
    """(name, case, contestant, its inputs' maker) of what both commits can run: ours alone."""
    from bench import cases, head_peers, heads, peers

    def ours(contestants: Any) -> list[Any]:
        return [one for one in contestants if one.name.startswith("dl_norm")]

    for contestant in ours(peers.CONTESTANTS):
        for case in cases.cases_for(CPU):
            yield f"log_probs, {contestant.name}, {case.name}", case, contestant, cases.make_inputs
    for entry in ("logits", "linear"):
        for contestant in ours(head_peers.CONTESTANTS[entry]):
            for case in heads.cases_for(entry, CPU):
                name = f"{entry}, {contestant.name}, {case.name}"
                yield name, case, contestant, heads.make_inputs


def work() -> None:
    """A process of one commit: a line with a job's number makes it; an empty line runs and times
    it once."""
    from bench.contest import prepare
    from bench.timing import Clock

    clock, known, prepared = Clock(CPU), list(jobs()), None

    def call() -> object:
        assert prepared is not None
        return torch.autograd.grad(prepared.result(), prepared.leaves)

    for line in sys.stdin:
        if line.strip():
            _, case, contestant, make_inputs = known[int(line)]
            prepared = prepare(contestant, make_inputs(case, CPU, 0))
            seconds = 0.0
        else:
            assert prepared is not None
            prepared.restore()
            seconds = clock(call)
        print(json.dumps(seconds), flush=True)


@contextmanager
def worker(package: Path) -> Iterator[Any]:
    """A function that sends a line and returns seconds, from a process whose ``dl_norm`` is that of
    the folder ``package``."""
    path = os.pathsep.join((str(package), str(ROOT)))
    with subprocess.Popen(
        [sys.executable, "-c", "from bench.against import work; work()"],
        env={**os.environ, **KEEP_MEMORY, "PYTHONPATH": path}, cwd=package,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None

        def ask(line: str = "") -> float:
            process.stdin.write(line + "\n")  # type: ignore
            process.stdin.flush()  # type: ignore
            answer = process.stdout.readline()  # type: ignore
            if not answer:
                raise RuntimeError(f"the process of {package} ended in job {line}")
            return json.loads(answer)

        yield ask
        process.stdin.close()


def checkout(commit: str, folder: Path) -> None:
    """The packages of ``commit``, or of this tree where it is "", in ``folder``."""
    if not commit:
        (folder / "dl_norm").symlink_to(ROOT / "dl_norm")
        return
    archive = subprocess.run(
        ["git", "archive", commit, "dl_norm", "kernels"], cwd=ROOT, check=True, capture_output=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)


def compare(commit: str, rounds: int, only: str) -> list[dict[str, Any]]:
    rows = []
    with ExitStack() as stack:
        asks = []
        for one in ("", commit):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            checkout(one, folder)
            asks.append(stack.enter_context(worker(folder)))
        wanted = [(number, name) for number, (name, *_) in enumerate(jobs()) if only in name]
        if not wanted:
            raise ValueError(f"no job has {only!r} in its name")
        for number, name in wanted:
            for ask in asks:
                ask(str(number))
                for _ in range(3):  # warm
                    ask()
            # A pair's two calls change places each time.
            times: list[list[float]] = [[], []]
            for turn in range(rounds):
                for which in (0, 1) if turn % 2 else (1, 0):
                    times[which].append(asks[which]())
            here, there = (torch.tensor(part).quantile(0.2).item() for part in times)
            rows.append({"job": name, "here": here, "there": there, "ratio": here / there})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Read the command line."""
    from bench import record

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="", help="jobs whose name has this in it")
    parser.add_argument("--save", action="store_true", help="a file in bench/results")
    given = parser.parse_args(arguments)
    rows = compare(given.commit, given.rounds, given.only)
    table = Table("job", "here, us", "there, us", "ratio")
    for row in rows:
        here, there = (f"{1e6 * row[side]:.0f}" for side in ("here", "there"))
        table.add_row(row["job"], here, there, f"{row['ratio']:.2f}")
    Console().print(table)
    if given.save:
        command = record.command_line("bench.against", arguments)
        report = {**record.origin(CPU, command), "rows": rows}
        print(record.save(report, "against", record.RESULTS))


if __name__ == "__main__":
    main()
