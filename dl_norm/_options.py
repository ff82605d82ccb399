"""The settings of the token loss that are not tensors."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
import torch

from ._checks import check_choice, check_flag, check_number
from ._kl import K3, KL, kl_of
from ._metrics import NUM_METRIC_SUMS, NUM_ROLLOUT_SUMS
from ._rollout import NO_ROLLOUT, Rollout, RolloutCorrection, rollout_of
from .surrogates import KINDS, Cispo, Clip, Sapo, Surrogate, load

RATIO_LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")
# The surrogates whose options are keywords of policy_loss, and what those are unless given.
FIELDS = {
    kind.kind: {field.name: field.default for field in dataclasses.fields(kind)}
    for kind in (Clip, Cispo, Sapo)
}
DEFAULTS = {name: default for fields in FIELDS.values() for name, default in fields.items()}


class TokenLoss(NamedTuple):
    """What is computed of one token: names and numbers, no tensor."""

    surrogate: str  # of surrogates.KINDS
    settings: tuple[float, ...]  # of that surrogate
    ratio_level: str = "token"
    log_ratio_clamp: float = math.inf  # inf: none
    beta: float = 0.0
    kl: KL = K3
    bias_corrected_kl: bool = False
    token_clip: tuple[float, ...] = ()  # see Surrogate.token_clip
    rollout: Rollout = NO_ROLLOUT


def kind_of(terms: TokenLoss) -> type[Surrogate] | Surrogate:
    """What computes its policy term."""
    return KINDS[terms.surrogate]


def num_sums(terms: TokenLoss) -> int:
    """Of the metrics: those of every loss, the further quantities of this one, and those of a
    rollout correction."""
    corrections = 0 if terms.rollout == NO_ROLLOUT else NUM_ROLLOUT_SUMS
    return NUM_METRIC_SUMS + len(kind_of(terms).extra_names) + corrections


# The options that are of no surrogate.
GENERAL = (*TokenLoss._fields[2:-2], "rollout_correction")


def make_token_loss(
    *,
    surrogate: str | Surrogate = "clip",
    ratio_level: str = "token",
    log_ratio_clamp: float | None = 20.0,
    beta: float = 0.0,
    kl: str | KL = "k3",
    bias_corrected_kl: bool = False,
    rollout_correction: RolloutCorrection | None = None,
    **fields,
) -> TokenLoss:
    """Checks the options of :func:`dl_norm.policy_loss`. ``fields``: those of the surrogate."""
    chosen = make_surrogate(surrogate, fields)
    check_choice(ratio_level, "ratio_level", RATIO_LEVELS)
    if chosen.ratio_levels and ratio_level not in chosen.ratio_levels:
        levels = " or ".join(repr(level) for level in chosen.ratio_levels)
        raise ValueError(
            f"surrogate={surrogate!r} has a meaning with ratio_level={levels} alone, got "
            f"{ratio_level!r}"
        )
    token_clip, chosen = chosen.token_clip, chosen.resolved()
    if ratio_level == "sequence_sum" and (bias_corrected_kl or not chosen.ratio_is_constant):
        what = "bias_corrected_kl" if bias_corrected_kl else f"surrogate={surrogate!r}"
        raise ValueError(
            f"{what} has a derivative through the ratio, of which ratio_level='sequence_sum' has "
            "none: take surrogate='vespo' or 'policy_gradient(...)' without bias_corrected_kl, or "
            "another level"
        )
    if log_ratio_clamp is not None:
        rule = "log_ratio_clamp > 0 (or None)"
        log_ratio_clamp = check_number(log_ratio_clamp, "log_ratio_clamp", rule, lambda v: v > 0)
    beta = check_number(beta, "beta", "beta >= 0", lambda v: v >= 0)
    kl = kl_of(kl)
    check_flag(bias_corrected_kl, "bias_corrected_kl")
    if bias_corrected_kl and kl.gradient != "own":
        raise ValueError(
            f"bias_corrected_kl takes the gradient of the estimate itself, so gradient="
            f"{kl.gradient!r} of its KL has no effect: drop one of the two"
        )
    return TokenLoss(
        chosen.kind,
        tuple(_as_float(value) for value in chosen.settings()),
        ratio_level,
        math.inf if log_ratio_clamp is None else log_ratio_clamp,
        beta,
        kl,
        bias_corrected_kl,
        tuple(_as_float(value) for value in token_clip),
        rollout_of(rollout_correction),
    )


@functools.lru_cache(maxsize=256, typed=True)
def _known_token_loss(**options) -> TokenLoss:
    return make_token_loss(**options)


def token_loss_of(options: dict) -> TokenLoss:
    """:func:`make_token_loss` of options that, in a training run, are the same in every step."""
    if torch.compiler.is_compiling():
        return make_token_loss(**options)
    try:
        return _known_token_loss(**options)
    except TypeError:  # not hashable, or of a wrong type, which this says
        return make_token_loss(**options)


def surrogate_of(options: dict) -> Surrogate:
    """The surrogate of the options of :func:`make_token_loss`."""
    fields = {name: value for name, value in options.items() if name not in GENERAL}
    return make_surrogate(fields.pop("surrogate", "clip"), fields)


def make_surrogate(surrogate: str | Surrogate, fields: dict) -> Surrogate:
    """The surrogate of a name or import path, with those of ``fields`` that are its own.

    A field of another surrogate is refused unless it has that one's default: there it has no
    effect.
    """
    own = FIELDS.get(surrogate, {}) if isinstance(surrogate, str) else {}
    for name, value in fields.items():
        if name not in DEFAULTS:
            raise TypeError(
                f"{name} is no option of a policy loss; those of its surrogates are "
                f"{', '.join(DEFAULTS)}. Other surrogates bring their options along: pass an "
                'instance of dl_norm.surrogates, or a string like "dppo_tv(delta_high=0.15)"'
            )
        if name not in own and value != DEFAULTS[name]:
            raise ValueError(f"{name}={value} has no effect with surrogate={surrogate!r}; omit it")
    return load(surrogate, **{name: fields[name] for name in own if name in fields})


def _as_float(value) -> float:
    # A kernel would be compiled anew for an int. A symbolic float stays what it is.
    return float(value) if isinstance(value, (int, np.generic)) else value
