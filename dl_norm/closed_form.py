"""The policy loss and its gradient in closed form, in plain PyTorch operations, for any device."""

from __future__ import annotations

import math
from collections.abc import Callable

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
    unless ``write_grad``) and the sums of PolicyLossMetrics (empty unless ``metrics``)."""

    def spread(values: Tensor) -> Tensor:
        # (G,) values so that they broadcast against the tokens; per-token values as they are.
        if values.shape != weights.shape:
            return values
        if cu_seqlens is None:
            return values[:, None]
        return values.repeat_interleave(cu_seqlens.diff(), output_size=log_probs.shape[0])

    # Multiplying by the mask costs a quarter of filling, but a masked NaN survives it: look.
    fill = mask is None or not values_are_free(log_probs)
    arguments = (
        log_probs, old_log_probs, advantages.float(), mask, weights, ref_log_probs,
        rollout_weights, options, write_grad, spread,
    )  # fmt: skip
    loss, grad = _loss_and_grad(*arguments, fill)
    if not (fill or math.isfinite(loss.item())):
        loss, grad = _loss_and_grad(*arguments, True)
    sums = weights.new_empty(0)
    if metrics:
        counted = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask != 0
        sums = _metric_sums(
            log_probs, old_log_probs, spread(advantages), counted, ref_log_probs, options
        )
    return loss, grad, sums


def policy_loss_bwd(grad: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    if values_are_free(grad_output) and grad_output.item() == 1.0:
        return grad.to(dtype)
    return (grad * grad_output).to(dtype)


def _loss_and_grad(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    ref_log_probs: Tensor | None,
    rollout_weights: Tensor | None,
    options: PolicyLossOptions,
    write_grad: bool,
    spread: Callable[[Tensor], Tensor],
    fill: bool,
) -> tuple[Tensor, Tensor]:
    # In place wherever a tensor is not needed any more: here the time goes into memory traffic.
    ignored, counted = None, None
    if mask is not None:
        if fill:
            ignored = mask == 0
        else:
            counted = mask.to(torch.float32)
            counted = counted if mask.dtype == torch.bool else counted.ne_(0)

    def drop_ignored_(values: Tensor) -> Tensor:
        if ignored is not None:
            return values.masked_fill_(ignored, 0.0)
        return values if counted is None else values.mul_(counted)

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
        ratio.exp_()
    clipped = torch.maximum(ratio, spread(low))
    torch.minimum(clipped, spread(high), out=clipped)

    # Where no bound is hit the derivative of -A x r by the log-prob is -A x r itself.
    active = ratio.eq_(clipped)
    terms = drop_ignored_(clipped.mul_(coefficient))
    grad = active.mul_(terms) if write_grad else weights.new_empty(0)
    if options.beta and ref_log_probs is not None:
        difference = torch.sub(ref_log_probs.float(), log_probs.float())
        exp_difference = difference.exp()
        kl_weight = weight * options.beta
        kl = (exp_difference - difference).sub_(1.0)
        terms.add_(drop_ignored_(kl.mul_(kl_weight)))
        if write_grad:
            grad.add_(drop_ignored_((1.0 - exp_difference).mul_(kl_weight)))
    return terms.sum(), grad


def _metric_sums(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantage: Tensor,
    counted: Tensor,
    ref_log_probs: Tensor | None,
    options: PolicyLossOptions,
) -> Tensor:
    """(NUM_METRIC_SUMS,) sums in the order of the fields of PolicyLossMetrics.

    A position that does not count gets log-ratio 0: neither clipped nor apart from the old policy.
    """

    def difference(a: Tensor, b: Tensor | None) -> Tensor:
        if b is None:
            return torch.zeros_like(a, dtype=torch.float32)
        return torch.where(counted, a.float() - b.float(), 0.0)

    def count(flags: Tensor, of: Tensor) -> Tensor:
        return flags.mul_(of).sum()

    log_ratio = difference(log_probs, old_log_probs)
    log_ratio = log_ratio.clamp_(-options.log_ratio_bound, options.log_ratio_bound)
    ratio = log_ratio.exp()
    ones = counted.float()
    positive, negative = (advantage > 0).float(), (advantage < 0).float()
    kl = ones.new_zeros(())
    if ref_log_probs is not None:
        ref_log_ratio = difference(ref_log_probs, log_probs)
        kl = ref_log_ratio.exp().sub_(ref_log_ratio).sub_(1.0).sum()
    # Comparisons in place give floats, which the CPU adds several times faster than bools.
    return torch.stack(
        [
            ones.sum(),
            count(ratio.clone().lt_(options.negative_low), negative),
            count(ratio.clone().gt_(options.positive_high), positive),
            count(ratio.clone().gt_(options.negative_high), negative),
            torch.mul(ratio, ones).sum(),
            -log_ratio.sum(),
            (ratio - 1.0).sub_(log_ratio).sum(),
            kl,
            torch.mul(ratio, ones).amax() if ratio.numel() else kl,
        ]
    )


def _product(a: Tensor, b: Tensor, spread: Callable[[Tensor], Tensor]) -> Tensor:
    """a * b at the tokens: multiplied per sequence first if both are per sequence."""
    return spread(a * b) if a.shape == b.shape else spread(a) * spread(b)
