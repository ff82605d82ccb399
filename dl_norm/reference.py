"""The policy loss in plain PyTorch, written as the formulas are; gradients come from autograd.

It shares the checks and the surrogates' formulas with the rest of the package and nothing else, so
that the rest can be held against it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ._batch import Batch
from ._call import make_call, token_options
from ._checks import REAL_DTYPES
from ._kl import token_kl
from ._metrics import PolicyLossMetrics, RolloutMetrics
from ._options import TokenLoss, kind_of, surrogate_of
from ._rollout import FINITE, Rollout
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

    rollout = None
    if batch.rollout_log_probs is not None:
        old = log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs
        corrected, rollout = _correction(
            old.to(dtype), batch.rollout_log_probs, counted, batch, terms.rollout
        )
        if batch.policy_weights is not None:
            corrected = corrected * tokens(per_token(batch.policy_weights))
        batch = batch._replace(policy_weights=corrected)
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
    metrics = _metrics(
        log_prob, log_ratio, ratio, advantage, counted, kl, extras, terms, weights, clipped
    )
    return total, replace(metrics, rollout=rollout)


@torch.no_grad()
def _correction(
    old: Tensor, rollout_log_probs: Tensor, counted: Tensor, batch: Batch, rollout: Rollout
) -> tuple[Tensor, RolloutMetrics]:
    """Weights of the tokens, sequence by sequence, and their metrics."""
    d = old - rollout_log_probs.to(old.dtype)
    unscored = d.isnan()
    if rollout.unscored is not None:
        unscored |= rollout_log_probs == rollout.unscored
    d = torch.where(unscored, 0.0, d).clamp(-FINITE, FINITE)
    cuts = None if batch.cu_seqlens is None else batch.cu_seqlens.diff().tolist()

    def sequences(values: Tensor) -> tuple[Tensor, ...]:
        return values.unbind() if cuts is None else values.split(cuts)

    weights = torch.zeros_like(d)
    flags = {name: torch.zeros_like(counted) for name in ("truncated", "masked", "vetoed")}
    outputs = zip(*(sequences(out) for out in (weights, *flags.values())), strict=True)
    inputs = zip(sequences(d), sequences(unscored), sequences(counted), strict=True)
    for (w, truncated, masked, vetoed), (log_ratio, missing, here) in zip(
        outputs, inputs, strict=True
    ):
        if not here.any():
            continue
        log_w = {
            "token": log_ratio,
            "sequence": log_ratio[here].sum().expand_as(log_ratio),
            "geometric": log_ratio[here].mean().expand_as(log_ratio),
            "none": torch.zeros_like(log_ratio),
        }[rollout.level]
        raw = log_w.clamp(-20, 20).exp()
        low, high = rollout.bounds
        beyond = ~((raw >= low) & (raw <= high))
        if rollout.level == "token":
            beyond &= ~missing
            raw = torch.where(missing, 1.0, raw)
        if rollout.mode == "truncate":
            truncated |= beyond
            w[:] = torch.where(beyond, raw.clamp(low, high), raw)
        else:
            masked |= beyond
            w[:] = torch.where(beyond, 0.0, raw)
        bounded = log_ratio.clamp(-20, 20)
        statistics = (log_ratio, bounded**2 / 2, bounded.exp() - 1 - bounded)
        if rollout.token_bounds:
            masked |= _beyond(rollout.token_bounds, statistics)
        if rollout.sequence_bounds:
            values = [value[here] for value in statistics]
            by_max = rollout.sequence_bounds[8:]
            if (
                _beyond(rollout.sequence_bounds[:4], [v.sum() for v in values])
                or _beyond(rollout.sequence_bounds[4:8], [v.mean() for v in values])
                or values[1].max() > by_max[2]
                or values[2].max() > by_max[3]
            ):
                masked[:] = True
            if values[0].min() < by_max[0] or values[0].max() > by_max[1]:
                vetoed[:] = True
        w[masked | vetoed] = 0.0

    def total(values: Tensor) -> Tensor:
        return torch.where(counted, values.to(old.dtype), 0.0).sum().float()

    bounded = d.clamp(-20, 20)
    largest = torch.where(counted, weights, 0.0).amax() if d.numel() else d.sum()
    return weights, RolloutMetrics(
        total(weights), total(weights**2), total(flags["truncated"]), total(flags["masked"]),
        total(flags["vetoed"]), total(unscored), total(-bounded),
        total(bounded.exp() - 1 - bounded), largest.float(),
    )  # fmt: skip


def _beyond(bounds: tuple[float, ...], statistics) -> Any:
    """Whether k1, k2 or k3 is outside its bounds."""
    (low, high, *highs), (k1, *others) = bounds, statistics
    found = (k1 < low) | (k1 > high)
    for statistic, highest in zip(others, highs, strict=True):
        found = found | (statistic > highest)
    return found


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
