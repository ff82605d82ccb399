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
import torch
import torch.distributed
from torch import Tensor
import dl_norm

old: Tensor; adv: Tensor; advantages: Tensor; mask: Tensor; weights: Tensor; lengths: Tensor
old_log_probs: Tensor; token_ids: Tensor; hidden: Tensor; logits: Tensor; action_mask: Tensor
log_probs: {log_probs}
model: torch.nn.Module
group: torch.distributed.ProcessGroup
context_group: torch.distributed.ProcessGroup
data_group: torch.distributed.ProcessGroup
other: dl_norm.PolicyLossMetrics
max_length: int; micro_batches: {micro_batches}; data_size: int; context_size: int
log: Callable[..., None]
"""
CHECKED = ("loop", "metrics", "heads", "distributed", "monitor", "no-hook", "surrogate")
# A model's head is Any to a type checker, but a module's attribute is a Tensor or a Module.
LOOSE = {"heads": "from typing import Any\nmodel: Any\n"}


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
    settings = {"extraPaths": [str(ROOT)], "reportUnboundVariable": False, "pythonVersion": "3.10"}
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
        pairs = "Iterable[tuple[Tensor, Tensor]]" if name == "monitor" else "int"
        slices = "Callable[[Tensor], Tensor]" if "log_probs(rows)" in text else "Tensor"
        prelude = PRELUDE.format(log_probs=slices, micro_batches=pairs) + LOOSE.get(name, "")
        sources[f"{name} {number}"] = prelude + text
    assert len(sources) >= 5, "the pages' blocks were not found"
    plain = PRELUDE.format(log_probs="Tensor", micro_batches="int")
    sources["right"] = plain + RIGHT
    sources |= {f"wrong {name}": plain + line for name, line in WRONG.items()}
    errors = dict(zip(sources, pyright(tmp_path, *sources.values()), strict=True))
    silent = [name for name in errors if name.startswith("wrong") and not errors[name]]
    assert not silent, "these pass the type checker"
    assert not {n: e for n, e in errors.items() if e and not n.startswith("wrong")}
