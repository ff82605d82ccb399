"""Triton's interpreter without what it does again and again.

It patches triton.language for a kernel, and once more for every call of a device function, which
changes nothing and takes a millisecond: most of the time of a kernel of many small functions.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

LANGUAGE = ("triton.language", "triton.language.core")


def patch_once() -> None:
    """A launch patches every module once. Nothing where there is no interpreter, or another."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if patch is not None and scope is not None:
        interpreter._patch_lang = _PatchOnce(patch, scope)  # type: ignore


class _PatchOnce:
    def __init__(self, patch: Callable[[FunctionType], Any], scope: type):
        self.patch, self.empty_scope = patch, scope
        self.patched: frozenset[str] = frozenset()  # during a launch

    def __call__(self, function: FunctionType) -> Any:
        modules = _modules(function)
        if self.patched and modules <= self.patched:
            return self.empty_scope()
        scope = self.patch(function)
        if not self.patched:  # the launch, which restores
            scope.restore = functools.partial(self.restore, scope.restore)
        self.patched |= modules
        return scope

    def restore(self, restore: Callable[[], None]) -> None:
        self.patched = frozenset()
        restore()


@functools.cache
def _modules(function: FunctionType) -> frozenset[str]:
    """Those of the language that it sees."""
    found = (value for value in function.__globals__.values() if isinstance(value, ModuleType))
    return frozenset(module.__name__ for module in found if module.__name__ in LANGUAGE)
