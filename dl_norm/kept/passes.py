"""The forward passes over kept sets, by either implementation."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from ..rows.passes import Forward, half_scale
from ..rows.records import RowSettings, TokenRows
from . import closed_form
from .entries import make_entries
from .sets import KeptSets


def implementation(impl: str) -> ModuleType:
    """The module whose four functions do the work."""
    if impl == "torch":
        return closed_form
    from . import launch  # needs Triton, which the "torch" implementation does not

    return launch


def kept_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: TokenRows,
    settings: RowSettings,
    kept: KeptSets,
    impl: str,
    needed: tuple[bool, ...],
) -> tuple[Forward, list[Tensor]]:
    """What :func:`dl_norm.rows.passes.linear_forward` returns, over kept sets."""
    assert settings.terms is not None
    run = implementation(impl)
    rows, half = half_scale(rows, hidden.dtype if any(needed) else torch.float32)
    assert rows.weights is not None
    flat = hidden.reshape(-1, hidden.shape[-1])
    entries = make_entries(kept.ids, kept.offsets, rows, weight.shape[0])
    logits = run.kept_log_probs(flat, weight, bias, entries, settings)
    # What does not depend on the log-prob does not know that it is NaN.
    rows = replace(rows, weights=rows.weights.masked_fill(entries.bad, torch.nan))
    batch = rows.as_batch(logits.log_probs)._replace(mask=rows.active[:, None])
    loss, token_grads, sums = run.policy_loss_fwd(
        batch, settings.terms, any(needed), settings.metrics
    )
    finals = [hidden.new_empty(0) for _ in needed]  # an operator returns nothing twice
    if any(needed):
        grads, finals[0] = run.kept_hidden_grad(
            flat, weight, entries, logits, token_grads.view(-1), settings, needed[0]
        )
        head, bias_grad = run.kept_head_grad(flat, weight, entries, grads, needed[1:])
        # float16 stays in float32 until backward has scaled it.
        final = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        finals[1:] = [
            hidden.new_empty(0) if grad is None else grad.to(final) for grad in (head, bias_grad)
        ]
    if needed[0]:
        finals[0] = finals[0].view(hidden.shape)
    if half.numel():
        loss = loss / half
    entropy = loss.new_empty(0) if logits.entropy is None else logits.entropy
    return (loss, logits.log_probs, entropy, loss.new_empty(0), sums, half), finals


def kept_log_probs_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: TokenRows,
    settings: RowSettings,
    kept: KeptSets,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy of the N rows, without loss and gradient."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    entries = make_entries(kept.ids, kept.offsets, rows, weight.shape[0])
    logits = implementation(impl).kept_log_probs(flat, weight, bias, entries, settings)
    entropy = flat.new_empty(0) if logits.entropy is None else logits.entropy
    return logits.log_probs, entropy
