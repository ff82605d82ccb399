"""The settings of the token loss that are not tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .checks import check_number

RATIO_LEVELS = ("token", "sequence", "sequence_token")
SURROGATES = ("clip", "cispo", "sapo")


@dataclass(frozen=True)
class PolicyLossOptions:
    """Ratio, surrogate, clipping and KL settings of :func:`dl_norm.policy_loss`, checked once."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None
    delta: float | None = None
    log_ratio_clamp: float | None = 20.0
    beta: float = 0.0
    ratio_level: str = "token"
    surrogate: str = "clip"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    bias_corrected_kl: bool = False

    def __post_init__(self):
        _check_choice(self.ratio_level, "ratio_level", RATIO_LEVELS)
        _check_choice(self.surrogate, "surrogate", SURROGATES)
        check_number(self.eps_low, "eps_low", "0 <= eps_low <= 1", lambda v: 0 <= v <= 1)
        if self.surrogate == "cispo":
            # TRL's epsilon_high is the bound itself, 1 + eps_high here, and may be below 1.
            rule = "eps_high >= -eps_low and eps_high > -1"
            check_number(self.eps_high, "eps_high", rule, lambda v: v >= -self.eps_low and v > -1)
        else:
            check_number(self.eps_high, "eps_high", "eps_high >= 0", lambda v: v >= 0)
        check_number(self.beta, "beta", "beta >= 0", lambda v: v >= 0)
        if self.dual_clip is not None:
            check_number(self.dual_clip, "dual_clip", "dual_clip > 1 (or None)", lambda v: v > 1)
        if self.delta is not None:
            check_number(self.delta, "delta", "delta > 1 (or None)", lambda v: v > 1)
        if self.log_ratio_clamp is not None:
            rule = "log_ratio_clamp > 0 (or None)"
            check_number(self.log_ratio_clamp, "log_ratio_clamp", rule, lambda v: v > 0)
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            check_number(getattr(self, name), name, f"{name} > 0", lambda v: v > 0)
        if not isinstance(self.bias_corrected_kl, bool):
            kind = type(self.bias_corrected_kl).__name__
            raise TypeError(f"bias_corrected_kl must be True or False, got {kind}")
        self._refuse_what_has_no_effect()

    def _refuse_what_has_no_effect(self):
        without_effect = {
            "clip": ("sapo_temperature_pos", "sapo_temperature_neg"),
            "cispo": ("dual_clip", "delta", "sapo_temperature_pos", "sapo_temperature_neg"),
            "sapo": ("eps_low", "eps_high", "dual_clip", "delta"),
        }
        for name in without_effect[self.surrogate]:
            value = getattr(self, name)
            if value != getattr(PolicyLossOptions, name):  # a field's default
                raise ValueError(
                    f"{name}={value} has no effect with surrogate={self.surrogate!r}; omit it"
                )

    @property
    def positive_low(self) -> float:
        """Lower bound of the ratio where A >= 0: for "clip" min(r, clip(r)) has none."""
        return 1 - self.eps_low if self.surrogate == "cispo" else 0.0

    @property
    def positive_high(self) -> float:
        """Upper bound of the ratio where A >= 0: min(min(r, delta), clip(r)) = min(r, this)."""
        if self.surrogate == "sapo":
            return math.inf
        return min(1 + self.eps_high, self.delta or math.inf)

    @property
    def negative_low(self) -> float:
        """Lower bound of the ratio where A < 0: max(r, clip(r)) >= 1 - eps_low."""
        return 0.0 if self.surrogate == "sapo" else 1 - self.eps_low

    @property
    def negative_high(self) -> float:
        """Upper bound of the ratio where A < 0, from the two-sided bound and the dual clip.

        max(min(r, delta), clip(r)) = clamp(r, 1 - eps_low, max(delta, 1 + eps_high)), and the
        dual clip caps the loss at -dual_clip * A.
        """
        if self.surrogate == "cispo":
            return 1 + self.eps_high
        two_sided = math.inf if self.delta is None else max(self.delta, 1 + self.eps_high)
        return min(two_sided, self.dual_clip or math.inf)

    @property
    def log_ratio_bound(self) -> float:
        return math.inf if self.log_ratio_clamp is None else self.log_ratio_clamp


def _check_choice(value: str, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {names}; got {value!r}")
