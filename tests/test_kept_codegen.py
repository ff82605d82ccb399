"""The machine code of every shipped configuration of the kernels over kept sets, for GPUs that are
not here.

ci/codegen_kept.py compiles in a process of its own, because this one may interpret the kernels.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("triton.backends", reason="Triton is not installed on this platform")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("codegen") / "report.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "ci" / "codegen_kept.py"), "--alternate", "--json", str(out)],
        env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(params=TARGETS)
def kernels(request, report):
    rows = [row for row in report["kernels"] if row["target"] == request.param]
    assert len(rows) >= 8
    return rows


def test_rows_are_read_in_whole_vectors(kernels):
    """Of the head, or of hidden states for the head's gradient: two vectors a thread."""
    for row in kernels:
        case = row["case"]
        matrix = not (case["odd"] or "frozen" in case["name"] or "alone" in case["name"])
        assert (row["loads"].get("128", 0) >= 2) == matrix, case["name"]


def test_registers_spills_doubles_atomics(kernels):
    # The assembler that comes with Triton 3.9 keeps 56 registers and spills two.
    allowed = 8 if Version(triton.__version__) >= Version("3.9") else 0
    for row in kernels:
        assert row["registers"] <= 128, row["case"]["name"]  # four programs of 128 threads
        assert row["spill_bytes"] <= allowed, row["case"]["name"]
        assert not row["fp64"] and not row["atomics"], row["case"]["name"]


def test_one_kernel_for_all_sizes(report):
    """Rows of whole vectors have one, and others another; nothing else tells sizes apart."""
    assert all(set(keys.values()) == {1} for keys in report["keys"].values())
