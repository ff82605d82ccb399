"""Token losses of a clipped, truncated or smoothed ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import check_number
from .base import Surrogate, clamp

if TYPE_CHECKING:
    from triton import JITFunction


def by_sign(advantage: Tensor, positive: float, negative: float) -> Tensor:
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
        low = by_sign(advantage, 0.0, negative_low)
        return low, by_sign(advantage, positive_high, negative_high)

    @staticmethod
    def device() -> JITFunction:
        from ..kernels.surrogates import clip

        return clip


class Unclipped(Surrogate):
    """l = -A r."""

    uses_log_prob = False
    scales_with_advantage = True

    def settings(self) -> tuple[float, ...]:
        return math.inf, 0.0, math.inf  # of a clip that has no bound

    def formula(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Tensor:
        return -advantage * ratio

    @classmethod
    def closed_form(cls, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
        return Clip.closed_form(log_prob, ratio, advantage, *settings)

    device = staticmethod(Clip.device)


@dataclass(frozen=True)
class ImportanceSampling(Unclipped, kind="importance_sampling"):
    """l = -A r, without bounds but that of the log-ratio clamp."""


class ConstantRatio(Surrogate):
    """l = -sg(clip(r, low, high)) A log_prob, where sg has no gradient; a clip for each sign of A.

    ``settings()``: positive_low, positive_high (where A >= 0), negative_low, negative_high.
    """

    uses_log_prob = False
    scales_with_advantage = True
    ratio_is_constant = True

    def formula(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Tensor:
        low, high = self.bounds(advantage, *self.settings())
        return -clamp(ratio, low, high).detach() * advantage * log_prob

    @staticmethod
    def bounds(
        advantage: Tensor,
        positive_low: float,
        positive_high: float,
        negative_low: float,
        negative_high: float,
    ) -> tuple[Tensor, Tensor]:
        low = by_sign(advantage, positive_low, negative_low)
        return low, by_sign(advantage, positive_high, negative_high)

    @classmethod
    def closed_form(cls, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
        low, high = cls.bounds(advantage, *settings)
        past_ratio = -advantage * ratio.clamp(low, high)
        return past_ratio * log_prob, 0.0, past_ratio, ratio < low, ratio > high

    @staticmethod
    def device() -> JITFunction:
        from ..kernels.surrogates import policy_gradient

        return policy_gradient


@dataclass(frozen=True)
class PolicyGradient(ConstantRatio, kind="policy_gradient"):
    """l = -sg(clip(r, low, high)) A log_prob, where sg has no gradient; a clip for each sign of A.

    By default the weight is 1: the plain policy gradient, which reads no ratio. ``math.inf`` is no
    upper bound, 0 no lower one.
    """

    positive_low: float = 1.0
    positive_high: float = 1.0
    negative_low: float = 1.0
    negative_high: float = 1.0

    def __post_init__(self):
        for sign in ("positive", "negative"):
            low, high = (getattr(self, f"{sign}_{end}") for end in ("low", "high"))
            check_number(low, f"{sign}_low", f"{sign}_low >= 0", lambda v: v >= 0)
            if not (isinstance(high, float) and high == math.inf):
                rule = f"{sign}_high >= {sign}_low"
                check_number(high, f"{sign}_high", rule, lambda v, low=low: v >= low)


@dataclass(frozen=True)
class Cispo(ConstantRatio, kind="cispo"):
    """l = -sg(clip(r, 1 - eps_low, 1 + eps_high)) A log_prob, where sg has no gradient.

    One clip for either sign of A. 1 - eps_low = 0 leaves no lower bound; eps_high may be negative.
    """

    eps_low: float = 0.2
    eps_high: float = 0.2

    def __post_init__(self):
        check_number(self.eps_low, "eps_low", "0 <= eps_low <= 1", lambda v: 0 <= v <= 1)
        # TRL's epsilon_high is the bound itself, 1 + eps_high here, and may be below 1.
        rule = "eps_high >= -eps_low and eps_high > -1"
        check_number(self.eps_high, "eps_high", rule, lambda v: v >= -self.eps_low and v > -1)

    def settings(self) -> tuple[float, ...]:
        return 2 * (1 - self.eps_low, 1 + self.eps_high)


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
        from ..kernels.surrogates import sapo

        return sapo
