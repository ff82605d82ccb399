"""The policy loss and its gradient in closed form, in plain PyTorch operations, for any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .options import PolicyLossOptions


def policy_loss_fwd(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ref_log_probs: Tensor | None,
    rollout_weights: Tensor | None,
    options: PolicyLossOptions,
    write_grad: bool,
    metrics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss (0-dim float32), its gradient with respect to log_probs (empty unless
    ``write_grad``) and the (9,) sums of PolicyLossMetrics (empty unless ``metrics``)."""

    def per_token(values: Tensor, by_sequence: bool) -> Tensor:
        # Shaped so that it broadcasts against the tokens.
        if not by_sequence:
            return values.float()
        if cu_seqlens is None:
            return values.float()[:, None]
        counts = cu_seqlens.diff()
        return values.float().repeat_interleave(counts, output_size=log_probs.shape[0])

    sequences = weights.shape[0]
    advantage = per_token(advantages, advantages.shape == (sequences,))
    weight = per_token(weights, True)
    policy_weight = weight
    if rollout_weights is not None:
        policy_weight = weight * per_token(rollout_weights, rollout_weights.shape == (sequences,))
    ignored = None if mask is None else mask == 0

    # The clips clamp the ratio to [low, high] by the sign of A; low and high are per sequence
    # when the advantages are.
    negative = advantage < 0
    low = torch.where(negative, options.negative_low, 0.0)
    high = torch.where(negative, options.negative_high, options.positive_high)
    coefficient = -advantage * policy_weight

    if old_log_probs is None:
        log_ratio = torch.zeros_like(log_probs, dtype=torch.float32)
        beyond = None
    else:
        log_ratio = log_probs.float() - old_log_probs.float()
        beyond = log_ratio.abs() > options.log_ratio_bound
        log_ratio.clamp_(-options.log_ratio_bound, options.log_ratio_bound)
    ratio = log_ratio.exp()
    below, above = ratio < low, ratio > high
    clipped = torch.clamp(ratio, low, high)
    loss = _weighted_sum(coefficient, clipped, ignored)
    kl = None
    if ref_log_probs is not None:
        difference = ref_log_probs.float() - log_probs.float()
        exp_difference = difference.exp()
        kl = exp_difference - difference - 1.0
        loss = loss + _weighted_sum(weight * options.beta, kl, ignored)

    grad = log_probs.new_empty(0)
    if write_grad:
        flat = below | above
        if beyond is not None:
            flat |= beyond
        grad = torch.where(flat, 0.0, ratio) * coefficient
        if ref_log_probs is not None:
            grad += (1.0 - exp_difference) * (weight * options.beta)
        if ignored is not None:
            grad.masked_fill_(ignored, 0.0)
        grad = grad.to(log_probs.dtype)

    sums = weights.new_empty(0)
    if metrics:
        counted = torch.ones_like(ratio, dtype=torch.bool) if ignored is None else ~ignored

        def total(values: Tensor) -> Tensor:
            return torch.where(counted, values, 0.0).sum()

        sums = torch.stack([
            counted.sum().float(),
            (counted & below & negative).sum().float(),
            (counted & above & (advantage > 0)).sum().float(),
            (counted & above & negative).sum().float(),
            total(ratio),
            -total(log_ratio),
            total(ratio - 1.0 - log_ratio),
            loss.new_zeros(()) if kl is None else total(kl),
            torch.where(counted, ratio, 0.0).amax() if ratio.numel() else loss.new_zeros(()),
        ])  # fmt: skip
    return loss, grad, sums


def policy_loss_bwd(grad: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    return (grad * grad_output).to(dtype)


def _weighted_sum(weight: Tensor, values: Tensor, ignored: Tensor | None) -> Tensor:
    """sum(weight * values) over the positions not ignored, whatever the others hold."""
    if ignored is not None:
        values = values.masked_fill(ignored, 0.0)
    if weight.ndim == 2 and weight.shape[1] == 1:
        return torch.dot(values.sum(1), weight[:, 0])
    return (weight * values).masked_fill(ignored, 0.0).sum() if ignored is not None else (
        weight * values
    ).sum()
