"""The policy loss in plain PyTorch, written as the formulas are; gradients come from autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import LOG_PROB_DTYPES, check_policy_loss_inputs
from .metrics import PolicyLossMetrics
from .options import PolicyLossOptions


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    ref_log_probs: Tensor | None = None,
    beta: float = 0.0,
    rollout_weights: Tensor | None = None,
    ratio_level: str = "token",
    surrogate: str = "clip",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    bias_corrected_kl: bool = False,
    entropy_mask: Tensor | None = None,
    sequence_mask: Tensor | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, PolicyLossMetrics]:
    """What :func:`dl_norm.policy_loss` computes, for reading and for checking it.

    Same arguments except ``impl``, and float64 log-probs are taken too. Arithmetic in float64 if
    ``log_probs`` is float64, else in float32; the result has that dtype.
    """
    options = PolicyLossOptions(
        eps_low, eps_high, dual_clip, delta, log_ratio_clamp, beta, ratio_level, surrogate,
        sapo_temperature_pos, sapo_temperature_neg, bias_corrected_kl,
    )  # fmt: skip
    check_policy_loss_inputs(
        log_probs, old_log_probs, advantages, mask, weights, cu_seqlens, ref_log_probs,
        rollout_weights, dtypes=(*LOG_PROB_DTYPES, torch.float64), entropy_mask=entropy_mask,
        sequence_mask=sequence_mask,
    )  # fmt: skip
    if beta and ref_log_probs is None:
        raise ValueError("beta > 0 needs ref_log_probs")
    dtype = torch.float64 if log_probs.dtype == torch.float64 else torch.float32
    counted = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask != 0

    def per_token(values: Tensor) -> Tensor:
        values = values.to(dtype)
        if values.shape == log_probs.shape and cu_seqlens is None:
            return values
        if cu_seqlens is None:
            return values[:, None].expand(log_probs.shape)
        if values.shape == log_probs.shape and values.shape[0] != cu_seqlens.shape[0] - 1:
            return values
        return values.repeat_interleave(cu_seqlens.diff(), output_size=log_probs.shape[0])

    # Masked positions may hold anything: zero them before exp, as NaN * 0 is NaN.
    def tokens(values: Tensor) -> Tensor:
        return values.to(dtype).masked_fill(~counted, 0.0)

    kept = counted  # the tokens with a policy term
    if sequence_mask is not None:
        kept = kept & (per_token(sequence_mask) != 0)
    if entropy_mask is not None:
        kept = kept & (entropy_mask != 0)
    log_prob = tokens(log_probs)
    advantage = per_token(advantages).masked_fill(~kept, 0.0)
    if old_log_probs is None:
        log_ratio = log_prob - log_prob.detach()
    else:
        log_ratio = log_prob - tokens(old_log_probs)
    if ratio_level != "token":
        sequence_ratio = per_token(_sequence_means(log_ratio, counted, cu_seqlens))
        if ratio_level == "sequence_token":
            # The value of the mean, the derivative of the token's own log-prob.
            sequence_ratio = sequence_ratio.detach() + (log_prob - log_prob.detach())
        log_ratio = tokens(sequence_ratio)
    if log_ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
    ratio = log_ratio.exp()
    if surrogate == "clip":
        unclipped = ratio if delta is None else ratio.clamp(max=delta)
        clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
        loss = -torch.minimum(unclipped * advantage, clipped * advantage)
        if dual_clip is not None:
            # As a clamp of the loss: at r == dual_clip the gradient is the unclipped branch's.
            loss = torch.where(advantage < 0, loss.clamp(max=-dual_clip * advantage), loss)
    elif surrogate == "cispo":
        loss = -ratio.clamp(1 - eps_low, 1 + eps_high).detach() * advantage * log_prob
    else:
        temperature = torch.full_like(advantage, sapo_temperature_neg)
        temperature = temperature.masked_fill(advantage > 0, sapo_temperature_pos)
        loss = -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantage
    if rollout_weights is not None:
        loss = loss * per_token(rollout_weights).masked_fill(~kept, 0.0)
    loss = loss.masked_fill(~kept, 0.0)
    kl = torch.zeros_like(ratio)
    if ref_log_probs is not None:
        difference = tokens(ref_log_probs) - log_prob
        kl = difference.exp() - difference - 1
        if bias_corrected_kl:
            kl = ratio * kl
        if beta:
            loss = loss + beta * kl
    total = (per_token(weights) * loss).masked_fill(~counted, 0.0).sum()
    if not return_metrics:
        return total

    with torch.no_grad():
        advantage = tokens(per_token(advantages))  # metrics count what the masks drop too
        positive, negative = counted & (advantage > 0), counted & (advantage < 0)
        sums = [
            counted,
            (negative & (ratio < options.negative_low))
            | (positive & (ratio < options.positive_low)),
            positive & (ratio > options.positive_high),
            negative & (ratio > options.negative_high),
            tokens(ratio),
            -log_ratio,
            tokens(ratio - 1 - log_ratio),
            tokens(kl),
        ]
        largest = tokens(ratio).amax() if ratio.numel() else ratio.new_zeros(())
        totals = torch.stack([*(values.to(dtype).sum() for values in sums), largest])
    return total, PolicyLossMetrics.from_sums(totals.float(), weights)


def _sequence_means(values: Tensor, counted: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(G,) means of token values that are 0 where they do not count; 0 where nothing counts."""
    if cu_seqlens is None:
        return values.sum(-1) / counted.sum(-1).clamp(min=1)
    sequences = cu_seqlens.shape[0] - 1
    ids = torch.arange(sequences, device=values.device).repeat_interleave(cu_seqlens.diff())
    totals = values.new_zeros(sequences).index_add(0, ids, values)
    counts = values.new_zeros(sequences).index_add(0, ids, counted.to(values.dtype))
    return totals / counts.clamp(min=1)
