"""Compiles every shipped configuration of the row kernel offline and reads the machine code.

    python ci/codegen_logits.py [--target sm_90] [--json FILE]

Like ci/codegen.py, on whose recording of launches it builds: the launcher of the package runs
unchanged, so types, alignment and every other attribute of an argument are those of a real launch.
"""

from __future__ import annotations

import codegen  # first: it sets up Triton and the path

# isort: split
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from dl_norm._rows.launch import logits_pass, row_sums
from dl_norm._rows.records import RowOutputs, RowSettings, TokenRows, VocabShard, with_entropy


@dataclass(frozen=True)
class Case:
    """One configuration: what a caller passes, not the flags that the launcher makes of it."""

    name: str
    dtype: str = "bfloat16"
    grad: str | None = "bfloat16"
    loss: bool = True
    old: bool = True
    ref: bool = False
    policy_weights: bool = False
    softcap: bool = False
    entropy: bool = False
    metrics: bool = False
    surrogate: str = "clip"
    corrected: bool = False  # the bias-corrected KL
    kl: Any = codegen.K3
    rollout: str | None = None
    level: str = "token"
    bonus: bool = False  # the entropy in the loss
    squares: bool = False  # sum p^2
    part: str | None = None  # of a vocabulary over processes: "sums" or "given", the two launches
    huge: bool = False  # 4 GB of logits: beyond 32-bit offsets


# Every flag alone with bfloat16, the dtypes with each other, and the union of all flags, where
# register pressure is highest.
_EVERYTHING = {
    "ref": True, "policy_weights": True, "softcap": True, "entropy": True, "metrics": True,
    "surrogate": "sapo", "corrected": True, "bonus": True, "squares": True,
}  # fmt: skip
_FP16 = {"dtype": "float16", "grad": "float16"}
_FP32 = {"dtype": "float32", "grad": "float32"}
CASES = (
    Case("bf16"),
    Case("bf16 beyond 2 GiB", huge=True),
    Case("bf16 no old", old=False),
    Case("bf16 ref, policy weights", ref=True, policy_weights=True),
    Case("bf16 softcap", softcap=True),
    *(Case(f"bf16 {kind}", surrogate=kind) for kind in codegen.KINDS),
    Case("bf16 a sum", surrogate=codegen.SUM, ref=True, policy_weights=True, metrics=True),
    Case("fp32 a sum", **_FP32, surrogate=codegen.SUM, metrics=True),
    Case("bf16 rollout", old=False, rollout="token"),
    Case("bf16 rollout, metrics", old=False, rollout="everything", metrics=True, entropy=True),
    Case("bf16 entropy", entropy=True),
    Case("bf16 metrics", metrics=True),
    Case("bf16 entropy bonus", bonus=True),
    Case("bf16 sum of squares", squares=True),
    Case("bf16 sums of a part", grad=None, part="sums"),
    Case("bf16 sums of a part, everything", part="sums", **{**_EVERYTHING, "grad": None}),
    Case("bf16 sums given", part="given"),
    Case("bf16 sums given, everything", part="given", **_EVERYTHING),
    Case("bf16 sums given, log-probs", grad=None, loss=False, old=False, part="given"),
    Case("bf16 everything", **_EVERYTHING),
    Case("bf16 everything beyond 2 GiB", huge=True, **_EVERYTHING),
    Case("bf16 no grad", grad=None),
    Case("bf16 log-probs", grad=None, loss=False, old=False),
    Case("bf16 log-probs, entropy", grad=None, loss=False, old=False, entropy=True),
    Case("fp16", **_FP16),
    Case("fp16 everything", **_FP16, **_EVERYTHING),
    Case("fp32", **_FP32),
    Case("fp32 everything", **_FP32, **_EVERYTHING),
    Case("fp32 entropy bonus", **_FP32, bonus=True),
    Case("fp32 sums of a part, everything", "float32", None, part="sums", **_EVERYTHING),
    Case("fp32 sums given, everything", **_FP32, part="given", **_EVERYTHING),
    Case("fp32 log-probs, entropy", "float32", None, loss=False, old=False, entropy=True),
    Case("fp32 to bf16", dtype="float32"),
    Case("fp32 to bf16 everything", dtype="float32", **_EVERYTHING),
)


def launch_case(
    case: Case, tokens: int = 5, vocabulary: int = 1000, strides: tuple[int, int] | None = None
) -> None:
    """Calls the launcher as the public functions would for this case."""

    def tensor(*shape: int, dtype: str = "float32") -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    if case.huge:
        tokens, vocabulary = 2**14, 2**17
    logits = tensor(tokens, vocabulary, dtype=case.dtype)
    if strides is not None:
        logits = logits.as_strided((1, tokens, vocabulary), (*strides, 1))
    grad = None
    if case.grad is not None:
        same = case.grad == case.dtype and strides is None  # in place
        grad = logits if same else tensor(tokens, vocabulary, dtype=case.grad)
    rows = TokenRows(
        token_ids=tensor(tokens, dtype="int64"),
        active=tensor(tokens, dtype="bool"),
        advantages=tensor(tokens) if case.loss else None,
        weights=tensor(tokens) if case.loss else None,
        old_log_probs=tensor(tokens) if case.old else None,
        ref_log_probs=tensor(tokens) if case.ref else None,
        policy_weights=tensor(tokens) if case.policy_weights else None,
        rollout_log_probs=tensor(tokens) if case.rollout else None,
        entropy_weights=tensor(tokens) if case.bonus else None,
    )
    terms: Any = codegen.token_loss(case) if case.loss else None
    shard = VocabShard("group", 3 * vocabulary, 8 * vocabulary) if case.part else VocabShard()
    settings = RowSettings(
        0.7, 30.0 if case.softcap else None, terms, case.metrics, case.entropy, case.squares, shard
    )
    sums = tensor(3 + with_entropy(rows, settings) + case.squares, tokens) if case.part else None
    if case.part == "sums":
        row_sums(logits, rows, 0, settings, cast(Tensor, sums))
        return
    outputs = RowOutputs.zeros(tokens, settings, logits.device)
    logits_pass(logits, grad, rows, 0, settings, outputs, sums)


def compile_case(case: Case, arch: str) -> dict[str, Any]:
    """Compiles one case for one target."""
    with codegen.recorded(codegen.TARGETS[arch]) as launches:
        launch_case(case)
    (found,) = launches
    return {"case": asdict(case), **codegen.compile_launch(found, arch)}


# Numbers of tokens and words that a specialising JIT would tell apart.
SIZES = ((1, 1), (1, 16), (3, 7), (16, 1000), (5, 1003), (1024, 32000), (1, 151936))


def count_keys(arch: str) -> dict[str, int]:
    """JIT cache keys, that is compilations, per case over all sizes and strides."""
    counts = {}
    for case in CASES:
        if case.huge:
            continue
        with codegen.recorded(codegen.TARGETS[arch]) as launches:
            for tokens, vocabulary in SIZES:
                launch_case(case, tokens, vocabulary)
                if vocabulary % 8 == 0:
                    launch_case(case, tokens, vocabulary, ((tokens + 1) * vocabulary, vocabulary))
        counts[case.name] = len({entry.key for entry in launches})
    return counts


if __name__ == "__main__":
    codegen.main(str(__doc__).splitlines()[0], compile_case, CASES, keys=count_keys)
