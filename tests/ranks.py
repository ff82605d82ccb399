"""A test file as a script, once per rank, in processes that start with PyTorch imported.

A server imports it once and is forked for every rank. What the server imports starts no threads,
so that nothing of them is missing in a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

from interpreter import patch_once

PRELOADED = ["torch.distributed.fsdp", "torch.distributed.tensor", "dl_norm", "pytest"]


def run(file: str, ranks: int, folder: Path, target: str | None) -> None:
    """``file RANKS RANK FOLDER`` for every rank; ``target``: of ci/ptx."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # By name, as pickle finds it: this file's, whatever package "tests" is elsewhere.
    processes = [
        context.Process(target=rank_main, args=(file, ranks, rank, str(folder), target))
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=300)
    finally:
        for process in processes:
            process.kill()
    failed = any(process.exitcode for process in processes)
    errors = [(folder / f"{rank}.stderr").read_text()[-2000:] for rank in range(ranks)]
    assert not failed, "\n".join(errors)


def rank_main(file: str, ranks: int, rank: int, folder: str, target: str | None) -> None:
    errors = os.open(f"{folder}/{rank}.stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    sys.argv = [file, str(ranks), str(rank), folder]
    sys.path[:0] = [str(Path(file).parent), str(Path(file).parents[1])]
    patch_once()
    if target:
        from ci.ptx import driver

        driver.install(*target.split(","))
    runpy.run_path(file, run_name="__main__")
