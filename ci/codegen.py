"""Compiles every shipped kernel configuration offline and reads the machine code: no GPU needed.

    python ci/codegen.py [--target sm_90] [--json FILE]

The launcher of the package runs unchanged on storage-less tensors under a driver that knows a
target but no device. What it would have launched is recorded, compiled and disassembled, so block
sizes, warps, argument types and alignment are those that ship.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # read when the kernels are decorated

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from machine_code import read_machine_code
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

import dl_norm
from dl_norm._batch import Batch
from dl_norm._kl import K3, KL
from dl_norm._log_probs import launch
from dl_norm._options import TokenLoss, make_token_loss
from dl_norm._rollout import NO_ROLLOUT, Reject, RolloutCorrection
from dl_norm.kernels.logits_policy_loss import RowTokens
from dl_norm.kernels.policy_loss import TokenStreams
from dl_norm.kernels.rollout import RolloutTerms
from dl_norm.kernels.surrogates import KLTerms, TokenTerms
from dl_norm.surrogates import Surrogate

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FWD, REDUCE, BWD = "policy_loss_fwd_kernel", "policy_loss_reduce_kernel", "policy_loss_bwd_kernel"
SEQUENCE = "policy_loss_sequence_kernel"
ROWS = "logits_policy_loss_kernel"
# Of the tuples among their arguments.
FIELDS = {
    "terms": TokenTerms._fields, "kl_terms": KLTerms._fields, "rollout_terms": RolloutTerms._fields,
}  # fmt: skip
TOKENS = {ROWS: RowTokens._fields}


@triton.jit
def own_loss(log_prob, ratio, advantage, strength):
    """A token loss as a user may write it: every value depends on every argument, with an extra."""
    squared = log_prob * log_prob
    loss = strength * squared - advantage * ratio
    through_ratio, past_ratio = -advantage * ratio * squared, 2.0 * strength * log_prob
    return loss, through_ratio, past_ratio, ratio < 0.5, ratio > 2.0, squared


class Own(Surrogate, kind="own"):
    extra_names = ("squared",)

    @staticmethod
    def device():
        return own_loss


def clip_formula(log_prob, ratio, advantage, eps_low=0.2, eps_high=0.2):
    """The built-in clip as a user may write it, in PyTorch alone."""
    clipped = torch.clamp(ratio, 1 - eps_low, 1 + eps_high)
    return -torch.minimum(ratio * advantage, clipped * advantage)


KINDS = ("clip", "cispo", "sapo", Own.kind)

SUM = "dppo_kl + abs_drift + nll"


@dataclass(frozen=True)
class Case:
    """One configuration: what a caller passes, not what the launcher makes of it."""

    name: str
    kernel: str = FWD
    dtype: str = "float32"
    mask: str | None = "bool"
    packed: bool = False
    old: bool = True
    ref: bool = False
    advantages: str = "sequence"
    policy_weights: str | None = None  # "sequence" or "token"
    policy_dtype: str = "float32"  # of those
    level: str = "token"
    surrogate: str = "clip"
    corrected: bool = False  # the bias-corrected KL
    kl: KL = K3
    rollout: str | None = None  # of ROLLOUTS
    grad: bool = True
    metrics: bool = False
    out: str | None = None  # dtype that the backward kernel writes


ROLLOUTS = {
    "token": RolloutCorrection(high=2.0),
    "sequence": RolloutCorrection("sequence", high=2.0),
    "geometric": RolloutCorrection("geometric", "mask", 0.9, 1.1, unscored=-1.0),
    "everything": RolloutCorrection(
        mode="mask", high=2.0, reject=(Reject("k3", high=1.0), Reject("k3", "mean", high=1.0)),
        veto=0.01, unscored=-1.0,
    ),
}  # fmt: skip
# Everything that may be absent on the plain padded case alone, every dtype of a mask, the two
# layouts and the three dtypes with each other, what the trainers pass, and all together, where
# register pressure is highest. Tensors are read and used one by one, so pairs that are not listed
# add nothing that all together do not hold. Of ratio levels and token losses likewise: each alone,
# and with everything else.
_EVERYTHING = {"ref": True, "advantages": "token", "policy_weights": "token", "metrics": True}
_VARIANTS = {**_EVERYTHING, "level": "sequence", "corrected": True}
CASES = (
    Case("padded"),
    Case("packed", packed=True, mask=None),
    Case("packed, mask", packed=True),
    Case("mask int64", mask="int64"),
    Case("mask int32", mask="int32"),
    Case("mask float32", mask="float32"),
    Case("mask bf16", mask="bfloat16"),
    Case("no grad", grad=False),
    Case("no old", old=False),
    Case("no old, ref", old=False, ref=True),
    Case("ref", ref=True),
    Case("token advantages", advantages="token"),
    Case("policy weights by sequence", policy_weights="sequence"),
    Case("policy weights by token", policy_weights="token"),
    Case("policy mask by sequence", policy_weights="sequence", policy_dtype="bool"),
    Case("policy mask by token", policy_weights="token", policy_dtype="bool"),
    Case("metrics", metrics=True),
    Case("TRL", mask="int64", ref=True, policy_weights="token"),
    Case("verl", mask="int64", advantages="token", policy_weights="token", metrics=True),
    Case("everything", **_EVERYTHING),
    Case("packed, everything", packed=True, **_EVERYTHING),
    Case("everything, no grad", grad=False, **_EVERYTHING),
    Case("bf16", dtype="bfloat16"),
    Case("bf16 packed", dtype="bfloat16", packed=True, mask=None),
    Case("bf16 mask int64", dtype="bfloat16", mask="int64"),
    Case("bf16 metrics", dtype="bfloat16", metrics=True),
    Case("bf16 everything", dtype="bfloat16", **_EVERYTHING),
    Case("fp16", dtype="float16"),
    Case("fp16 packed, everything", dtype="float16", packed=True, **_EVERYTHING),
    Case("sequence ratio", level="sequence"),
    Case("sequence ratio, token advantages", level="sequence", advantages="token"),
    Case("packed, sequence ratio", level="sequence", packed=True, mask=None),
    Case("corrected KL", ref=True, corrected=True),
    Case("KL clamped", ref=True, kl=KL("k1", "unbiased", 20.0, 10.0)),
    Case("rollout token", rollout="token"),
    Case("rollout token, no old", rollout="token", old=False),
    Case("rollout token, bf16", rollout="token", dtype="bfloat16"),
    Case("rollout sequence", rollout="sequence"),
    Case("rollout everything, packed", rollout="everything", packed=True, **_EVERYTHING),
    Case("packed, variants", packed=True, **_VARIANTS),
    *(Case(kind, surrogate=kind) for kind in KINDS[1:]),
    *(Case(f"{kind}, variants", surrogate=kind, **_VARIANTS) for kind in KINDS),
    *(
        Case(f"bf16 {kind}, variants", dtype="bfloat16", surrogate=kind, **_VARIANTS)
        for kind in KINDS
    ),
    Case("cispo, no old", surrogate="cispo", old=False),
    *(
        Case(f"a formula, {dtype}", dtype=dtype, surrogate=clip_formula.__name__)
        for dtype in ("float32", "bfloat16")
    ),
    # The others with everything that goes with them; the sum holds three device functions.
    Case("dppo_tv, everything", surrogate="dppo_tv", **_EVERYTHING),
    Case("a sum, everything", surrogate=SUM, **_EVERYTHING, corrected=True),
    Case("bf16 a sum, everything", surrogate=SUM, dtype="bfloat16", **_EVERYTHING),
    Case("vespo, everything", surrogate="vespo", level="sequence_sum", **_EVERYTHING),
    Case("gmpo", surrogate="gmpo", level="sequence_token"),
    Case("gmpo, variants", surrogate="gmpo", **_VARIANTS),
    Case("mean of a sequence", kernel=SEQUENCE, level="sequence_token"),
    Case("mean of a sequence, packed", kernel=SEQUENCE, level="sequence", packed=True, mask=None),
    Case("mean of a sequence, no old", kernel=SEQUENCE, old=False, **_VARIANTS),
    Case(
        "mean of a sequence, policy weights by sequence", kernel=SEQUENCE,
        **{**_VARIANTS, "policy_weights": "sequence"},
    ),
    Case("rollout of a sequence", kernel=SEQUENCE, rollout="sequence"),
    Case("rollout of a sequence, geometric", kernel=SEQUENCE, rollout="geometric", packed=True),
    Case("rollout of a sequence, everything", kernel=SEQUENCE, rollout="everything", **_VARIANTS),
    Case("rollout of tokens", kernel=SEQUENCE, rollout="token", level="sequence"),
    Case("mean of a sequence, bf16", kernel=SEQUENCE, dtype="bfloat16", packed=True, **_VARIANTS),
    *(
        Case(f"mean of a sequence, {kind}", kernel=SEQUENCE, surrogate=kind, **_VARIANTS)
        for kind in KINDS
    ),
    Case("mean of a sequence, gmpo", kernel=SEQUENCE, surrogate="gmpo", level="sequence"),
    Case("mean of a sequence, gmpo, variants", kernel=SEQUENCE, surrogate="gmpo", **_VARIANTS),
    Case("sum of a sequence", kernel=SEQUENCE, surrogate="vespo", level="sequence_sum"),
    Case("sum of the loss", kernel=REDUCE),
    Case("sum of loss and metrics", kernel=REDUCE, metrics=True),
    Case("in place float32", kernel=BWD, out="float32"),
    Case("in place bfloat16", kernel=BWD, dtype="bfloat16", out="bfloat16"),
    Case("float32 to float16", kernel=BWD, out="float16"),
)  # fmt: skip


class OfflineDriver:
    """As much of a Triton driver as choosing and compiling a kernel needs."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"  # key of the JIT's cache per device

    def get_current_stream(self, device) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    kernel: str
    key: str  # equal keys share one compiled kernel
    source: ASTSource
    options: dict[str, int]


