"""What a token loss is: the class that all of them derive from, and the sum of some."""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from triton import JITFunction

    from .._formula import FormulaSurrogate

# By name: what an operator, whose arguments are plain values, can say of a token loss.
KINDS: dict[str, type[Surrogate] | Surrogate] = {}


class Surrogate:
    """The policy term of one token: a loss of its log-prob, ratio and advantage.

    A subclass is a frozen dataclass whose fields are numbers, the options of the loss, and has

    - ``formula(log_prob, ratio, advantage)``: the loss in PyTorch operations, or (loss, {name:
      further quantity of the token}).

    That is enough: derivatives, closed form and Triton function follow from it as for
    :func:`dl_norm.surrogate`. A class may bring its own

    - ``device()``: a ``@triton.jit`` function of log_prob, ratio, advantage and ``settings()``,
      which returns the loss, its derivative by the log of the ratio, its derivative by the
      log-prob past the ratio, whether the ratio was clipped at its low and at its high end, and
      the further quantities, named by ``extra_names``;
    - ``closed_form(log_prob, ratio, advantage, *settings)``: the same values in PyTorch operations;
    - ``settings()``: the numbers that these two take, the fields unless said otherwise.

    The ratio is exp of the clamped log-ratio, or exactly 1 without an old policy; beyond the clamp
    the caller drops the derivative through it.
    """

    kind: str
    # Whether the derivative through the ratio depends on more of a token than its advantage.
    uses_log_prob: bool = True
    # Whether loss and derivatives are 0 where the advantage is: such tokens may be left out.
    scales_with_advantage: bool = False
    _whole: bool = False  # whether the class has its own device() and closed_form()
    _traced: FormulaSurrogate  # of one that has not
    # Of the further quantities per token, whose sums come back among the metrics.
    extra_names: tuple[str, ...] = ()
    # Whether no derivative goes through the ratio.
    ratio_is_constant: bool = False
    # What it has a meaning with; empty: every ratio_level.
    ratio_levels: tuple[str, ...] = ()
    # Bounds of each token's log-ratio before they become the mean of a sequence: the least where
    # A < 0, the largest where A >= 0.
    token_clip: tuple[float, ...] = ()

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.kind = kind or f"{cls.__module__}:{cls.__qualname__}"
        own = {name for base in cls.__mro__[: cls.__mro__.index(Surrogate)] for name in vars(base)}
        cls._whole = {"device", "closed_form"} <= own
        KINDS[cls.kind] = cls

    def __new__(cls, *args: Any, **kwargs: Any):
        # Now the fields are known, and a call that is itself traced finds it done.
        if not cls._whole and "_traced" not in vars(cls):
            cls._traced = _of_class(cls)
        return super().__new__(cls)

    def __add__(self, other: Surrogate) -> Sum:
        """The loss that is the sum of both."""
        return Sum(self, other) if isinstance(other, Surrogate) else NotImplemented

    def settings(self) -> tuple[float, ...]:
        return tuple(self._fields().values())

    def formula(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Any:
        raise NotImplementedError

    @classmethod
    def closed_form(
        cls, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float
    ) -> tuple[Any, ...]:
        return cls._traced.of_settings(log_prob, ratio, advantage, settings)

    @classmethod
    def counted(
        cls, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float
    ) -> tuple[Any, ...]:
        """What of the closed form the metrics count: the two flags and the further quantities."""
        return cls.closed_form(log_prob, ratio, advantage, *settings)[3:]

    @staticmethod
    def device() -> JITFunction:
        raise NotImplementedError

    def resolved(self) -> Surrogate:
        """What computes it: itself, or, where it has a formula alone, what follows from that."""
        if type(self).device is not Surrogate.device:
            return self
        return self._traced.with_settings(**self._fields())

    def _fields(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore


def _of_class(cls: type[Surrogate]) -> FormulaSurrogate:
    """The surrogate of a class's formula, at the defaults of its fields or, without, at 1."""
    from .._formula import FormulaSurrogate

    names = {f.name: 1.0 if f.default is MISSING else f.default for f in dataclasses.fields(cls)}  # type: ignore

    def formula(log_prob, ratio, advantage, **fields):
        instance = object.__new__(cls)  # past its checks, which look at values
        for name, value in fields.items():
            object.__setattr__(instance, name, value)
        return instance.formula(log_prob, ratio, advantage)

    formula.__name__ = cls.__name__.lower()
    setattr(formula, "__wrapped__", cls.formula)  # where its source and its lines are  # noqa: B010
    return FormulaSurrogate(formula, names)  # type: ignore


class Sum(Surrogate):
    """The sum of token losses, ``DppoTV() + Drift(0.002)``, in one kernel.

    A token counts as clipped where one of them clips it; the further quantities are those of all.
    """

    parts: tuple[Surrogate, ...]

    def __init__(self, *parts: Surrogate):
        self.parts = sum((getattr(part, "parts", (part,)) for part in parts), ())
        self._resolved = tuple(part.resolved() for part in self.parts)
        self._counts = tuple(len(part.settings()) for part in self._resolved)
        self.kind = " + ".join(part.kind for part in self._resolved)
        self.extra_names = sum((part.extra_names for part in self._resolved), ())
        if len(set(self.extra_names)) < len(self.extra_names):
            raise ValueError(
                f"the further quantities of the parts of {self} must have names of their own; got "
                f"{', '.join(self.extra_names)}"
            )
        self.uses_log_prob = any(part.uses_log_prob for part in self._resolved)
        self.scales_with_advantage = all(part.scales_with_advantage for part in self._resolved)
        if any(part.token_clip for part in self.parts):
            raise ValueError(f"{self}: what clips the mean of a sequence is no part of a sum")
        self.ratio_is_constant = all(part.ratio_is_constant for part in self._resolved)
        for part in self.parts:
            if part.ratio_levels and self.ratio_levels not in ((), part.ratio_levels):
                raise ValueError(f"the parts of {self} want ratios of different levels")
            self.ratio_levels = part.ratio_levels or self.ratio_levels
        KINDS.setdefault(self.kind, self)

    def settings(self) -> tuple[float, ...]:
        return sum((part.settings() for part in self._resolved), ())

    def formula(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Any:
        total, extras = torch.zeros_like(ratio), {}
        for part in self.parts:
            loss = part.formula(log_prob, ratio, advantage)
            loss, more = loss if isinstance(loss, tuple) else (loss, {})
            total, extras = total + loss, {**extras, **more}
        return (total, extras) if extras else total

    def closed_form(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float
    ) -> tuple[Any, ...]:
        total, extras, at = None, [], 0
        for part, count in zip(self._resolved, self._counts, strict=True):
            own = settings[at : at + count]
            loss, through, past, below, above, *more = part.closed_form(
                log_prob, ratio, advantage, *own
            )
            at += count
            extras += more
            if total is not None:
                loss, through, past = loss + total[0], through + total[1], past + total[2]
                below, above = below | total[3], above | total[4]
            total = loss, through, past, below, above
        assert total is not None
        return (*total, *extras)

    def counted(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float
    ) -> tuple[Any, ...]:
        return self.closed_form(log_prob, ratio, advantage, *settings)[3:]

    def device(self) -> JITFunction:  # pyright: ignore[reportIncompatibleMethodOverride]
        from .._triton_source import sum_function

        numbers = tuple(len(part.extra_names) for part in self._resolved)
        functions = tuple(part.device() for part in self._resolved)
        return sum_function(self.kind, functions, self._counts, numbers)

    def resolved(self) -> Surrogate:
        return self

    def __eq__(self, other: object) -> bool:
        return self.parts == other.parts if isinstance(other, Sum) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.parts)

    def __reduce__(self):
        return Sum, self.parts

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))


def clamp(values: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """As torch.clamp, whose gradient at a bound differs between versions; here it is 1."""
    return torch.where(values < low, low, torch.where(values > high, high, values))
