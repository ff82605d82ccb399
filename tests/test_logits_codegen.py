"""The machine code of the row kernel, compiled for GPUs that are not here.

In a process of its own, because this one may interpret the kernels.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("triton.backends", reason="Triton is not installed on this platform")

COMPILE = textwrap.dedent(
    """
    import json, re, subprocess, sys, tempfile
    from pathlib import Path
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from dl_norm.kernels.logits_policy_loss import logits_policy_loss_kernel as kernel
    from dl_norm.logits_launch import row_config

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    target = {
        "sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32),
        "sm_100": GPUTarget("cuda", 100, 32), "gfx942": GPUTarget("hip", "gfx942", 64),
    }[sys.argv[1]]
    ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
    plain = dict.fromkeys(
        ["HAS_REF", "HAS_ROLLOUT", "HAS_SOFTCAP", "WRITE_ENTROPY", "METRICS"], False)
    plain |= dict.fromkeys(["HAS_LOSS", "HAS_OLD", "WRITE_GRAD", "ALIGNED_GRAD"], True)
    full = dict.fromkeys(plain, True)
    cases = [
        ("plain", "bf16", "bf16", plain), ("plain", "fp32", "fp32", plain),
        ("fp32 logits", "fp32", "bf16", plain), ("everything", "bf16", "bf16", full),
        ("everything", "fp32", "fp32", full),
        ("log-probs", "bf16", "bf16", plain | {"HAS_LOSS": False, "WRITE_GRAD": False}),
    ]

    def sass(kernel, *flags):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            run = subprocess.run([tool, *flags, file.name], capture_output=True, text=True)
            return run.stdout

    for name, dtype, grad_dtype, flags in cases:
        config = row_config(ITEMSIZE[dtype], target.warp_size)
        constants = flags | {"GROUPS": config.groups, "VECTOR": config.vector}
        types = {"LOGITS": "*" + dtype, "GRAD": "*" + grad_dtype, "TOKEN_IDS": "*i64",
                 "ACTIVE": "*i1"}
        signature = {
            p.name: "constexpr" if p.is_constexpr
            else types.get(p.name, p.annotation_type or "*fp32")
            for p in kernel.params
        }
        # No attribute of any argument: what is compiled holds for every alignment and value.
        built = triton.compile(
            ASTSource(kernel, signature, constexprs=constants),
            target=target, options={"num_warps": config.num_warps},
        )
        row = {"name": f"{name} {dtype}", "write": flags["WRITE_GRAD"],
               "wide_store": 4 * ITEMSIZE[grad_dtype] if dtype == "fp32" else 16,
               "vectors": config.groups // (config.num_warps * target.warp_size)}
        if target.backend == "cuda":
            code, ptx = sass(built, "-sass"), built.asm["ptx"]
            row |= {
                "registers": int(re.search(r"REG:(\\d+)", sass(built, "-res-usage"))[1]),
                "spills": len(re.findall(r"\\b(?:LDL|STL)\\b", code)),
                "f64": len(re.findall(r"\\.f64|\\bD(?:ADD|MUL|FMA)\\b", ptx + code)),
                "atomics": len(re.findall(r"\\b(?:ATOM|RED)[GS]?\\.", code)),
                # EL / EF: the eviction hints, so the loads of the two passes over the row.
                "first": re.findall(r"LDG\\.E\\.(?:EL|EF)\\.?(\\w*)", code),
                "stores": re.findall(r"STG\\.E\\.(\\d+)", code),
            }
        else:
            code = built.asm["amdgcn"]
            row |= {
                "registers": int(re.search(r"\\.vgpr_count:\\s+(\\d+)", code)[1]),
                "spills": sum(map(int, re.findall(r"gpr_spill_count:\\s+(\\d+)", code))),
                "f64": len(re.findall(r"_f64", code)),
                "atomics": len(re.findall("atomic", code)),
                "first": ["128"] * len(re.findall(r"(?:buffer|global)_load_dwordx4", code)),
                "stores": {"dwordx4": ["128"], "dwordx2": ["64"]}[
                    re.search(r"(?:buffer|global)_store_(dwordx\\d)", code)[1]
                ] if flags["WRITE_GRAD"] else [],
            }
        print(json.dumps(row))
    """
)


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100", "gfx942"])
def kernels(request, tmp_path_factory):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": str(ROOT),
    }
    script = tmp_path_factory.mktemp("script") / "compile.py"
    script.write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, str(script), request.param],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    # 65,536 registers for 1024 threads; on AMD 512 a lane for the 4 waves of each SIMD.
    limit = {"register_limit": 128 if request.param == "gfx942" else 64}
    rows = [json.loads(line) | limit for line in done.stdout.splitlines()]
    assert len(rows) == 6
    return rows


def test_every_access_of_the_row_is_wide_at_any_vocabulary_and_alignment(kernels):
    for row in kernels:
        passes = 2 if row["write"] else 1
        assert row["first"] == ["128"] * passes * row["vectors"], row
        assert bool(row["stores"]) == row["write"], row
        assert set(row["stores"]) <= {str(8 * row["wide_store"])}, row


def test_registers_doubles_atomics(kernels):
    for row in kernels:
        assert row["registers"] <= row["register_limit"], row
        assert row["f64"] == row["atomics"] == 0, row


def test_no_spills(kernels):
    spilled = {row["name"]: row["spills"] for row in kernels if row["spills"]}
    if spilled:
        pytest.xfail(f"these kernels are not public yet: still to be brought down: {spilled}")
