"""The forward passes over kept sets, by either implementation.

A vocabulary that is spread over processes: each has all of the sets, and of them works on the
entries whose words are here. Their sums become those of the whole sets by the two collectives of
rows/vocab_parallel.py, and from then on every process computes the same token losses.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from .._rows.passes import Forward, half_scale, nan_where
from .._rows.records import RowSettings, TokenRows, with_entropy
from .._rows.vocab_parallel import SumOverShards, check_agreement, checksum, combined, is_here
from . import closed_form
from .entries import Entries, make_entries
from .records import KeptLogits
from .sets import KeptSets

_LOG2_E, _LN_2 = math.log2(math.e), math.log(2.0)


def implementation(impl: str) -> ModuleType:
    """The module whose functions do the work."""
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
    """What :func:`dl_norm._rows.passes.linear_forward` returns, over kept sets."""
    assert settings.terms is not None
    run, shard = implementation(impl), settings.shard
    rows, half = half_scale(rows, hidden.dtype if any(needed) else torch.float32)
    assert rows.weights is not None
    flat = hidden.reshape(-1, hidden.shape[-1])
    differ = _check_agreement(flat, rows, settings, kept)
    entries = make_entries(kept, rows, shard, weight.shape[0])
    logits = _kept_logits(run, flat, weight, bias, entries, rows, settings)
    # What does not depend on the log-prob does not know that it is NaN.
    rows = replace(rows, weights=rows.weights.masked_fill(entries.bad, torch.nan))
    batch = rows.as_batch(logits.log_probs)._replace(mask=rows.active[:, None])
    loss, token_grads, sums = run.policy_loss_fwd(
        batch, settings.terms, any(needed), settings.metrics
    )
    if rows.entropy_weights is not None and logits.entropy is not None:
        loss = loss - (rows.entropy_weights * logits.entropy).sum()
    finals = [hidden.new_empty(0) for _ in needed]  # an operator returns nothing twice
    if any(needed):
        grads, finals[0] = run.kept_hidden_grad(
            flat, weight, entries, logits, token_grads.view(-1), rows.entropy_weights, settings,
            needed[0],
        )  # fmt: skip
        hidden_sums = SumOverShards(shard)
        if needed[0] and shard.spread and not shard.partial_hidden_grad:
            hidden_sums.start(finals[0])
        head, bias_grad = run.kept_head_grad(flat, weight, entries, grads, needed[1:])
        # float16 stays in float32 until backward has scaled it.
        final = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        finals[1:] = [
            hidden.new_empty(0) if grad is None else grad.to(final) for grad in (head, bias_grad)
        ]
        hidden_sums.wait()
    if needed[0]:
        finals[0] = finals[0].view(hidden.shape)
    if half.numel():
        loss = loss / half
    loss = nan_where(differ, loss)
    return (loss, logits.log_probs, *_or_empty(logits, settings), sums, half), finals


def kept_log_probs_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: TokenRows,
    settings: RowSettings,
    kept: KeptSets,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`dl_norm._rows.passes.log_probs_forward` returns, over kept sets."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    differ = _check_agreement(flat, rows, settings, kept)
    entries = make_entries(kept, rows, settings.shard, weight.shape[0])
    logits = _kept_logits(implementation(impl), flat, weight, bias, entries, rows, settings)
    if differ is not None:
        logits.log_probs.masked_fill_(differ, torch.nan)
    return logits.log_probs, *_or_empty(logits, settings)


def _kept_logits(
    run: ModuleType,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    entries: Entries,
    rows: TokenRows,
    settings: RowSettings,
) -> KeptLogits:
    entropy = with_entropy(rows, settings)
    if not settings.shard.spread:
        return run.kept_log_probs(hidden, weight, bias, entries, settings, entropy)
    logits, sums = run.kept_sums(hidden, weight, bias, entries, settings, entropy)
    exponents = slice(1, 4, 2) if entropy else slice(1, 2)  # of e; those of 2 are added up
    sums[exponents] *= _LOG2_E
    sums = combined(
        sums, is_here(rows.token_ids, settings.shard, weight.shape[0]) & entries.plural, entropy,
        settings.shard, _LOG2_E / settings.temperature,
    )  # fmt: skip
    sums[exponents] *= _LN_2
    return closed_form.logits_of_sums(logits, sums, entries, settings, entropy)


def _check_agreement(
    hidden: Tensor, rows: TokenRows, settings: RowSettings, kept: KeptSets
) -> Tensor | None:
    """The sets must be the same on all processes too."""
    if not settings.shard.spread:
        return None
    sizes = {"size of a hidden state": hidden.shape[-1], "kept.ids": kept.ids.shape[0]}
    sums = {"kept.ids (a checksum)": kept.ids, "kept.offsets (a checksum)": kept.offsets}
    checksums = {name: checksum(values) for name, values in sums.items()}
    return check_agreement(rows, settings.shard, **sizes, **checksums)


def _or_empty(logits: KeptLogits, settings: RowSettings) -> tuple[Tensor, Tensor]:
    """entropy and sum_sq_probs"""
    none = logits.log_probs.new_empty
    entropy = logits.entropy if settings.entropy else None
    squares = logits.sum_sq_probs
    return none(0) if entropy is None else entropy, none(0) if squares is None else squares
