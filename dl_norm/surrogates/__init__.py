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
from collections.abc import Callable
from typing import Any

from .base import KINDS as KINDS
from .base import Sum as Sum
from .base import Surrogate
from .base import clamp as clamp
from .penalties import AbsDrift, Drift, Nll, dro
from .ratios import Cispo, Clip, ImportanceSampling, PolicyGradient, Sapo
from .regions import DppoKL, DppoTV, Ipo
from .sequences import Gmpo, Vespo
from .sequences import clipped_tokens as clipped_tokens
from .text import read

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
        from .._formula import surrogate as of_formula

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
