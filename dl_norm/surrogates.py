"""The token losses: one class each, whose fields are its options, and no others.

``surrogate=`` of :func:`dl_norm.policy_loss` and of the trainers' settings takes the name of one,
at its defaults; the same with options, as Python would call it, ``"dppo_tv(delta_high=0.15)"``; a
sum, ``"dppo_tv + drift(tau=0.002)"``; or an instance, ``DppoTV(delta_high=0.15) + Drift(0.002)``
(in code under ``torch.compile`` a name or an instance made before).

A is the advantage, r the ratio, π and π_old the token's probability under the
policy and the old policy, sg(x) x without a gradient. A bound that two signs of A do not share is
written as positive_low, positive_high where A >= 0, and negative_low, negative_high where A < 0.

| name | loss of a token | who has it |
|---|---|---|
| ``clip`` | -min(min(r, delta) A, clip(r, 1 - eps_low, 1 + eps_high) A), at most -dual_clip A where A < 0 | everyone; arXiv:1707.06347, 2503.14476, 1912.09729 |
| ``importance_sampling`` | -A r | SkyRL's and Tinker's ``importance_sampling`` |
| ``policy_gradient`` | -A log π | verl's ``gpg`` (arXiv:2504.02546), ROLL's ``vanilla``, REINFORCE |
| ``policy_gradient(...)`` | -sg(clip(r, low, high)) A log π | the rows below |
| ``policy_gradient(0, inf, 0, inf)`` | -sg(r) A log π | has the gradient of -A r |
| ``policy_gradient(0, 1, 0, 1)`` | -sg(min(r, 1)) A log π | ROLL's ``tis`` |
| ``policy_gradient(negative_low=0)`` | -A log π where A >= 0, -sg(min(r, 1)) A log π elsewhere | TOPR, arXiv:2503.14286, by token as in ROLL's ``topr`` |
| ``policy_gradient(0.1, 10, 0.1, 10)`` | -sg(clip(r, 0.1, 10)) A log π | torchforge |
| ``cispo`` | -sg(clip(r, 1 - eps_low, 1 + eps_high)) A log π | TRL, verl, SkyRL, ...; arXiv:2506.13585 |
| ``sapo`` | -(4 / tau) sigmoid(tau (r - 1)) A | TRL, verl, ...; arXiv:2511.20347 |
| ``dppo_tv`` | -A r where π - π_old <= delta_high (A >= 0) or >= -delta_low (A < 0), else 0 | prime-rl, SkyRL; verl with ratio_cap=20; arXiv:2602.04879 |
| ``dppo_kl`` | likewise, with KL(π_old, π) of the token against all others for the size of the change | SkyRL; verl with ratio_cap=20 |
| ``ipo`` | -A r where π - π_old is within ±delta, else 0 | prime-rl's ``ipo`` |
| ``drift`` | tau (log r)^2 / 2 | to be added to another: prime-rl's default is ``dppo_tv + drift(tau=0.002)``, its kl_tau half our tau |
| ``abs_drift`` | weight abs(log r) | to be added to another; verl's and SkyRL's ``kl_cov`` at the tokens of :func:`dl_norm.kl_cov_tokens`, arXiv:2505.22617 |
| ``dro`` | -A log π + tau (log r)^2 / 2, that is ``policy_gradient + drift`` | verl's ``dro``, Tinker's, ROLL's ``kimi15``; arXiv:2405.19107, 2501.12599 |
| ``vespo`` | -sg(e^lambda W^k e^(-lambda W)) A log π, W the product of the sequence's ratios, k and lambda by the sign of A | with ``ratio_level="sequence_sum"``; TRL, arXiv:2602.10693 |
| ``gmpo`` | -A exp(mean of log r, clipped at eps_high where A >= 0 and at -eps_low where A < 0) | with ``ratio_level="sequence"``; TRL, verl's ``geo_mean``, arXiv:2507.20673 |
| ``nll`` | -weight log π where A > 0 | to be added to another, for VAPO, arXiv:2504.05118 |

Each has a device function of its name in kernels/surrogates.py. A class of your own derives from
:class:`Surrogate` and needs no change here.
"""

# ruff: noqa: E501  (the table)

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import check_number
from .surrogate_base import KINDS as KINDS
from .surrogate_base import Sum as Sum
from .surrogate_base import Surrogate, clamp
from .surrogate_text import read

if TYPE_CHECKING:
    from triton import JITFunction


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


