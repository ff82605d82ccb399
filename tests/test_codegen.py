"""The machine code of every shipped kernel configuration, compiled for GPUs that are not here.

ci/codegen.py compiles in a process of its own, because this one may interpret the kernels.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import triton
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
CODEGEN = ROOT / "ci" / "codegen.py"
pytest.importorskip("triton.backends", reason="Triton is not installed on this platform")

CUDA = ("sm_80", "sm_90", "sm_100")
TARGETS = (*CUDA, "gfx942")
FWD, REDUCE, BWD = "policy_loss_fwd_kernel", "policy_loss_reduce_kernel", "policy_loss_bwd_kernel"
SEQUENCE = "policy_loss_sequence_kernel"
ITEMSIZE = {"bool": 1, "bfloat16": 2, "float16": 2, "int32": 4, "float32": 4, "int64": 8}


def run_python(*arguments, cache, **environment):
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(CODEGEN.parent))),
        **environment,
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """{"kernels": [what the machine code of a case and target says], "keys": ..., ...}"""
    folder = tmp_path_factory.mktemp("codegen")
    run_python(CODEGEN, "--alternate", "--json", folder / "report.json", cache=folder)
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(params=TARGETS)
def kernels(request, report):
    found = [row for row in report["kernels"] if row["target"] == request.param]
    assert {row["case"]["kernel"] for row in found} >= {FWD, SEQUENCE, BWD}
    return found


def name(row):
    return f"{row['case']['kernel']} ({row['case']['name']}) on {row['target']}"


TOKENS_PER_THREAD = 8  # of the forward and the backward kernel


def wide(dtypes, vector):
    """128-bit accesses of a thread to tensors of these dtypes, of which it takes whole vectors."""
    return sum(
        TOKENS_PER_THREAD * ITEMSIZE[dtype] // 16
        for dtype in dtypes
        if vector * ITEMSIZE[dtype] >= 16
    )


def vector(case):
    """Tokens in a vector: 16 bytes of log-probs."""
    return 16 // ITEMSIZE[case["dtype"]]


def token_dtypes(case):
    """The dtypes of the tensors of which the forward kernel reads one element a token."""
    own_ratio = case["old"] and (case["level"] == "token" or case["surrogate"] == "gmpo")
    # Else the ratio is 1, or one number a sequence. Of a correction by sequences alone nothing is
    # left to be read.
    kind = case["rollout"]
    rollout = kind in ("token", "everything") or (kind is not None and case["metrics"])
    log_prob = own_ratio or case["ref"] or case["surrogate"] not in ("clip", "sapo") or rollout
    dtypes = [case["dtype"]] * (log_prob + own_ratio + case["ref"])
    dtypes += ["float32"] * rollout
    dtypes += ["float32"] * (case["advantages"] == "token")
    dtypes += [case["policy_dtype"]] * (case["policy_weights"] == "token")
    return dtypes + [case["mask"]] * (case["mask"] is not None)


_ROLLOUT = (
    "tokens.rollout_log_probs", "ROLLOUTS", "rollout_terms", "rollout_terms.TOKEN",
    "rollout_terms.log_weight", "rollout_terms.token_bounds", "rollout_terms.sequence_bounds",
    "rollout_terms.unscored",
)  # fmt: skip
OPTIONAL = {
    FWD: (
        "tokens.old_log_probs", "tokens.ref_log_probs", "tokens.advantages", "tokens.mask",
        "tokens.policy_weights", "ADVANTAGES", "POLICY_WEIGHTS", "CU_SEQLENS", "LOG_RATIO_MEANS",
        "RATIO_GRADS", "GRAD", "terms.token_clip", "kl_terms", "kl_terms.clamps",
        "kl_terms.grad_estimator", "kl_terms.WEIGHTED_GRAD", "kl_terms.CORRECTED", *_ROLLOUT,
    ),
    SEQUENCE: (
        "tokens.old_log_probs", "tokens.ref_log_probs", "tokens.advantages", "tokens.mask",
        "tokens.policy_weights", "ADVANTAGES", "POLICY_WEIGHTS", "CU_SEQLENS", "LOG_RATIO_MEANS",
        "RATIO_GRADS", "terms.token_clip", "kl_terms", "kl_terms.clamps",
        "kl_terms.grad_estimator", "kl_terms.WEIGHTED_GRAD", *_ROLLOUT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernel", [FWD, SEQUENCE])
def test_what_may_be_absent_is_covered(kernel, report):
    """Every argument that may be None is it somewhere and somewhere not, every constexpr flag takes
    both values and every token loss is there, so no branch is left uncompiled."""
    rows = [row["constants"] for row in report["kernels"] if row["case"]["kernel"] == kernel]
    names = {name for row in rows for name, value in row.items() if value is None}
    assert names == set(OPTIONAL[kernel])
    for name in names:
        assert not all(name in row and row[name] is None for row in rows), name
    flag = "METRICS" if kernel == FWD else "MEAN"
    assert {row[flag] for row in rows} == {False, True}
    assert {row["terms.surrogate.0"] for row in rows} >= {
        "clip", "policy_gradient", "sapo", "own_loss"
    }  # fmt: skip


def test_nothing_spills(kernels):
    """To memory. On gfx942, where a predicate is a pair of scalar registers, kernels with metrics
    keep up to 88 of those in lanes of two vector registers, 107 with a sum of three token losses;
    the reader reports them apart."""
    spilled = {name(row): row["spill_bytes"] for row in kernels if row["spill_bytes"]}
    old = Version(triton.__version__) < Version("3.7")
    if spilled and old and all(row.endswith("on sm_80") for row in spilled):
        pytest.xfail(f"the assembler of Triton {triton.__version__} spills on sm_80: {spilled}")
    assert not spilled
    assert not {name(row): row["local_memory"] for row in kernels if row["local_memory"]}
    assert all(
        row.get("scalar_spills", 0) <= (110 if " + " in row["case"]["surrogate"] else 88)
        for row in kernels
    )


def test_no_double_precision(kernels):
    assert not {name(row): row["fp64"] for row in kernels if row["fp64"]}


def test_no_atomics(kernels):
    """What adds up in the order of arrival is not deterministic to the bit."""
    assert not {name(row): row["atomics"] for row in kernels if row["atomics"]}


def test_interior_loads_are_128_bit(kernels):
    """Each token tensor is read by 128-bit loads, and nothing else is that wide."""
    for row in kernels:
        case = row["case"]
        if case["kernel"] == FWD:
            expected = wide(token_dtypes(case), vector(case))
        elif case["kernel"] == BWD:
            # Of the two tiles of a program, which the compiler for AMD writes out.
            expected = wide([case["dtype"]], 8) * (2 if row["target"] == "gfx942" else 1)
            assert expected >= 1, name(row)
        else:
            continue
        assert row["loads"].get("128", 0) == expected, name(row)


def test_interior_mask_loads_are_as_wide_as_a_vector(kernels):
    """A bool mask is read by 4 or 8 bytes. Only the stream's last tile, whose loads are predicated,
    reads single bytes: one load for each token of a thread, not two. A policy mask the same; one
    of sequences is read once for all tokens of a tile, or once for each."""
    checked = 0
    for row in kernels:
        case = row["case"]
        if case["kernel"] != FWD:
            continue
        policy = case["policy_weights"] if case["policy_dtype"] == "bool" else None
        masks = (case["mask"] == "bool") + (policy == "token")
        expected = masks * TOKENS_PER_THREAD + (policy == "sequence") * (1 + TOKENS_PER_THREAD)
        assert row["loads"].get("8", 0) == expected, name(row)
        checked += expected > 0
    assert checked >= 10


def test_interior_stores_are_128_bit(kernels):
    """The gradient is stored in one place, or in two that the compiler did not merge: a tile of
    one sequence and a tile of several."""
    for row in kernels:
        case = row["case"]
        found = row["stores"].get("128", 0)
        if case["kernel"] == FWD and case["grad"]:
            once = wide(["bfloat16" if case["dtype"] == "bfloat16" else "float32"], vector(case))
            assert found in (once, 2 * once), name(row)
        elif case["kernel"] == BWD:
            tiles = 2 if row["target"] == "gfx942" else 1
            assert found == tiles * wide([case["out"]], 8), name(row)
        else:
            assert found == 0, name(row)


# Registers a thread. The register file of 65,536 holds so many programs of 128 threads and 1024
# tokens an SM: 64 -> 8, 72 -> 7, 80 -> 6, 128 -> 4 (50, 44, 38, 25 % occupancy).
def register_budget(row):
    case = row["case"]
    if case["kernel"] == REDUCE:
        return 80  # one program, or ten: occupancy is of no account
    if case["kernel"] == BWD:
        return 40
    if case["kernel"] == SEQUENCE:
        return 128  # one program a sequence: there are seldom more of them than fit
    if case["name"] in ("padded", "packed", "packed, mask", "bf16", "bf16 packed", "fp16"):
        return 72
    if case["rollout"] and case["metrics"]:
        return 168  # all kinds of weights, rejections and sums together
    if " + " in case["surrogate"]:
        return 168  # 3 programs: three token losses
    if "dppo" in case["surrogate"] and case["ref"]:
        return 160  # 3 programs: the probabilities of both policies, beside all that there may be
    return 128


@pytest.mark.parametrize("target", CUDA)
def test_registers_within_budget(report, target):
    rows = [row for row in report["kernels"] if row["target"] == target]
    # The assembler of an older Triton takes a few more: 3.6 up to 136 where 128 is the budget.
    more = 8 if Version(triton.__version__) < Version("3.7") else 0
    over = {
        name(row): (row["registers"], register_budget(row))
        for row in rows
        if row["registers"] > register_budget(row) + more
    }
    assert not over, "(registers, budget)"


def test_the_clip_from_its_formula_is_no_worse_than_by_hand(report):
    """As wide, and at most four registers more."""
    rows = {row["case"]["name"]: row for row in report["kernels"] if row["target"] == "sm_90"}
    for hand, formula in (("padded", "a formula, float32"), ("bf16", "a formula, bfloat16")):
        assert rows[formula]["registers"] <= rows[hand]["registers"] + 4
        assert rows[formula]["loads"] == rows[hand]["loads"]
        assert rows[formula]["stores"] == rows[hand]["stores"]


def adds_sums(row):
    case = row["case"]
    return row["constants"].get("NUM_EXTRAS") or (case["rollout"] and case["metrics"])


def test_registers_within_budget_on_gfx942(report):
    """128 of 512 VGPRs: 4 waves of 64 on each SIMD; 168, 3 waves, where a token loss or a rollout
    correction adds sums, or has the probabilities of both policies."""
    rows = [row for row in report["kernels"] if row["target"] == "gfx942"]

    def budget(row):
        return 168 if adds_sums(row) or "dppo" in row["case"]["surrogate"] else 128

    over = {name(row): row["registers"] for row in rows if row["registers"] > budget(row)}
    assert not over


def test_one_kernel_for_all_sizes_and_options(report):
    """No recompile when B, T, N, strides, eps, beta or the clips change, nor at T % 16 = 0
    against odd T: the wide loads above are those of every T.

    The AMD backend compiles a second kernel for tensors beyond 2 GiB, which need 64-bit offsets.
    """
    for target in TARGETS:
        allowed = 2 if target == "gfx942" else 1
        assert len(report["keys"][target]) > 30
        more = {case: keys for case, keys in report["keys"][target].items() if keys > allowed}
        assert not more, target


def test_one_kernel_for_all_micro_batches(report):
    """Slices of a batch start at any address: what is not aligned to 16 bytes is copied."""
    for target in TARGETS:
        assert report["slice_keys"][target] == {"padded": 1, "packed": 1}, target


CONTROL = """
    import json
    import triton
    import triton.language as tl
    from triton.compiler import ASTSource
    from codegen import TARGETS
    from machine_code import read_machine_code

    @triton.jit
    def narrow_fp64_atomic(X, MASK, OUT, BLOCK: tl.constexpr):
        lane = tl.arange(0, BLOCK)
        x = tl.load(X + lane, mask=tl.load(MASK + lane) != 0, other=0.0)
        tl.atomic_add(OUT, tl.sum(x.to(tl.float64), axis=0).to(tl.float32))

    @triton.jit
    def spilling(X, BLOCK: tl.constexpr):
        lane = tl.arange(0, BLOCK)
        x = tl.load(X + lane)  # 32 numbers a thread, which live through the sum, in 32 registers
        tl.store(X + lane, x * tl.sum(x, axis=0))

    result = {}
    for arch in ("sm_90", "gfx942"):
        for fn, signature, options in (
            (narrow_fp64_atomic, ("*fp32", "*i1", "*fp32"), {}),
            (spilling, ("*fp32",), {"num_warps": 1}),
        ):
            types = dict(zip(fn.arg_names, (*signature, "constexpr")))
            if arch == "sm_90" and fn is spilling:
                options = {**options, "maxnreg": 32}
            kernel = triton.compile(
                ASTSource(
                    fn, types, constexprs={(len(signature),): 1024},
                    attrs={(i,): [["tt.divisibility", 16]] for i in range(len(signature))},
                ),
                target=TARGETS[arch],
                options=options,
            )
            result[f"{fn.__name__} {arch}"] = kernel.asm
    print(json.dumps(dict(zip(result, read_machine_code(list(result.values()))))))
"""


def test_the_reader_sees_what_it_looks_for(tmp_path):
    """The tests above look for absences: kernels with every fault, read by the same reader."""
    script = tmp_path / "control.py"
    script.write_text(textwrap.dedent(CONTROL))
    seen = json.loads(run_python(script, cache=tmp_path).splitlines()[-1])
    for target in ("sm_90", "gfx942"):
        faulty = seen[f"narrow_fp64_atomic {target}"]
        assert faulty["atomics"]
        assert faulty["fp64"]
        # The mask is loaded first, so the load that it guards is one by one.
        assert faulty["loads"]["32"] >= 4
        assert "128" not in faulty["loads"]
    assert seen["spilling sm_90"]["spill_bytes"] > 0
    assert seen["spilling sm_90"]["local_memory"]
