"""Compiles every shipped configuration of the kernels over kept sets offline and reads the machine
code.

    python ci/codegen_kept.py [--target sm_90] [--json FILE]

Like ci/codegen.py, on whose recording of launches it builds: the launchers of the package run
unchanged, so types, alignment and every other attribute of an argument are those of a real launch.
"""

from __future__ import annotations

import codegen  # first: it sets up Triton and the path

# isort: split
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dl_norm._kept.entries import Entries
from dl_norm._kept.launch import kept_head_grad, kept_hidden_grad, kept_log_probs, kept_sums
from dl_norm._rows.records import RowSettings

LOG_PROBS, HIDDEN_GRAD, HEAD_GRAD = (
    f"kept_{name}_kernel" for name in ("log_probs", "hidden_grad", "head_grad")
)


@dataclass(frozen=True)
class Case:
    """One configuration: what a caller passes, not the flags that the launcher makes of it."""

    name: str
    kernel: str
    dtype: str = "bfloat16"
    bias: bool = False
    softcap: bool = False
    entropy: bool = False
    squares: bool = False
    spread: bool = False
    needed: tuple[bool, bool, bool] = (True, True, False)
    odd: bool = False  # rows that are no whole vectors


# Everything that may be absent alone, the dtypes and rows of odd length with everything.
CASES = (
    Case("log-probs", LOG_PROBS),
    Case("log-probs bias", LOG_PROBS, bias=True),
    Case("log-probs softcap", LOG_PROBS, softcap=True),
    Case("log-probs entropy", LOG_PROBS, entropy=True),
    Case("log-probs squares", LOG_PROBS, squares=True),
    Case("log-probs spread", LOG_PROBS, spread=True),
    *(
        Case(
            f"log-probs {dtype}, everything{spread}{odd}",
            LOG_PROBS,
            dtype,
            True,
            True,
            True,
            True,
            spread=bool(spread),
            odd=bool(odd),
        )
        for dtype in ("bfloat16", "float16", "float32")
        for spread in ("", " spread")
        for odd in ("", ", odd")
    ),
    Case("hidden", HIDDEN_GRAD),
    Case("hidden softcap", HIDDEN_GRAD, softcap=True),
    Case("hidden entropy", HIDDEN_GRAD, entropy=True),
    Case("hidden frozen", HIDDEN_GRAD, needed=(False, True, False)),
    *(
        Case(f"hidden {dtype}{odd}", HIDDEN_GRAD, dtype, softcap=True, entropy=True, odd=bool(odd))
        for dtype in ("bfloat16", "float16", "float32")
        for odd in ("", ", odd")
    ),
    Case("head", HEAD_GRAD),
    Case("bias alone", HEAD_GRAD, needed=(True, False, True)),
    *(
        Case(f"head {dtype}{odd}", HEAD_GRAD, dtype, needed=(True, True, True), odd=bool(odd))
        for dtype in ("bfloat16", "float16", "float32")
        for odd in ("", ", odd")
    ),
)


def launch_case(
    case: Case, tokens: int = 5, vocabulary: int = 1000, size: int = 1024, entries: int = 37
) -> None:
    """Calls the launchers as the public functions would for this case."""

    def tensor(*shape: int, dtype: str = "float32") -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    size += int(case.odd)
    hidden = tensor(tokens, size, dtype=case.dtype)
    head = tensor(vocabulary, size, dtype=case.dtype)
    bias = tensor(vocabulary, dtype=case.dtype) if case.bias else None
    settings = RowSettings(
        0.7, 30.0 if case.softcap else None, entropy=case.entropy, sum_sq_probs=case.squares
    )
    found = Entries(
        ids=tensor(entries, dtype="int64"), tokens=tensor(entries, dtype="int64"),
        hits=tensor(entries, dtype="bool"), offsets=tensor(tokens + 1, dtype="int64"),
        active=tensor(tokens, dtype="bool"), plural=tensor(tokens, dtype="bool"),
        bad=tensor(tokens, dtype="bool"), sorted_ids=tensor(entries, dtype="int64"),
        order=tensor(entries, dtype="int64"),
    )  # fmt: skip
    arguments = hidden, head, bias, found, settings, case.entropy
    if case.spread:
        kept_sums(*arguments)
        return
    logits = kept_log_probs(*arguments)
    entropy_weights = tensor(tokens) if case.entropy else None
    grads, _ = kept_hidden_grad(
        hidden, head, found, logits, tensor(tokens), entropy_weights, settings, case.needed[0]
    )
    kept_head_grad(hidden, head, found, grads, case.needed[1:])


def compile_case(case: Case, arch: str) -> dict[str, Any]:
    """Compiles one case for one target."""
    with codegen.recorded(codegen.TARGETS[arch]) as launches:
        launch_case(case)
    (found,) = (entry for entry in launches if entry.kernel == case.kernel)
    return {"case": asdict(case), **codegen.compile_launch(found, arch)}


# Tokens, vocabulary, row length and entries that a specialising JIT would tell apart.
SIZES = ((1, 1, 8, 2), (1, 16, 16, 16), (3, 7, 896, 33), (16, 1000, 1024, 160), (5, 151936, 64, 8))


def count_keys(arch: str) -> dict[str, int]:
    """JIT cache keys, that is compilations, per case over all sizes."""
    counts = {}
    for case in CASES:
        with codegen.recorded(codegen.TARGETS[arch]) as launches:
            for sizes in SIZES:
                launch_case(case, *sizes)
        counts[case.name] = len({entry.key for entry in launches if entry.kernel == case.kernel})
    return counts


if __name__ == "__main__":
    codegen.main(str(__doc__).splitlines()[0], compile_case, CASES, keys=count_keys)
