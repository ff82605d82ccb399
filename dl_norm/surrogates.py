"""The token losses: one class each, whose fields are its options, and no others.

Its device function, of the same name, is in kernels/surrogates.py. A class of your own derives
from :class:`Surrogate` and needs no change here.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import check_number

if TYPE_CHECKING:
    from triton import JITFunction

    from .formula import FormulaSurrogate

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
    from .formula import FormulaSurrogate

    names = {f.name: 1.0 if f.default is MISSING else f.default for f in dataclasses.fields(cls)}  # type: ignore

    def formula(log_prob, ratio, advantage, **fields):
        instance = object.__new__(cls)  # past its checks, which look at values
        for name, value in fields.items():
            object.__setattr__(instance, name, value)
        return instance.formula(log_prob, ratio, advantage)

    formula.__name__ = cls.__name__.lower()
    setattr(formula, "__wrapped__", cls.formula)  # where its source and its lines are  # noqa: B010
    return FormulaSurrogate(formula, names)  # type: ignore


def clamp(values: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """As torch.clamp, whose gradient at a bound differs between versions; here it is 1."""
    return torch.where(values < low, low, torch.where(values > high, high, values))


def _by_sign(advantage: Tensor, positive: float, negative: float) -> Tensor:
    """``negative`` where A < 0, else ``positive``."""
    values = torch.full_like(advantage, positive)
    return values if positive == negative else values.masked_fill_(advantage < 0, negative)


def _check_clip_range(eps_low: float, eps_high: float) -> None:
    check_number(eps_low, "eps_low", "0 <= eps_low <= 1", lambda v: 0 <= v <= 1)
    check_number(eps_high, "eps_high", "eps_high >= 0", lambda v: v >= 0)


@dataclass(frozen=True)
class Clip(Surrogate, kind="clip"):
    """PPO's clip with every bound that others add to it.

    l = -min(min(r, delta) A, clip(r, 1 - eps_low, 1 + eps_high) A), capped at -dual_clip A where
    A < 0. min, clip, two-sided bound and dual clip only ever clamp the ratio, to [0, positive_high]
    where A >= 0 and to [negative_low, negative_high] where A < 0. A bound belongs to the branch
    that has a gradient.
    """

    uses_log_prob = False
    scales_with_advantage = True

    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None
    delta: float | None = None

    def __post_init__(self):
        _check_clip_range(self.eps_low, self.eps_high)
        for name in ("dual_clip", "delta"):
            value = getattr(self, name)
            if value is not None:
                check_number(value, name, f"{name} > 1 (or None)", lambda v: v > 1)

    def settings(self) -> tuple[float, ...]:
        upper = 1 + self.eps_high
        delta = math.inf if self.delta is None else self.delta
        dual_clip = math.inf if self.dual_clip is None else self.dual_clip
        # min(min(r, delta), clip(r)) = min(r, positive_high); and
        # max(min(r, delta), clip(r)) = clamp(r, 1 - eps_low, max(delta, 1 + eps_high)).
        return min(upper, delta), 1 - self.eps_low, min(max(delta, upper), dual_clip)

    def formula(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Tensor:
        unclipped = ratio if self.delta is None else clamp(ratio, -math.inf, self.delta)
        clipped = clamp(ratio, 1 - self.eps_low, 1 + self.eps_high)
        loss = -torch.minimum(unclipped * advantage, clipped * advantage)
        if self.dual_clip is not None:
            # As a clamp of the loss: at r == dual_clip the gradient is the unclipped branch's.
            cap = -self.dual_clip * advantage
            loss = torch.where(advantage < 0, clamp(loss, -math.inf, cap), loss)
        return loss

    @classmethod
    def closed_form(cls, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
        low, high = Clip.bounds(advantage, *settings)
        clipped = torch.minimum(torch.maximum(ratio, low), high)
        loss = -advantage * clipped
        # d(-A r)/d log r = -A r: where no bound is hit the derivative is the loss itself.
        return loss, loss * (ratio == clipped), 0.0, ratio < low, ratio > high

    @staticmethod
    def bounds(
        advantage: Tensor, positive_high: float, negative_low: float, negative_high: float
    ) -> tuple[Tensor, Tensor]:
        """What the ratio is clamped to, by the sign of A."""
        low = _by_sign(advantage, 0.0, negative_low)
        return low, _by_sign(advantage, positive_high, negative_high)

    @classmethod
    def counted(cls, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
        low, high = cls.bounds(advantage, *settings)
        # As numbers, which a CPU multiplies and adds several times faster than flags.
        return ratio.clone().lt_(low), ratio.clone().gt_(high)

    @staticmethod
    def device() -> JITFunction:
        from .kernels.surrogates import clip

        return clip


@dataclass(frozen=True)
class Cispo(Surrogate, kind="cispo"):
    """l = -sg(clip(r, 1 - eps_low, 1 + eps_high)) A log_prob, where sg has no gradient.

    One clip for either sign of A. 1 - eps_low = 0 leaves no lower bound; eps_high may be negative.
    """

    uses_log_prob = False
    scales_with_advantage = True

    eps_low: float = 0.2
    eps_high: float = 0.2

    def __post_init__(self):
        check_number(self.eps_low, "eps_low", "0 <= eps_low <= 1", lambda v: 0 <= v <= 1)
        # TRL's epsilon_high is the bound itself, 1 + eps_high here, and may be below 1.
        rule = "eps_high >= -eps_low and eps_high > -1"
        check_number(self.eps_high, "eps_high", rule, lambda v: v >= -self.eps_low and v > -1)

    def settings(self) -> tuple[float, ...]:
        return 1 - self.eps_low, 1 + self.eps_high

    def formula(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Tensor:
        return -clamp(ratio, *self.settings()).detach() * advantage * log_prob

    @classmethod
    def closed_form(cls, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
        low, high = settings
        past_ratio = -advantage * ratio.clamp(low, high)
        return past_ratio * log_prob, 0.0, past_ratio, ratio < low, ratio > high

    @staticmethod
    def device() -> JITFunction:
        from .kernels.surrogates import cispo

        return cispo


@dataclass(frozen=True)
class Sapo(Surrogate, kind="sapo"):
    """l = -(4 / tau) sigmoid(tau (r - 1)) A, without clips; tau by the sign of A."""

    uses_log_prob = False
    scales_with_advantage = True

    sapo_temperature_pos: float = 1.0  # where A > 0
    sapo_temperature_neg: float = 1.05  # elsewhere

    def __post_init__(self):
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            check_number(getattr(self, name), name, f"{name} > 0", lambda v: v > 0)

    def formula(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Tensor:
        temperature = Sapo.temperature(advantage, *self.settings())
        return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantage

    @staticmethod
    def temperature(advantage: Tensor, positive: float, negative: float) -> Tensor:
        return torch.full_like(advantage, negative).masked_fill_(advantage > 0, positive)

    @classmethod
    def closed_form(cls, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
        temperature = Sapo.temperature(advantage, *settings)
        logit = temperature * (ratio - 1.0)
        gate = torch.sigmoid(logit)
        loss = -advantage * gate * (4.0 / temperature)
        through_ratio = -advantage * (4.0 * gate * torch.sigmoid(-logit) * ratio)
        never = torch.zeros_like(loss, dtype=torch.bool)
        return loss, through_ratio, 0.0, never, never

    @staticmethod
    def device() -> JITFunction:
        from .kernels.surrogates import sapo

        return sapo


SURROGATES: dict[str, type[Surrogate]] = {kind.kind: kind for kind in (Clip, Cispo, Sapo)}


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
