"""Take one function out of an installed package's own source, without importing the package.

The trainers' losses are plain tensor code inside packages with dozens of requirements. Lifting the
function runs the very lines that the package ships, needs none of those requirements, and lets the
metrics be left out, so that losses are compared with losses. The package may be installed, a folder
or a wheel on sys.path, or unpacked under one of `EXTRA_PATHS`.
"""

from __future__ import annotations
import __future__

import ast
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Of this Python: head_peers imports what is compiled.
SITE = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
EXTRA_PATHS = (
    *sorted(str(path) for path in ROOT.glob(f".venv-*/{SITE}")),
    str(ROOT / ".venv-peers"),  # pip install --no-deps --target .venv-peers trl==... verl==...
)


class NotInstalled(Exception):
    """The package is on none of the searched paths."""


def version(package: str) -> str:
    """The version of the package that `lift` would read."""
    for found in importlib.metadata.distributions(name=package, path=[*sys.path, *EXTRA_PATHS]):
        return found.version
    raise NotInstalled(f"{package} is not installed")


def read_source(module: str) -> str:
    """The source text of a module, found without importing any of its parents."""
    package, *rest = module.split(".")
    spec = importlib.machinery.PathFinder.find_spec(package, [*sys.path, *EXTRA_PATHS])
    loader: Any = spec and spec.loader  # of a folder or of a wheel: both have get_data
    if not (spec and spec.submodule_search_locations and loader):
        raise NotInstalled(f"{package} is not installed")
    path = Path(next(iter(spec.submodule_search_locations)), *rest).with_suffix(".py")
    return loader.get_data(str(path)).decode()


def lift(
    module: str,
    name: str,
    namespace: dict[str, Any],
    *,
    drop: Collection[str] = (),
    stop_at_inner_function: str | None = None,
) -> Callable[..., Any]:
    """The function `name` ("function" or "Class.method") of `module`, compiled on its own.

    namespace: what the function finds as its globals.
    drop: assignments to these names are left out (metrics that the loss does not use).
    stop_at_inner_function: "inner:result" ends the function where it would define `inner`, and
        returns `result` there. `ValueError` if there is no such place, so that a new release of the
        package cannot turn this into something else unseen.
    """
    scope: list[ast.stmt] = ast.parse(read_source(module)).body
    node: ast.stmt | None = None
    for part in name.split("."):
        node = next((n for n in scope if getattr(n, "name", None) == part), None)
        if node is None:
            raise ValueError(f"{module} has no {name}")
        scope = getattr(node, "body", [])
    assert isinstance(node, ast.FunctionDef)
    node.decorator_list = []

    kept = [s for s in node.body if not _assigns(s, drop)]
    if len(node.body) - len(kept) != len(set(drop)):
        raise ValueError(f"{module}.{name} does not assign each of {sorted(drop)} once")
    if stop_at_inner_function is not None:
        inner, result = stop_at_inner_function.split(":")
        place = [i for i, s in enumerate(kept) if getattr(s, "name", None) == inner]
        if len(place) != 1:
            raise ValueError(f"{module}.{name} does not define {inner} once")
        kept = [*kept[: place[0]], *ast.parse(f"return {result}").body]
    node.body = kept

    # Annotations name types of the package: with this flag they are not evaluated.
    code = compile(
        ast.fix_missing_locations(ast.Module([node], type_ignores=[])),
        filename=f"<{name} of {module}>",
        mode="exec",
        flags=__future__.annotations.compiler_flag,
        dont_inherit=True,
    )
    scope_of_function = dict(namespace)
    exec(code, scope_of_function)
    return scope_of_function[node.name]


def load_module(module: str, stubs: Mapping[str, Mapping[str, Any]]) -> ModuleType:
    """A whole module of a package, loaded from its file without the package's `__init__`.

    For kernels, whose source Triton reads from disk. stubs: modules of the same package that this
    one imports, by full name, as what is imported from them.
    """
    package = module.partition(".")[0]
    spec = importlib.machinery.PathFinder.find_spec(package, [*sys.path, *EXTRA_PATHS])
    if not (spec and spec.submodule_search_locations):
        raise NotInstalled(f"{package} is not installed")
    path = Path(next(iter(spec.submodule_search_locations)), *module.split(".")[1:])
    if not path.with_suffix(".py").exists():
        raise NotInstalled(f"{module} is not a file on disk: unpack the package's wheel")
    # Under a name of its own, so that the real package can be imported beside it.
    for name in (*stubs, module):
        parts = name.split(".")
        for depth in range(1, len(parts)):
            parent = f"{_ALIAS}{'.'.join(parts[:depth])}"
            sys.modules.setdefault(parent, ModuleType(parent)).__path__ = []  # type: ignore
    for name, attributes in stubs.items():
        stub = ModuleType(_ALIAS + name)
        vars(stub).update(attributes)
        sys.modules[_ALIAS + name] = stub
    loaded = importlib.util.spec_from_file_location(_ALIAS + module, path.with_suffix(".py"))
    assert loaded is not None and loaded.loader is not None
    result = importlib.util.module_from_spec(loaded)
    sys.modules[_ALIAS + module] = result
    loaded.loader.exec_module(result)
    return result


_ALIAS = "lifted_"


def _assigns(statement: ast.stmt, names: Collection[str]) -> bool:
    return isinstance(statement, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id in names for target in statement.targets
    )
