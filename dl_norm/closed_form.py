"""The policy loss and its gradient in closed form, in plain PyTorch operations, for any device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import values_are_free
from .options import PolicyLossOptions
from .weights import sequence_lengths


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
    entropy_mask: Tensor | None = None,
    sequence_mask: Tensor | None = None,
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

    def means(values: Tensor) -> Tensor:
        # Of what is 0 where a token does not count: one number a sequence, as spread gives it.
        lengths = sequence_lengths(mask, cu_seqlens).clamp(min=1)
        return spread((sequence_sums(values, cu_seqlens) / lengths).float())

    def counted() -> Tensor:
        return torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask != 0

    log_ratio = None  # that of the sequence, where a token has not its own
    if options.ratio_level != "token" and old_log_probs is not None:
        difference = log_probs.float() - old_log_probs.float()
        log_ratio = means(difference.masked_fill_(~counted(), 0.0))
    inputs = log_probs, old_log_probs, advantages.float()
    constants = weights, ref_log_probs, rollout_weights, options, write_grad, spread
    if (
        (options.surrogate, options.ratio_level) == ("clip", "token")
        and not options.bias_corrected_kl
        and entropy_mask is sequence_mask is None
    ):
        # Multiplying by the mask costs a quarter of filling, but a masked NaN survives it: look.
        fill = mask is None or not values_are_free(log_probs)
        loss, grad = _loss_and_grad(*inputs, mask, *constants, fill)
        if not (fill or math.isfinite(loss.item())):
            loss, grad = _loss_and_grad(*inputs, mask, *constants, True)
    else:
        counts = counted()
        kept = counts
        if entropy_mask is not None:
            kept = kept & (entropy_mask != 0)
        if sequence_mask is not None:
            kept = kept & (spread(sequence_mask) != 0)
        loss, grad = _variant_loss_and_grad(*inputs, log_ratio, counts, kept, *constants, means)
    sums = weights.new_empty(0)
    if metrics:
        sums = _metric_sums(
            log_probs, old_log_probs, log_ratio, spread(advantages), counted(), ref_log_probs,
            options,
        )  # fmt: skip
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
            # Never in place: a float32 mask is the caller's own tensor.
            counted = (mask if mask.dtype == torch.bool else mask != 0).to(torch.float32)

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


def _variant_loss_and_grad(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    log_ratio: Tensor | None,
    counted: Tensor,
    kept: Tensor,
    weights: Tensor,
    ref_log_probs: Tensor | None,
    rollout_weights: Tensor | None,
    options: PolicyLossOptions,
    write_grad: bool,
    spread: Callable[[Tensor], Tensor],
    means: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The general case: any surrogate and ratio level. ``kept``: tokens with a policy term."""

    def drop(values: Tensor, keep: Tensor = counted) -> Tensor:
        return torch.where(keep, values, 0.0)

    log_prob = drop(log_probs.float())
    if old_log_probs is None:
        log_ratio = torch.zeros_like(log_prob)
    elif log_ratio is None:
        log_ratio = log_prob - drop(old_log_probs.float())
    bound = options.log_ratio_bound
    inside = log_ratio.abs() <= bound
    ratio = log_ratio.clamp(-bound, bound).exp()

    # The surrogate as a factor of -A, and its derivative by the log of the ratio.
    advantage = spread(advantages)
    if options.surrogate == "sapo":
        temperature = torch.full_like(advantage, options.sapo_temperature_neg)
        temperature = temperature.masked_fill_(advantage > 0, options.sapo_temperature_pos)
        logit = temperature * (ratio - 1.0)
        gate = torch.sigmoid(logit)
        value = gate * (4.0 / temperature)
        slope = 4.0 * gate * torch.sigmoid(-logit) * ratio * inside
    else:
        negative = advantage < 0
        low = torch.full_like(advantage, options.positive_low)
        low = low.masked_fill_(negative, options.negative_low)
        high = torch.full_like(advantage, options.positive_high)
        high = high.masked_fill_(negative, options.negative_high)
        value = torch.minimum(torch.maximum(ratio, low), high)
        slope = value * (inside & (ratio == value))
    coefficient = -advantage * spread(weights)
    if rollout_weights is not None:
        coefficient = coefficient * spread(rollout_weights.float())
    constant = None  # what the gradient has without going through the ratio
    if options.surrogate == "cispo":
        constant, value = value, value * log_prob
        slope = torch.zeros_like(constant)
    terms = drop(value * coefficient, kept)
    through_ratio = drop(slope * coefficient, kept)
    direct = 0.0 if constant is None else drop(constant * coefficient, kept)

    if options.beta and ref_log_probs is not None:
        difference = drop(ref_log_probs.float()) - log_prob
        exp_difference = difference.exp()
        weight = spread(weights) * options.beta
        kl = weight * (exp_difference - difference - 1.0)
        kl_grad = weight * (1.0 - exp_difference)
        if options.bias_corrected_kl:
            kl, kl_grad = kl * ratio, kl_grad * ratio
            through_ratio = through_ratio + drop(kl * inside)
        terms = terms + drop(kl)
        direct = direct + drop(kl_grad)
    if not write_grad:
        return terms.sum(), weights.new_empty(0)
    if options.ratio_level == "sequence":
        # A mean over the tokens: each of them moves it by 1/L.
        through_ratio = drop(means(through_ratio))
    return terms.sum(), through_ratio + direct


def sequence_sums(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(G,) sums over the tokens, in float64 where the device has it."""
    wide = values if values.device.type == "mps" else values.double()
    if cu_seqlens is None:
        return wide.sum(-1)
    # The offsets are checked where that costs no sync; elsewhere the kernels answer with NaN.
    return torch.segment_reduce(wide, "sum", lengths=cu_seqlens.diff().long(), unsafe=True)


def _metric_sums(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    log_ratio: Tensor | None,
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

    if log_ratio is None:
        log_ratio = difference(log_probs, old_log_probs)
    else:
        log_ratio = torch.where(counted, log_ratio, 0.0)
    log_ratio = log_ratio.clamp_(-options.log_ratio_bound, options.log_ratio_bound)
    ratio = log_ratio.exp()
    ones = counted.float()
    positive, negative = (advantage > 0).float(), (advantage < 0).float()
    kl = ones.new_zeros(())
    if ref_log_probs is not None:
        ref_log_ratio = difference(ref_log_probs, log_probs)
        kl = ref_log_ratio.exp().sub_(ref_log_ratio).sub_(1.0)
        kl = (kl.mul_(ratio) if options.bias_corrected_kl else kl).sum()
    clipped_low = count(ratio.clone().lt_(options.negative_low), negative)
    if options.positive_low:
        clipped_low += count(ratio.clone().lt_(options.positive_low), positive)
    # Comparisons in place give floats, which the CPU adds several times faster than bools.
    return torch.stack(
        [
            ones.sum(),
            clipped_low,
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
