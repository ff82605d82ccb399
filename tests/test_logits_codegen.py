"""The machine code of every shipped configuration of the row kernel, for GPUs that are not here.

ci/codegen_logits.py compiles in a process of its own, because this one may interpret the kernels.
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
        [sys.executable, str(ROOT / "ci" / "codegen_logits.py"), "--alternate", "--json", str(out)],
        env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(params=TARGETS)
def kernels(request, report):
    rows = [row for row in report["kernels"] if row["target"] == request.param]
    assert len(rows) >= 8
    return rows


def test_every_access_of_the_row_is_wide(kernels):
    """A vector for the reference, two a thread and pass, and two where the sum overflowed; more of
    each where ptxas unrolls a loop. The gradient of float32 logits in 16 bits is half as wide. What
    is left of a row when no whole tile is goes by pairs. Where the sums of a row are given there is
    the second pass alone, with two vectors."""
    for row in kernels:
        case = row["case"]
        first, second = 0 if case["part"] == "given" else 5, 2 if case["grad"] else 0
        assert row["loads"].get("128", 0) >= first + second, case["name"]
        if case["grad"]:
            bits = 16 if case["grad"] != "float32" else 32
            vector = 16 // (4 if case["dtype"] == "float32" else 2)
            wide = {found for found in row["stores"] if int(found) > 32}
            assert wide - {str(2 * bits)} == {str(vector * bits)} - {str(2 * bits)}, case["name"]
            assert str(vector * bits) in row["stores"], case["name"]


def test_registers_doubles_atomics(kernels):
    for row in kernels:
        limit = 128 if row["target"] == "gfx942" else 64  # 1024 threads in one register file
        assert row["registers"] <= limit, row["case"]["name"]
        assert not row["fp64"] and not row["atomics"], row["case"]["name"]


def test_no_spills(kernels):
    # The assembler that comes with Triton 3.9: 8 bytes, without gradient.
    allowed = 8 if Version(triton.__version__) >= Version("3.9") else 0
    spilled = {
        (r["target"], r["case"]["name"])
        for r in kernels
        if r["spill_bytes"] > (0 if r["case"]["grad"] else allowed)
    }
    if Version(triton.__version__) < Version("3.7"):  # its assembler: 8 bytes, without gradient
        spilled -= {("sm_80", "bf16 log-probs, entropy")}
    assert not spilled


def test_one_kernel_for_all_sizes(report):
    assert all(set(keys.values()) == {1} for keys in report["keys"].values())
