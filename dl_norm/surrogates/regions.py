"""Token losses that a divergence from the old policy switches off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import check_number
from .base import Surrogate, clamp
from .ratios import ConstantRatio

if TYPE_CHECKING:
    from triton import JITFunction


class _TrustRegion(Surrogate):
    """l = -A r where a divergence of the token from the old policy is within its bounds, else 0.

    With a ratio_cap l = -sg(min(r, ratio_cap)) A log_prob there, which has the same gradient up to
    the cap. ``settings()``: the least and the largest divergence where A >= 0, the same where
    A < 0, and the cap.

    The old policy's probability is exp(log_prob) / r. Beyond the log-ratio clamp c it is taken to
    be e^c or e^-c times the new one: a token whose probability fell by more counts as kept, with a
    weight of e^-c at most.
    """

    scales_with_advantage = True
    ratio_levels = ("token",)

    def formula(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Tensor:
        *bounds, ratio_cap = self.settings()
        divergence = self.divergence(log_prob.detach(), ratio.detach())
        low, high = ConstantRatio.bounds(advantage, *bounds)
        loss = -advantage * ratio
        if ratio_cap < math.inf:
            loss = -advantage * clamp(ratio, 0.0, ratio_cap).detach() * log_prob
        return torch.where((divergence < low) | (divergence > high), 0.0, loss)

    @staticmethod
    def divergence(log_prob: Tensor, ratio: Tensor) -> Tensor:
        """From the old policy to the new one, negative where the probability fell."""
        raise NotImplementedError

    @classmethod
    def closed_form(cls, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
        *bounds, ratio_cap = settings
        divergence = cls.divergence(log_prob, ratio)
        low, high = ConstantRatio.bounds(advantage, *bounds)
        below, above = divergence < low, divergence > high
        outside = below | above
        weight = (-advantage * ratio.clamp(max=ratio_cap)).masked_fill(outside, 0.0)
        if ratio_cap == math.inf:
            return weight, weight, 0.0, below, above
        return (weight * log_prob).masked_fill(outside, 0.0), 0.0, weight, below, above


def _probabilities(log_prob: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Of the token under the policy and the old policy; not above 1."""
    return log_prob.exp().clamp(max=1.0), (log_prob.exp() / ratio).clamp(max=1.0)


class _TotalVariation(_TrustRegion):
    @staticmethod
    def divergence(log_prob: Tensor, ratio: Tensor) -> Tensor:
        new, old = _probabilities(log_prob, ratio)
        return new - old

    @staticmethod
    def device() -> JITFunction:
        from ..kernels.surrogates import dppo_tv

        return dppo_tv


def _check_region(settings: Surrogate, *names: str) -> None:
    for name in names:
        check_number(getattr(settings, name), name, f"{name} >= 0", lambda v: v >= 0)
    ratio_cap = getattr(settings, "ratio_cap", None)
    if ratio_cap is not None:
        check_number(ratio_cap, "ratio_cap", "ratio_cap > 0 (or None)", lambda v: v > 0)


@dataclass(frozen=True)
class DppoTV(_TotalVariation, kind="dppo_tv"):
    """DPPO with the total variation of one token: l = -A r unless its probability has risen by more
    than delta_high (A >= 0) or fallen by more than delta_low (A < 0); then 0.

    With a ratio_cap (verl's clip_ratio_c) l = -sg(min(r, ratio_cap)) A log_prob instead of -A r.
    """

    delta_low: float = 0.2
    delta_high: float = 0.2
    ratio_cap: float | None = None

    def __post_init__(self):
        _check_region(self, "delta_low", "delta_high")

    def settings(self) -> tuple[float, ...]:
        cap = math.inf if self.ratio_cap is None else self.ratio_cap
        return -math.inf, self.delta_high, -self.delta_low, math.inf, cap


@dataclass(frozen=True)
class DppoKL(_TrustRegion, kind="dppo_kl"):
    """The same, where a change is measured by KL(old || new) of this token against all others."""

    delta_low: float = 0.05
    delta_high: float = 0.05
    ratio_cap: float | None = None

    def __post_init__(self):
        _check_region(self, "delta_low", "delta_high")

    settings = DppoTV.settings

    @staticmethod
    def divergence(log_prob: Tensor, ratio: Tensor) -> Tensor:
        new, old = _probabilities(log_prob, ratio)
        kl = (-old * ratio.log()).masked_fill(old == 0, 0.0)
        kl = kl + (1 - old) * ((1 - old + 1e-8) / (1 - new + 1e-8)).log()
        return torch.where(new > old, kl, -kl)

    @staticmethod
    def device() -> JITFunction:
        from ..kernels.surrogates import dppo_kl

        return dppo_kl


@dataclass(frozen=True)
class Ipo(_TotalVariation, kind="ipo"):
    """l = -A r unless the token's probability has changed by more than delta, whatever A is."""

    delta: float = 0.1

    def __post_init__(self):
        _check_region(self, "delta")

    def settings(self) -> tuple[float, ...]:
        return 2 * (-self.delta, self.delta) + (math.inf,)
