"""The autograd Function of the loss over kept sets, and the operators: those of rows/autograd.py
with the sets in the place of the chunks."""

from __future__ import annotations

from torch import Tensor

from ..checks import has_no_values
from ..operators import operator
from ..rows.autograd import LinearPolicyLossFunction, fake_linear, fake_log_probs
from ..rows.records import RowSettings, TokenRows
from .passes import kept_forward, kept_log_probs_forward
from .sets import KeptSets


@operator("kept_policy_loss_fwd", outputs=9)
def kept_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: TokenRows,
    settings: RowSettings,
    kept: KeptSets,
    impl: str,
    needed: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    outputs, grads = kept_forward(hidden, weight, bias, rows, settings, kept, impl, needed)
    return *outputs, *grads


@kept_op.fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: TokenRows,
    settings: RowSettings,
    kept: KeptSets,
    impl: str,
    needed: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    return fake_linear(hidden, weight, bias, rows, settings, needed)


@operator("kept_log_probs", outputs=2)
def kept_log_probs_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    active: Tensor,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    kept: KeptSets,
    impl: str,
) -> tuple[Tensor, Tensor]:
    settings = RowSettings(temperature, softcap, entropy=entropy)
    rows = TokenRows(token_ids, active)
    return kept_log_probs_forward(hidden, weight, bias, rows, settings, kept, impl)


@kept_log_probs_op.fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    active: Tensor,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    kept: KeptSets,
    impl: str,
) -> tuple[Tensor, ...]:
    return fake_log_probs(token_ids, entropy)


def kept_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: TokenRows,
    settings: RowSettings,
    kept: KeptSets,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Log-probs, and entropy or nothing, of the N rows, without loss and gradient."""
    if not has_no_values(hidden):
        return kept_log_probs_forward(hidden, weight, bias, rows, settings, kept, impl)
    log_probs, entropy = kept_log_probs_op(
        hidden, weight, bias, rows.token_ids, rows.active, settings.temperature, settings.softcap,
        settings.entropy, kept, impl,
    )  # fmt: skip
    return log_probs, entropy


class KeptPolicyLossFunction(LinearPolicyLossFunction):
    """Differentiable as :class:`dl_norm.rows.autograd.LinearPolicyLossFunction` is, whose backward
    it has."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: TokenRows,
        settings: RowSettings,
        kept: KeptSets,
        impl: str,
        needed: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        if has_no_values(hidden):
            results = kept_op(hidden, weight, bias, rows, settings, kept, impl, needed)
            outputs, grads = results[:6], results[6:]
        else:
            outputs, grads = kept_forward(hidden, weight, bias, rows, settings, kept, impl, needed)
        return LinearPolicyLossFunction.save(ctx, hidden, outputs, tuple(grads), impl, needed)
