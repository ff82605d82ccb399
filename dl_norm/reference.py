"""The policy loss in plain PyTorch, written as the formulas are; gradients come from autograd.

It shares the checks and the surrogates' formulas with the rest of the package and nothing else, so
that the rest can be held against it.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .batch import Batch
from .call import make_call, token_options
from .checks import REAL_DTYPES
from .kl import token_kl
from .metrics import PolicyLossMetrics
from .options import TokenLoss, kind_of, surrogate_of
from .surrogates import clamp, clipped_tokens


@overload
def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


@overload
def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    *,
    return_metrics: bool,
    **options: Any,
) -> tuple[Tensor, PolicyLossMetrics]: ...


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    *,
    return_metrics: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, PolicyLossMetrics]:
    """What :func:`dl_norm.policy_loss` computes, for reading and for checking it.

    Same arguments except ``impl``, and float64 log-probs are taken too. Arithmetic in float64 if
    ``log_probs`` is float64, else in float32; the result has that dtype.
    """
    options |= dict(
        log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, mask=mask,
        weights=weights,
    )  # fmt: skip
    batch, terms = make_call(options, metrics=return_metrics, dtypes=REAL_DTYPES)
    surrogate = surrogate_of(token_options(options))
    dtype = torch.float64 if log_probs.dtype == torch.float64 else torch.float32
    counted = batch.counted()

    def per_token(values: Tensor) -> Tensor:
        values = values.to(dtype)
        if batch.is_per_token(values):
            return values
        if batch.cu_seqlens is None:
            return values.expand(log_probs.shape)
        lengths = batch.cu_seqlens.diff()
        return values[:, 0].repeat_interleave(lengths, output_size=log_probs.shape[0])

    # Masked positions may hold anything: zero them before exp, as NaN * 0 is NaN.
    def tokens(values: Tensor, kept: Tensor = counted) -> Tensor:
        return torch.where(kept, values.to(dtype), 0.0)

    kept = counted  # the tokens with a policy term
    if batch.policy_weights is not None:
        kept = kept & (per_token(batch.policy_weights) != 0)
    log_prob = tokens(log_probs)
    advantage = tokens(per_token(batch.advantages), kept)
    if batch.old_log_probs is None:
        log_ratio = log_prob - log_prob.detach()
    else:
        log_ratio = log_prob - tokens(batch.old_log_probs)
    clipped = None
    if terms.token_clip:
        sign = tokens(per_token(batch.advantages))
        clipped = clipped_tokens(log_ratio, sign, *terms.token_clip)
        low, high = terms.token_clip
        log_ratio = torch.where(
            sign < 0, clamp(log_ratio, low, math.inf), clamp(log_ratio, -math.inf, high)
        )
    if terms.ratio_level != "token":
        mean = per_token(
            _sequence_means(log_ratio, counted, batch, terms.ratio_level != "sequence_sum")[:, None]
        )
        if terms.ratio_level == "sequence_token":
            # The value of the mean, the derivative of the token's own log-prob.
            mean = mean.detach() + (log_ratio - log_ratio.detach())
        log_ratio = tokens(mean)
    log_ratio = clamp(log_ratio, -terms.log_ratio_clamp, terms.log_ratio_clamp)
    ratio = log_ratio.exp()
    loss = surrogate.formula(log_prob, ratio, advantage)
    extras = {}
    if isinstance(loss, tuple):
        loss, extras = loss
    if batch.policy_weights is not None:
        loss = loss * tokens(per_token(batch.policy_weights), kept)
    loss = tokens(loss, kept)
    kl = torch.zeros_like(ratio)
    if batch.ref_log_probs is not None:
        kl = token_kl(terms.kl, tokens(batch.ref_log_probs) - log_prob, ratio)
        if terms.bias_corrected_kl:
            kl = ratio * kl
        if terms.beta:
            loss = loss + terms.beta * kl
    total = tokens(per_token(batch.weights[:, None]) * loss).sum()
    if not return_metrics:
        return total
    advantage = tokens(per_token(batch.advantages))  # metrics count what the masks drop too
    extras = dict(surrogate.formula(log_prob, ratio, advantage)[1]) if extras else {}
    return total, _metrics(
        log_prob, log_ratio, ratio, advantage, counted, kl, extras, terms, weights, clipped
    )


def _metrics(
    log_prob: Tensor,
    log_ratio: Tensor,
    ratio: Tensor,
    advantage: Tensor,
    counted: Tensor,
    kl: Tensor,
    extras: dict[str, Tensor],
    terms: TokenLoss,
    weights: Tensor,
    clipped: tuple[Tensor, Tensor] | None,
) -> PolicyLossMetrics:
    with torch.no_grad():
        flags = clipped or kind_of(terms).counted(log_prob, ratio, advantage, *terms.settings)
        low, high = (flag != 0 for flag in flags[:2])
        positive, negative = counted & (advantage > 0), counted & (advantage < 0)
        sums = [
            counted, low & (positive | negative), high & positive, high & negative, ratio,
            -log_ratio, ratio - 1 - log_ratio, kl,
        ]  # fmt: skip
        totals = [torch.where(counted, value, 0).to(ratio.dtype).sum() for value in sums]
        ratio = torch.where(counted, ratio, 0)
        totals.append(ratio.amax() if ratio.numel() else ratio.new_zeros(()))
        totals += [
            torch.where(counted, value, 0).to(ratio.dtype).sum() for value in extras.values()
        ]
        return PolicyLossMetrics.from_sums(torch.stack(totals).float(), weights, tuple(extras))


def _sequence_means(values: Tensor, counted: Tensor, batch: Batch, divide: bool) -> Tensor:
    """(G,) means of token values that are 0 where they do not count; 0 where nothing counts. Unless
    ``divide``, sums."""
    if batch.cu_seqlens is None:
        return values.sum(-1) / counted.sum(-1).clamp(min=1) if divide else values.sum(-1)
    ids = torch.arange(batch.sequences, device=values.device)
    ids = ids.repeat_interleave(batch.cu_seqlens.diff())
    totals = values.new_zeros(batch.sequences).index_add(0, ids, values)
    counts = values.new_zeros(batch.sequences).index_add(0, ids, counted.to(values.dtype))
    return totals / counts.clamp(min=1) if divide else totals
