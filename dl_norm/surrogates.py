"""The base class of token losses, and how a name becomes one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

KINDS: dict[str, Any] = {}
SURROGATES: dict[str, type[Surrogate]] = {}


class Surrogate:
    kind: str
    uses_log_prob: bool = True
    scales_with_advantage: bool = False
    extra_names: tuple[str, ...] = ()

    @property
    def num_extras(self) -> int:
        return len(self.extra_names)

    def settings(self) -> tuple[float, ...]:
        raise NotImplementedError

    def formula(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Any:
        raise NotImplementedError

    def closed_form(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
        raise NotImplementedError

    def device(self) -> Any:
        raise NotImplementedError


def load(surrogate: str | Surrogate | Callable[..., Any], **fields: float) -> Surrogate:
    """The token loss that a configuration names.

    ``surrogate``: a built-in name (``"clip"``, …); the import path ``"package.module:name"`` of a
    formula (see :func:`dl_norm.surrogate`), of a class derived from :class:`Surrogate` or of an
    instance of one; or one of these itself. ``fields``: the options of a class, the settings of a
    formula.

    Raises:
        ValueError: there is no such name, module or attribute; fields for an instance, which has
            its own.
        TypeError: what is there is none of these, or does not take these fields.
    """
    found: Any = surrogate
    if isinstance(surrogate, str):
        found = SURROGATES.get(surrogate) or _imported(surrogate)
    if isinstance(found, Surrogate):
        if fields:
            raise ValueError(
                f"{surrogate} has its settings; {', '.join(fields)} cannot be given too"
            )
        return found
    if isinstance(found, type) and issubclass(found, Surrogate):
        return found(**fields)
    if callable(found) and not isinstance(found, type):
        from .formula import surrogate as of_formula

        return of_formula(found, **fields)
    raise TypeError(
        "a surrogate is a name, a formula, or a class or instance of dl_norm.surrogates.Surrogate; "
        f"{surrogate!r} is {found!r:.80}"
    )


def _imported(path: str) -> Any:
    module_name, colon, attributes = path.partition(":")
    if not (module_name and colon and attributes):
        raise ValueError(
            f"there is no surrogate {path!r}: take one of {', '.join(SURROGATES)}, or the import "
            'path of your own, "package.module:name"'
        )
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # An import of something else that fails in that module is told as it is.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"surrogate={path!r}: there is no module {error.name!r} on Python's path"
        ) from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            name = getattr(found, "__name__", repr(found))
            raise ValueError(f"surrogate={path!r}: {name} has no {attribute!r}")
        found = getattr(found, attribute)
    return found
