"""Token losses that are added to others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import check_number
from .base import Surrogate
from .ratios import PolicyGradient

if TYPE_CHECKING:
    from triton import JITFunction


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
        from ..kernels.surrogates import drift

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
        from ..kernels.surrogates import abs_drift

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
        from ..kernels.surrogates import nll

        return nll


def dro(tau: float = 0.1) -> Surrogate:
    """l = -A log_prob + tau / 2 (log r)^2."""
    return PolicyGradient() + Drift(tau)
