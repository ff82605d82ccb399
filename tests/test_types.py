"""What a user's type checker says: nothing of the README's own loops, something of a typo."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("dl_norm/**/README.md"))]
BLOCK = re.compile(r"^<!-- run: (\S+) -->\n```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

# What the blocks of these names find defined.
PRELUDE = """
from collections.abc import Callable, Iterable
from typing import Any, cast
import torch
import torch.distributed
from torch import Tensor
import dl_norm

"""
TENSORS = (
    "old", "adv", "advantages", "mask", "weights", "lengths", "old_log_probs", "token_ids",
    "hidden", "logits", "action_mask", "log_probs",
)  # fmt: skip
DECLARED = {
    **dict.fromkeys(TENSORS, "Tensor"),
    **dict.fromkeys(("group", "context_group", "data_group"), "torch.distributed.ProcessGroup"),
    **dict.fromkeys(("max_length", "micro_batches", "data_size", "context_size"), "int"),
    "other": "dl_norm.PolicyLossMetrics",
    "log": "Callable[..., None]",
    "model": "Any",  # as a Hugging Face model is
}
CHECKED = ("loop", "metrics", "heads", "distributed", "monitor", "no-hook", "surrogate")


def prelude(**changed: str) -> str:
    declared = {**DECLARED, **changed}.items()
    return PRELUDE + "".join(f'{name} = cast("{of}", None)\n' for name, of in declared)


def blocks() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for name, language, text in BLOCK.findall(page.read_text()):
            if language == "diff":
                lines = (line for line in text.splitlines() if not line.startswith("-"))
                text = "".join(f"{line[1:]}\n" for line in lines)
            if name in CHECKED and language in ("diff", "python"):
                found.append((name, text))
    return found


def pyright(folder: Path, *sources: str) -> list[list[str]]:
    """The errors of each source, as messages."""
    pytest.importorskip("pyright")
    for number, source in enumerate(sources):
        (folder / f"source{number}.py").write_text(source)
    settings = {"extraPaths": [str(ROOT)], "pythonVersion": "3.10"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    output = subprocess.run([*command, "-p", str(folder)], capture_output=True, text=True)
    errors: list[list[str]] = [[] for _ in sources]
    for found in json.loads(output.stdout)["generalDiagnostics"]:
        if found["severity"] == "error":
            number = int(re.findall(r"source(\d+)", Path(found["file"]).name)[0])
            errors[number].append(found["message"])
    return errors


WRONG = {
    "method": 'dl_norm.sequence_weights(lengths, "deltal", max_length=8)',
    "surrogate": 'dl_norm.policy_loss(logits, old, adv, mask, weights, surrogate="clipp")',
    "impl": 'dl_norm.policy_loss(logits, old, adv, mask, weights, impl="cuda")',
    "option": "dl_norm.delta_l_loss(logits, old, adv, mask, alpha=1.0, max_length=8, epslow=0.1)",
    "tuple": "dl_norm.policy_loss(logits, old, adv, mask, weights, return_metrics=True).backward()",
    "tensor": "dl_norm.logits_policy_loss(logits, token_ids, old, adv, mask, weights).metrics",
}
RIGHT = """
loss = dl_norm.delta_l_loss(logits, old, adv, mask, alpha=1.0, max_length=8)
loss.backward()
loss, metrics = dl_norm.delta_l_loss(
    logits, old, adv, mask, alpha=1.0, max_length=8, return_metrics=True, surrogate="cispo"
)
loss.backward(); metrics.summary()
dl_norm.linear_policy_loss(hidden, logits, token_ids, old, adv, mask, weights, beta=0.1).backward()
loss, outputs = dl_norm.logits_policy_loss(
    logits, token_ids, old, adv, mask, weights, return_metrics=True, impl="torch"
)
loss.backward(); outputs.log_probs.mean()
dl_norm.reference.policy_loss(logits, old, adv, mask, weights).backward()
"""


def test_type_checker(tmp_path):
    """One run of it, as each takes seconds."""
    sources = {}
    for number, (name, text) in enumerate(blocks()):
        changed = {}
        if name == "monitor":
            changed["micro_batches"] = "Iterable[tuple[Tensor, Tensor]]"
        if "log_probs(rows)" in text:
            changed["log_probs"] = "Callable[[Tensor], Tensor]"
        sources[f"{name} {number}"] = prelude(**changed) + text
    assert len(sources) >= 5, "the pages' blocks were not found"
    sources["right"] = prelude() + RIGHT
    sources |= {f"wrong {name}": prelude() + line for name, line in WRONG.items()}
    errors = dict(zip(sources, pyright(tmp_path, *sources.values()), strict=True))
    silent = [name for name in errors if name.startswith("wrong") and not errors[name]]
    assert not silent, "these pass the type checker"
    assert not {n: e for n, e in errors.items() if e and not n.startswith("wrong")}