class _Unclipped(Surrogate):
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
class ImportanceSampling(_Unclipped, kind="importance_sampling"):
    """l = -A r, without bounds but that of the log-ratio clamp."""


class _ConstantRatio(Surrogate):
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
        low = _by_sign(advantage, positive_low, negative_low)
        return low, _by_sign(advantage, positive_high, negative_high)

    @classmethod
    def closed_form(cls, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
        low, high = cls.bounds(advantage, *settings)
        past_ratio = -advantage * ratio.clamp(low, high)
        return past_ratio * log_prob, 0.0, past_ratio, ratio < low, ratio > high

    @staticmethod
    def device() -> JITFunction:
        from .kernels.surrogates import policy_gradient

        return policy_gradient


@dataclass(frozen=True)
class PolicyGradient(_ConstantRatio, kind="policy_gradient"):
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
class Cispo(_ConstantRatio, kind="cispo"):
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
        from .kernels.surrogates import sapo

        return sapo


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
        low, high = _ConstantRatio.bounds(advantage, *bounds)
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
        low, high = _ConstantRatio.bounds(advantage, *bounds)
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
        from .kernels.surrogates import dppo_tv

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
        from .kernels.surrogates import dppo_kl

        return dppo_kl


@dataclass(frozen=True)
class Ipo(_TotalVariation, kind="ipo"):
    """l = -A r unless the token's probability has changed by more than delta, whatever A is."""

    delta: float = 0.1

    def __post_init__(self):
        _check_region(self, "delta")

    def settings(self) -> tuple[float, ...]:
        return 2 * (-self.delta, self.delta) + (math.inf,)


@dataclass(frozen=True)
class Drift(Surrogate, kind="drift"):
    """l = tau / 2 (log r)^2, to be added to another loss; without gradient past the log-ratio
    clamp."""

    uses_log_prob = False

    tau: float = 0.1

    def __post_init__(self):
        check_number(self.tau, "tau", "tau >= 0", lambda v: v >= 0)

    def formula(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Tensor:
        return 0.5 * self.tau * ratio.log() ** 2

    @classmethod
    def closed_form(cls, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
        (tau,), log_ratio = settings, ratio.log()
        never = torch.zeros_like(ratio, dtype=torch.bool)
        return 0.5 * tau * log_ratio * log_ratio, tau * log_ratio, 0.0, never, never

    @staticmethod
    def device() -> JITFunction:
        from .kernels.surrogates import drift

        return drift


@dataclass(frozen=True)
class AbsDrift(Surrogate, kind="abs_drift"):
    """l = weight abs(log r), to be added to another loss; KL-Cov has it at some tokens (see
    :func:`dl_norm.kl_cov_tokens`). Without gradient where r is 1, and past the log-ratio clamp."""

    uses_log_prob = False

    weight: float = 0.1

    def __post_init__(self):
        check_number(self.weight, "weight", "weight >= 0", lambda v: v >= 0)

    def formula(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Tensor:
        return self.weight * ratio.log().abs()

    @classmethod
    def closed_form(cls, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
        (weight,), log_ratio = settings, ratio.log()
        never = torch.zeros_like(ratio, dtype=torch.bool)
        return weight * log_ratio.abs(), weight * log_ratio.sign(), 0.0, never, never

    @staticmethod
    def device() -> JITFunction:
        from .kernels.surrogates import abs_drift

        return abs_drift


@dataclass(frozen=True)
class Nll(Surrogate, kind="nll"):
    """l = -weight log_prob where A > 0, to be added to another loss.

    Where A is the reward less the mean of its prompt, a correct answer has A > 0 unless all of its
    prompt's are correct: then A = 0 and this term is not there. For other sets of answers, or other
    weights than those of the policy term, add a second loss whose advantages are 1:
    ``policy_loss(log_probs, None, ones, mask, weights, sequence_mask=correct,
    surrogate="policy_gradient")``.
    """

    uses_log_prob = False
    scales_with_advantage = True
    ratio_is_constant = True

    weight: float = 0.1

    def __post_init__(self):
        check_number(self.weight, "weight", "weight >= 0", lambda v: v >= 0)

    def formula(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Tensor:
        return torch.where(advantage > 0, -self.weight * log_prob, 0.0)

    @classmethod
    def closed_form(cls, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
        (weight,), zeros = settings, torch.zeros_like(log_prob)
        past_ratio = torch.where(advantage > 0, zeros - weight, zeros)
        never = torch.zeros_like(zeros, dtype=torch.bool)
        return (
            torch.where(advantage > 0, past_ratio * log_prob, zeros),
            0.0,
            past_ratio,
            never,
            never,
        )

    @staticmethod
    def device() -> JITFunction:
        from .kernels.surrogates import nll

        return nll


@dataclass(frozen=True)
class Vespo(Surrogate, kind="vespo"):
    """l = -sg(phi(W)) A log_prob with phi(W) = e^lambda W^k e^(-lambda W), W the product of the
    ratios of the sequence's tokens: ``ratio_level="sequence_sum"``.

    phi(1) = 1; W counts as 1e-8 where it is less. TRL's W also has the ratios of the old policy to
    the one that sampled, as far as it lets them: subtract their logs from ``old_log_probs``.
    """

    uses_log_prob = False
    scales_with_advantage = True
    ratio_is_constant = True
    ratio_levels = ("sequence_sum",)

    k_pos: float = 2.0  # where A >= 0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self):
        for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg"):
            check_number(getattr(self, name), name, f"{name} > 0", lambda v: v > 0)

    def formula(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Tensor:
        return -Vespo.gamma(ratio, advantage, *self.settings()).detach() * advantage * log_prob

    @staticmethod
    def gamma(
        ratio: Tensor,
        advantage: Tensor,
        k_pos: float,
        lambda_pos: float,
        k_neg: float,
        lambda_neg: float,
    ) -> Tensor:
        k, scale = _by_sign(advantage, k_pos, k_neg), _by_sign(advantage, lambda_pos, lambda_neg)
        ratio = ratio.clamp(min=1e-8)
        # One exponent: the factors would overflow. Where the product is infinite phi is 0.
        return (k * ratio.log() - scale * (ratio - 1)).exp().masked_fill(ratio == math.inf, 0.0)

    @classmethod
    def closed_form(cls, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float):
        past_ratio = -advantage * Vespo.gamma(ratio, advantage, *settings)
        never = torch.zeros_like(log_prob, dtype=torch.bool)
        return past_ratio * log_prob, 0.0, past_ratio, never, never

    @staticmethod
    def device() -> JITFunction:
        from .kernels.surrogates import vespo

        return vespo


@dataclass(frozen=True)
class Gmpo(_Unclipped, kind="gmpo"):
    """l = -A r, r the geometric mean of the ratios of the sequence's tokens, each clipped before.

    Log-ratios are clipped, at eps_high from above where A >= 0 and at -eps_low from below where
    A < 0. ``ratio_level="sequence"``, or "sequence_token".
    """

    ratio_levels = ("sequence", "sequence_token")

    eps_low: float = 0.4
    eps_high: float = 0.4

    def __post_init__(self):
        for name in ("eps_low", "eps_high"):
            check_number(getattr(self, name), name, f"{name} >= 0", lambda v: v >= 0)

    @property
    def token_clip(self) -> tuple[float, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return -self.eps_low, self.eps_high


def clipped_tokens(
    log_ratio: Tensor, advantage: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Where ``token_clip`` clips from below and from above."""
    return (log_ratio < low) & (advantage < 0), (log_ratio > high) & (advantage >= 0)


def dro(tau: float = 0.1) -> Surrogate:
    """l = -A log_prob + tau / 2 (log r)^2."""
    return PolicyGradient() + Drift(tau)


_KINDS = (
    Clip, Cispo, Sapo, PolicyGradient, ImportanceSampling, DppoTV, DppoKL, Ipo, Vespo, Gmpo, Drift,
    AbsDrift, Nll,
)  # fmt: skip
SURROGATES: dict[str, Callable[..., Surrogate]] = {
    **{kind.kind: kind for kind in _KINDS},
    "dro": dro,
}
# At their defaults, made here, so that nothing is made while a call is traced.
_DEFAULTS = {name: make() for name, make in SURROGATES.items()}


def load(surrogate: str | Surrogate | Callable[..., Any], **fields: float) -> Surrogate:
    """The token loss that a configuration names.

    ``surrogate``: a built-in name (``"clip"``, …), that with options, or a sum of such, as at the
    top; the import path ``"package.module:name"`` of a
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
        if surrogate in SURROGATES:
            return SURROGATES[surrogate](**fields) if fields else _DEFAULTS[surrogate]
        written_out = "(" in surrogate or "+" in surrogate
        found = read(surrogate, SURROGATES) if written_out else _imported(surrogate)
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
