"""The token losses: one class each, whose fields are its options, and no others.

Its device function, of the same name, is in kernels/surrogates.py. A class of your own derives
from :class:`Surrogate` and needs no change here.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .checks import check_number

if TYPE_CHECKING:
    from triton import JITFunction

# By name: what an operator, whose arguments are plain values, can say of a token loss.
KINDS: dict[str, type[Surrogate]] = {}


class Surrogate:
    """The policy term of one token: a loss of its log-prob, ratio and advantage.

    A subclass is a frozen dataclass. Its fields are numbers, the options of the loss.

    - ``formula(log_prob, ratio, advantage)``: the loss in PyTorch, under autograd.
    - ``settings()``: the numbers that the next two take; the fields unless said otherwise.
    - ``closed_form(log_prob, ratio, advantage, *settings)``: the loss, its derivative by the log
      of the ratio, its derivative by the log-prob past the ratio, and whether the ratio was
      clipped at its low and at its high end.
    - ``device()``: the same five values of the same arguments, as a ``@triton.jit`` function.

    The ratio is exp of the clamped log-ratio, or exactly 1 without an old policy; beyond the clamp
    the derivative through it is dropped by the caller.
    """

    kind: ClassVar[str]
    # Whether the derivative through the ratio depends on more of a token than its advantage.
    uses_log_prob: ClassVar[bool] = True
    # How many further values per token the closed form and the device function return.
    num_extras: ClassVar[int] = 0
    # Whether loss and derivatives are 0 where the advantage is: such tokens may be left out.
    scales_with_advantage: ClassVar[bool] = False

    def __init_subclass__(cls, kind: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.kind = kind or f"{cls.__module__}:{cls.__qualname__}"
        KINDS[cls.kind] = cls

    def settings(self) -> tuple[float, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore

    def formula(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def closed_form(log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
        raise NotImplementedError

    @classmethod
    def clipped(cls, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
        """The last two values of the closed form."""
        return cls.closed_form(log_prob, ratio, advantage, *settings)[3:5]

    @staticmethod
    def device() -> JITFunction:
        raise NotImplementedError


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

    @staticmethod
    def closed_form(log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
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
    def clipped(cls, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
        low, high = cls.bounds(advantage, *settings)
        return ratio < low, ratio > high

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

    @staticmethod
    def closed_form(log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
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

    @staticmethod
    def closed_form(log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
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


SURROGATES: dict[str, type[Surrogate]] = {kind: KINDS[kind] for kind in ("clip", "cispo", "sapo")}