@contextmanager
def recorded(target: GPUTarget) -> Iterator[list[Launch]]:
    """Collects what is launched inside the block instead of running it."""
    launches: list[Launch] = []

    def hook(*, key, fn, compile, **_) -> bool:
        jit = fn.jit_function
        source = ASTSource(
            jit, compile["signature"], constexprs=compile["constants"], attrs=compile["configs"][0]
        )
        options = {"num_warps": compile["num_warps"]}
        if limit := re.search(r"'maxnreg': (\d+)", str(key)):  # nowhere else
            options["maxnreg"] = int(limit[1])
        launches.append(Launch(jit.fn.__name__, str(key), source, options))
        return True  # neither compile nor run

    driver.set_active(OfflineDriver(target))
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        # Before Triton 3.7 what hooks get in writing cannot say that an argument is a function.
        with mock.patch.object(triton.runtime.jit, "serialize_specialization_data"):
            yield launches
    finally:
        triton.knobs.runtime.jit_cache_hook = None


def launch_case(case: Case, batch: int = 3, length: int = 20, **options: Any) -> None:
    """Calls the launcher as :func:`dl_norm.policy_loss` or its backward would for this case."""

    def tensor(shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    def tokens(dtype: str) -> Tensor:
        return tensor((batch * length,) if case.packed else (batch, length), dtype)

    def per(what: str | None, dtype: str = "float32") -> Tensor | None:
        if what is None:
            return None
        return tokens(dtype) if what == "token" else tensor((batch, 1), dtype)

    if case.kernel == BWD:
        launch.policy_loss_bwd(
            tokens(case.dtype), tensor((), "float32"), getattr(torch, str(case.out))
        )
        return
    given = Batch(
        log_probs=tokens(case.dtype),
        old_log_probs=tokens(case.dtype) if case.old else None,
        ref_log_probs=tokens(case.dtype) if case.ref else None,
        advantages=per(case.advantages),  # type: ignore
        mask=tokens(case.mask) if case.mask else None,
        policy_weights=per(case.policy_weights, case.policy_dtype),
        weights=tensor((batch,), "float32"),
        cu_seqlens=tensor((batch + 1,), "int64") if case.packed else None,
        rollout_log_probs=tokens("float32") if case.rollout else None,
    )
    launch.policy_loss_fwd(given, token_loss(case, **options), case.grad, case.metrics)


def token_loss(case: Any, **options: Any) -> TokenLoss:
    """The terms of a case; ``options`` of :func:`dl_norm.policy_loss` but the surrogate's name."""
    if case.surrogate == Own.kind:
        terms = TokenLoss(Own.kind, (0.5,), beta=0.04)
    else:
        surrogate: Any = case.surrogate
        if surrogate == clip_formula.__name__:
            surrogate = dl_norm.surrogate(clip_formula)
        terms = make_token_loss(surrogate=surrogate, ratio_level=case.level, **options)
    return terms._replace(
        beta=options.get("beta", 0.04 if case.ref else 0.0),
        ratio_level=case.level,
        kl=case.kl,
        bias_corrected_kl=case.corrected,
        rollout=ROLLOUTS[case.rollout].terms() if case.rollout else NO_ROLLOUT,
    )


def compile_case(case: Case, arch: str) -> dict[str, Any]:
    """Compiles one case for one target."""
    with recorded(TARGETS[arch]) as launches:
        launch_case(case)
    (found,) = (entry for entry in launches if entry.kernel == case.kernel)
    return {"case": asdict(case), **compile_launch(found, arch)}


def compile_launch(found: Launch, arch: str) -> dict[str, Any]:
    target = TARGETS[arch]
    kernel = triton.compile(found.source, target=target, options=found.options)
    return {
        "kernel": found.kernel,
        "target": arch,
        "threads": found.options["num_warps"] * target.warp_size,
        "constants": constants(found),
        "asm": {
            kind: kernel.asm[kind] for kind in ("ptx", "cubin", "amdgcn") if kind in kernel.asm
        },
    }


def constants(launched: Launch) -> dict[str, Any]:
    """What the kernel is compiled for: its constexpr arguments, and None for what is absent. A part
    of a tuple is called by its name or number: ``tokens.mask``, ``terms.surrogate.0``."""
    arguments = launched.source.fn.arg_names
    fields = {**FIELDS, "tokens": TOKENS.get(launched.kernel, TokenStreams._fields)}
    found = {}
    for (first, *rest), value in launched.source.constants.items():
        name = arguments[first]
        for part in rest:
            name += f".{fields[name][part] if name in fields else part}"
        found[name] = getattr(value, "__name__", value)
    return found


# Sizes that a specialising JIT would tell apart: 1, multiples of 16, odd, beyond 2^31. Not T = 1,
# where a value per sequence is one per token, and read as such by another kernel.
SIZES = (
    (1, 2), (1, 16), (16, 2), (3, 17), (64, 1023), (64, 1024), (1024, 8192), (1, 1_000_000),
    (2, 2**31 + 1), (2**16, 2**16),
)  # fmt: skip
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "clip": (
        {},
        {"eps_low": 0.0, "eps_high": 1.0},
        {"eps_high": 0.28, "dual_clip": 3.0},
        {"delta": 4.0, "log_ratio_clamp": None, "beta": 1.0},
    ),
    "cispo": ({}, {"eps_low": 1.0, "eps_high": 4.0}, {"log_ratio_clamp": None, "beta": 1.0}),
    "sapo": ({}, {"sapo_temperature_pos": 2.0}, {"sapo_temperature_neg": 1.0, "beta": 1.0}),
    "own": ({}, {"beta": 1.0}),
}


