"""Estimates of KL(policy || reference) at one token, from d = ref_log_prob - log_prob.

Their device functions, of the same names, are in kernels/surrogates.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check_bound, check_choice
from .surrogates import clamp

# The estimate in PyTorch operations, and its derivative by the log-prob.
ESTIMATORS = {
    "k1": (lambda d: -d, lambda d: torch.ones_like(d)),
    "abs": (lambda d: d.abs(), lambda d: -d.sign()),
    "k2": (lambda d: 0.5 * d.square(), lambda d: -d),
    "k3": (lambda d: d.exp() - d - 1, lambda d: 1 - d.exp()),
}
GRADIENTS = ("own", "k2", "unbiased")


@dataclass(frozen=True)
class KL:
    """The estimate of the KL term of :func:`dl_norm.policy_loss`, as its ``kl``.

    With d = ref_log_probs - log_probs:

    - estimator: "k1", -d; "abs", abs(d); "k2", d^2 / 2; "k3", exp(d) - d - 1.
    - gradient: "own", that of the estimate; "k2", that of k2 in its place, whose mean is the
      gradient of the divergence (verl's "k1+", "k3+"); "unbiased", r times that, where r has no
      gradient (OpenRLHF's ``unbiased_gradient``).
    - log_ratio_clamp: d is clamped to +-log_ratio_clamp; clamp: the estimate to +-clamp. Beyond
      either it has no gradient of its own. verl's k3 is KL("k3", log_ratio_clamp=20, clamp=10).

    The reference is whatever ``ref_log_probs`` holds: the old policy's log-probs too.

    Source: http://joschu.net/blog/kl-approx.html, verl ``kl_penalty``, OpenRLHF
    ``compute_approx_kl``.
    """

    estimator: str = "k3"
    gradient: str = "own"
    log_ratio_clamp: float = math.inf
    clamp: float = math.inf

    def __post_init__(self):
        check_choice(self.estimator, "the estimator of a KL", tuple(ESTIMATORS))
        check_choice(self.gradient, "the gradient of a KL", GRADIENTS)
        for name in ("log_ratio_clamp", "clamp"):
            value = check_bound(getattr(self, name), f"{name} of a KL")
            if not value > 0:
                raise ValueError(f"{name} of a KL must be > 0 (inf: none), got {value}")
            object.__setattr__(self, name, float(value))

    @property
    def clamps(self) -> tuple[float, float] | None:
        """Both, or None where neither bounds anything."""
        bounds = self.log_ratio_clamp, self.clamp
        return bounds if min(bounds) < math.inf else None


K3 = KL()


def kl_of(name_or_kl: str | KL) -> KL:
    """The estimate that an option names."""
    if isinstance(name_or_kl, KL):
        return name_or_kl
    if not isinstance(name_or_kl, str):
        raise TypeError(f"kl must be a name or a dl_norm.KL, got {name_or_kl!r}")
    check_choice(name_or_kl, "kl", tuple(ESTIMATORS))
    return KL(name_or_kl)


def token_kl(kl: KL, d: Tensor, ratio: Tensor) -> Tensor:
    """The estimate, whose gradient autograd finds."""
    value = ESTIMATORS[kl.estimator][0](clamp(d, -kl.log_ratio_clamp, kl.log_ratio_clamp))
    value = clamp(value, -kl.clamp, kl.clamp)
    if kl.gradient == "own":
        return value
    k2 = ESTIMATORS["k2"][0](d)
    if kl.gradient == "unbiased":
        k2 = ratio.detach() * k2
    return value.detach() + k2 - k2.detach()


def token_kl_closed_form(kl: KL, d: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """The estimate and its derivative by the log-prob."""
    estimate, derivative = ESTIMATORS[kl.estimator]
    bounds = kl.clamps
    clamped = d if bounds is None else d.clamp(-bounds[0], bounds[0])
    value, grad = estimate(clamped), derivative(clamped)
    if bounds is not None:
        inside = (d.abs() <= bounds[0]) & (value.abs() <= bounds[1])
        value, grad = value.clamp(-bounds[1], bounds[1]), torch.where(inside, grad, 0.0)
    if kl.gradient != "own":
        grad = ESTIMATORS["k2"][1](d)
    return value, grad * ratio if kl.gradient == "unbiased" else grad
