"""The policy loss and its gradient in closed form, in plain PyTorch operations, for any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import values_are_free
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
    """Returns the loss (0-dim float32), its gradient with respect to log_probs (float32, empty
    unless ``write_grad``) and the (9,) sums of PolicyLossMetrics (empty unless ``metrics``)."""
    arguments = (
        log_probs, old_log_probs, advantages, mask, weights, cu_seqlens, ref_log_probs,
        rollout_weights, options, write_grad, metrics,
    )  # fmt: skip
    if mask is None or not values_are_free(log_probs):
        return _policy_loss_fwd(*arguments, fill=True)
    # Multiplying by the mask costs a quarter of filling, but a masked NaN survives it: look.
    outputs = _policy_loss_fwd(*arguments, fill=False)
    if not math.isfinite(outputs[0].item()):
        outputs = _policy_loss_fwd(*arguments, fill=True)
    return outputs


def policy_loss_bwd(grad: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    if values_are_free(grad_output) and grad_output.item() == 1.0:
        return grad.to(dtype)
    return (grad * grad_output).to(dtype)


def _policy_loss_fwd(
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
    fill: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # In place wherever a tensor is not needed any more: here the time goes into memory traffic.
    sequences = weights.shape[0]

    def spread(values: Tensor) -> Tensor:
        """(G,) values so that they broadcast against the tokens; per-token values as they are."""
        if values.shape != (sequences,):
            return values
        if cu_seqlens is None:
            return values[:, None]
        return values.repeat_interleave(cu_seqlens.diff(), output_size=log_probs.shape[0])

    def drop_ignored_(values: Tensor) -> Tensor:
        if mask is None:
            return values
        return values.masked_fill_(ignored, 0.0) if fill else values.mul_(counted)

    if mask is not None:
        if fill:
            ignored = mask == 0
        else:
            counted = mask.to(torch.float32)
            counted = counted if mask.dtype == torch.bool else counted.ne_(0)

    advantages = advantages.float()
    weight = spread(weights)
    if rollout_weights is None:
        coefficient = _product(-advantages, weights, spread)
    else:
        policy_weights = _product(rollout_weights.float(), weights, spread)
        coefficient = _product(-advantages, policy_weights, spread)

    # Every clip is a clamp of the ratio to [low, high], by the sign of A; the log-ratio clamp too.
    # Its bound goes through the same exp as the ratios, so a tie is a tie.
    negative = advantages < 0
    bound = torch.full_like(advantages, options.log_ratio_bound)
    low = torch.maximum((-bound).exp_(), negative * options.negative_low)
    high = torch.full_like(advantages, options.positive_high)
    high = torch.minimum(bound.exp_(), high.masked_fill_(negative, options.negative_high))
    if old_log_probs is None:
        ratio = torch.ones_like(log_probs, dtype=torch.float32)
    else:
        ratio = torch.sub(log_probs.float(), old_log_probs.float())
        if metrics:
            log_ratio = ratio.clamp(-options.log_ratio_bound, options.log_ratio_bound)
        ratio.exp_()
    clipped = torch.maximum(ratio, spread(low))
    torch.minimum(clipped, spread(high), out=clipped)

    sums = weights.new_empty(0)
    if metrics:
        everything = torch.ones_like(ratio, dtype=torch.bool) if mask is None else mask != 0
        if old_log_probs is None:
            log_ratio = torch.zeros_like(ratio)
        true_ratio = log_ratio.exp()
        positive, negative = spread(advantages) > 0, spread(negative)

        def total(values: Tensor) -> Tensor:
            return torch.where(everything, values, 0.0).sum()

        sums = [
            everything.sum().float(),
            (everything & negative & (true_ratio < options.negative_low)).sum().float(),
            (everything & positive & (true_ratio > options.positive_high)).sum().float(),
            (everything & negative & (true_ratio > options.negative_high)).sum().float(),
            total(true_ratio),
            -total(log_ratio),
            total(true_ratio - 1.0 - log_ratio),
        ]

    # Where no bound is hit the derivative of -A x r by the log-prob is -A x r itself.
    active = ratio.eq_(clipped)
    terms = drop_ignored_(clipped.mul_(coefficient))
    grad = active.mul_(terms) if write_grad else weights.new_empty(0)
    if ref_log_probs is not None:
        difference = torch.sub(ref_log_probs.float(), log_probs.float())
        exp_difference = difference.exp()
        kl = (exp_difference - difference).sub_(1.0)
        if metrics:
            sums.append(total(kl))
        kl_weight = weight * options.beta
        terms.add_(drop_ignored_(kl.mul_(kl_weight)))
        if write_grad:
            grad.add_(drop_ignored_((1.0 - exp_difference).mul_(kl_weight)))
    elif metrics:
        sums.append(terms.new_zeros(()))
    if metrics:
        largest = torch.where(everything, true_ratio, 0.0)
        sums.append(largest.amax() if largest.numel() else terms.new_zeros(()))
        sums = torch.stack(sums)
    return terms.sum(), grad, sums


def _product(a: Tensor, b: Tensor, spread) -> Tensor:
    """a * b at the tokens: multiplied per sequence first if both are per sequence."""
    return spread(a * b) if a.shape == b.shape else spread(a) * spread(b)
