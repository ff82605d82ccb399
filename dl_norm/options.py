"""The settings of the token loss that are not tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .checks import check_number


@dataclass(frozen=True)
class PolicyLossOptions:
    """Clipping and KL settings of :func:`dl_norm.policy_loss`, checked once."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None
    delta: float | None = None
    log_ratio_clamp: float | None = 20.0
    beta: float = 0.0

    def __post_init__(self):
        check_number(self.eps_low, "eps_low", "0 <= eps_low <= 1", lambda v: 0 <= v <= 1)
        check_number(self.eps_high, "eps_high", "eps_high >= 0", lambda v: v >= 0)
        check_number(self.beta, "beta", "beta >= 0", lambda v: v >= 0)
        if self.dual_clip is not None:
            check_number(self.dual_clip, "dual_clip", "dual_clip > 1 (or None)", lambda v: v > 1)
        if self.delta is not None:
            check_number(self.delta, "delta", "delta > 1 (or None)", lambda v: v > 1)
        if self.log_ratio_clamp is not None:
            rule = "log_ratio_clamp > 0 (or None)"
            check_number(self.log_ratio_clamp, "log_ratio_clamp", rule, lambda v: v > 0)

    @property
    def positive_high(self) -> float:
        """Upper bound of the ratio where A >= 0: min(min(r, delta), clip(r)) = min(r, this)."""
        return min(1 + self.eps_high, self.delta or math.inf)

    @property
    def negative_low(self) -> float:
        """Lower bound of the ratio where A < 0: max(r, clip(r)) >= 1 - eps_low."""
        return 1 - self.eps_low

    @property
    def negative_high(self) -> float:
        """Upper bound of the ratio where A < 0, from the two-sided bound and the dual clip.

        max(min(r, delta), clip(r)) = clamp(r, 1 - eps_low, max(delta, 1 + eps_high)), and the
        dual clip caps the loss at -dual_clip * A.
        """
        two_sided = math.inf if self.delta is None else max(self.delta, 1 + self.eps_high)
        return min(two_sided, self.dual_clip or math.inf)

    @property
    def log_ratio_bound(self) -> float:
        return math.inf if self.log_ratio_clamp is None else self.log_ratio_clamp
