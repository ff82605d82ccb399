"""The token losses."""

from __future__ import annotations

import math
from typing import NamedTuple

from .options import PolicyLossOptions

KINDS: dict[str, type[Surrogate]] = {}


class Surrogate:
    kind: str
    uses_log_prob = True
    num_extras = 0

    def __init_subclass__(cls, kind: str | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.kind = kind or f"{cls.__module__}:{cls.__qualname__}"
        KINDS[cls.kind] = cls

    @staticmethod
    def device():
        raise NotImplementedError


class Clip(Surrogate, kind="clip"):
    uses_log_prob = False

    @staticmethod
    def device():
        from .kernels.surrogates import clip

        return clip


class Cispo(Surrogate, kind="cispo"):
    uses_log_prob = False

    @staticmethod
    def device():
        from .kernels.surrogates import cispo

        return cispo


class Sapo(Surrogate, kind="sapo"):
    uses_log_prob = False

    @staticmethod
    def device():
        from .kernels.surrogates import sapo

        return sapo


SURROGATES: dict[str, type[Surrogate]] = {kind: KINDS[kind] for kind in ("clip", "cispo", "sapo")}


class TokenLoss(NamedTuple):
    """What is computed of one token: names and numbers, no tensor."""

    surrogate: str  # of KINDS
    settings: tuple[float, ...]  # of that surrogate
    ratio_level: str = "token"
    log_ratio_clamp: float = math.inf  # inf: none
    beta: float = 0.0
    bias_corrected_kl: bool = False

    @property
    def kind(self) -> type[Surrogate]:
        return KINDS[self.surrogate]


def token_loss_of(o: PolicyLossOptions) -> TokenLoss:
    settings = {
        "clip": (o.positive_high, o.negative_low, o.negative_high),
        "cispo": (o.negative_low, o.negative_high),
        "sapo": (o.sapo_temperature_pos, o.sapo_temperature_neg),
    }[o.surrogate]
    return TokenLoss(
        o.surrogate, tuple(map(float, settings)), o.ratio_level, o.log_ratio_bound, o.beta,
        o.bias_corrected_kl,
    )  # fmt: skip