def count_keys(arch: str) -> dict[str, int]:
    """JIT cache keys, that is compilations, per case while everything but its flags changes.

    Swept are the sizes, hence N, T, G and programs, and the numbers of the loss. alpha
    and M act before the kernel, in the weights.
    """
    counts = {}
    for case in CASES:
        with recorded(TARGETS[arch]) as launches:
            for batch, length in SIZES:
                launch_case(case, batch, length)
            if case.kernel in (FWD, SEQUENCE):
                for options in OPTIONS.get(case.surrogate, ({}, {"beta": 1.0})):
                    launch_case(case, **options)
        counts[case.name] = len({entry.key for entry in launches if entry.kernel == case.kernel})
    return counts


def count_slice_keys(arch: str) -> dict[str, int]:
    """Kernels that cutting one batch into micro-batches, views at any address, compiles."""
    batch, length = 8, 13  # odd: rows start at every alignment
    dtypes = (torch.float32, torch.float32, torch.bool)
    weights, advantages = torch.zeros(batch), torch.zeros(batch)
    counts = {}
    for layout, shape in (("padded", (batch, length)), ("packed", (batch * length,))):
        streams = [torch.zeros(shape, dtype=dtype) for dtype in dtypes]
        step = shape[0] // batch
        with recorded(TARGETS[arch]) as launches:
            for i in range(batch):
                log_probs, old, mask = (s[i * step : (i + 1) * step] for s in streams)
                launch.policy_loss_fwd(
                    Batch(
                        log_probs, old, None, advantages[i : i + 1, None], mask, None,
                        weights[i : i + 1],
                        torch.tensor([0, length]) if layout == "packed" else None,
                    ),
                    make_token_loss(), True, False,
                )  # fmt: skip
        counts[layout] = len({entry.key for entry in launches if entry.kernel == FWD})
    return counts


