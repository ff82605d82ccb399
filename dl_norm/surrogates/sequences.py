"""Token losses of a ratio of their whole sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import check_number
from .base import Surrogate
from .ratios import Unclipped, by_sign

if TYPE_CHECKING:
    from triton import JITFunction


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
        k, scale = by_sign(advantage, k_pos, k_neg), by_sign(advantage, lambda_pos, lambda_neg)
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
        from ..kernels.surrogates import vespo

        return vespo


@dataclass(frozen=True)
class Gmpo(Unclipped, kind="gmpo"):
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
