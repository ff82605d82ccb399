"""Prints where the library lists four or more tensors or options of a loss by hand.

    python ci/lists.py [FOLDER]

A list is a signature, a call, a tuple, list or dict, or the fields of a class, which names four or
more of them, each by its own name. A list inside another is not counted again, and the overloads
of a function are one list with its signature. The last line says how many are what a record or a
function takes; the others hand on what was taken.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "log_probs", "old_log_probs", "ref_log_probs", "advantages", "mask", "weights", "cu_seqlens",
    "rollout_weights", "policy_weights", "entropy_mask", "sequence_mask", "token_ids", "eps_low",
    "eps_high", "dual_clip", "delta", "log_ratio_clamp", "beta", "ratio_level", "surrogate",
    "sapo_temperature_pos", "sapo_temperature_neg", "bias_corrected_kl",
}  # fmt: skip


def named(node: ast.AST) -> Iterator[str]:
    """The names that stand in ``node`` itself, as a parameter, argument, element or field."""
    if isinstance(node, ast.arguments):
        for argument in (*node.posonlyargs, *node.args, *node.kwonlyargs):
            yield argument.arg
    elif isinstance(node, ast.Call):
        yield from (keyword.arg for keyword in node.keywords if keyword.arg)
        yield from values(node.args)
    elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        yield from values(node.elts)
    elif isinstance(node, ast.Dict):
        yield from values([key for key in node.keys if key is not None])
    elif isinstance(node, ast.ClassDef):
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                yield field.target.id


def values(nodes: list[ast.expr]) -> Iterator[str]:
    for node in nodes:
        node = node.value if isinstance(node, ast.Starred) else node
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def decorators(node: ast.AST) -> list[ast.expr]:
    return getattr(node, "decorator_list", [])


def lists(node: ast.AST) -> Iterator[tuple[int, list[str], bool]]:
    """(line, names, whether it is a signature or a record) of every list in ``node``, those inside
    a list left out."""
    for child in ast.iter_child_nodes(node):
        if any(isinstance(d, ast.Name) and d.id == "overload" for d in decorators(child)):
            continue
        found = {name.lower() for name in named(child)} & NAMES
        if len(found) >= 4 and not isinstance(child, ast.ClassDef):
            line = getattr(child, "lineno", 0) or node.lineno  # type: ignore
            yield line, sorted(found), isinstance(child, ast.arguments)
            continue
        if len(found) >= 4:
            yield child.lineno, sorted(found), True  # type: ignore
        yield from lists(child)


def main(folder: Path = ROOT) -> None:
    total, files, taken = 0, 0, 0
    paths = [*(folder / "dl_norm").rglob("*.py"), *(folder / "kernels").glob("*.py")]
    skipped = ("examples",)  # calls as users write them
    for path in sorted(
        path for path in paths if not path.parent.is_symlink() and path.parent.name not in skipped
    ):
        found = list(lists(ast.parse(path.read_text(encoding="utf-8"))))
        for line, names, _ in found:
            print(f"{path.relative_to(folder)}:{line}: {', '.join(names)}")
        total, files = total + len(found), files + bool(found)
        taken += sum(takes for *_, takes in found)
    print(f"{total} lists in {files} files: {taken} signatures and records, {total - taken} others")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