def compile_all(
    compile_case: Callable[[Any, str], dict],
    cases: Sequence,
    archs: list[str],
    in_turn: Sequence[str],
    workers: int = 2,
) -> list[dict[str, Any]]:
    """``in_turn``: targets of which each case takes one; it takes all others."""
    jobs = [
        (case, arch)
        for i, case in enumerate(cases)
        for arch in archs
        if arch not in in_turn or arch == in_turn[i % len(in_turn)]
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        results = pool.map(compile_case, *zip(*jobs, strict=True))
        rows = list(tqdm(results, total=len(jobs), desc="compiling", disable=None))
    found = read_machine_code([row.pop("asm") for row in rows])
    return [{**row, **code} for row, code in zip(rows, found, strict=True)]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    for arch in dict.fromkeys(row["target"] for row in rows):
        table = Table(title=f"{arch}, Triton {triton.__version__}, dl_norm {dl_norm.__version__}")
        for column, justify in (
            ("kernel", "left"), ("configuration", "left"), ("threads", "right"),
            ("registers", "right"), ("spilled bytes", "right"), ("scalar spills", "right"),
            ("instructions", "right"),
            ("loads, bits x count", "left"), ("stores, bits x count", "left"),
        ):  # fmt: skip
            table.add_column(column, justify=justify)
        for row in (row for row in rows if row["target"] == arch):
            table.add_row(
                row["kernel"].removeprefix("policy_loss_").removesuffix("_kernel"),
                row["case"]["name"],
                *(str(row[k]) for k in ("threads", "registers", "spill_bytes")),
                str(row.get("scalar_spills", 0)),
                str(row["instructions"]),
                *(
                    ", ".join(
                        f"{w} x {n}" for w, n in sorted(row[k].items(), key=lambda i: -int(i[0]))
                    )
                    for k in ("loads", "stores")
                ),
            )
        console.print(table)


def main(
    about: str,
    compile_case: Callable[[Any, str], dict],
    cases: Sequence,
    **counts: Callable[[str], dict[str, int]],
) -> None:
    """The command: compiles every case and shows it; ``counts`` of a target go to the file."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--json", type=Path, help="also write every result to this file")
    parser.add_argument(
        "--alternate", action="store_true", help="each case for sm_90 and one other, in turn"
    )
    arguments = parser.parse_args()
    archs = arguments.target or list(TARGETS)
    with tempfile.TemporaryDirectory() as cache:  # fresh: nothing compiled earlier is read
        os.environ["TRITON_CACHE_DIR"] = cache
        in_turn = ("sm_80", "sm_100", "gfx942") if arguments.alternate else ()
        rows = compile_all(compile_case, cases, archs, in_turn)
    show(rows, Console(width=None if sys.stdout.isatty() else 160))
    if arguments.json:
        found = {name: {arch: count(arch) for arch in archs} for name, count in counts.items()}
        arguments.json.write_text(json.dumps({"kernels": rows, **found}, indent=1))


if __name__ == "__main__":
    main(
        str(__doc__).splitlines()[0], compile_case, CASES, keys=count_keys,
        slice_keys=count_slice_keys,
    )  # fmt: skip
