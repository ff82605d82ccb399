"""The policy loss and its gradient in closed form, in plain PyTorch operations, for any device."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .._batch import Batch
from .._checks import values_are_free
from .._kl import K3, token_kl_closed_form
from .._options import TokenLoss, kind_of
from .._rollout import apply, correct, correction_sums
from ..surrogates import Clip, clipped_tokens


def policy_loss_fwd(
    batch: Batch, terms: TokenLoss, write_grad: bool, metrics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss (0-dim float32), its gradient with respect to log_probs (float32, empty
    unless ``write_grad``) and the sums of PolicyLossMetrics (empty unless ``metrics``)."""
    correction = None
    if batch.rollout_log_probs is not None:
        correction = correct(batch, terms.rollout)
        batch = apply(batch, correction)
    mean_log_ratio = _mean_log_ratio(batch, terms)
    plain = (terms.surrogate, terms.ratio_level) == ("clip", "token")
    if plain and terms.kl == K3 and not terms.bias_corrected_kl:
        # Multiplying by the mask costs a quarter of filling, but a masked NaN survives it, as does
        # inf times a policy weight of 0: look.
        fill = not values_are_free(batch.log_probs)
        outputs = _plain_clip(batch, terms, write_grad, fill)
        if not (fill or math.isfinite(outputs[0].item())):
            outputs = _plain_clip(batch, terms, write_grad, True)
    else:
        outputs = _any_surrogate(batch, terms, mean_log_ratio, write_grad)
    sums = batch.weights.new_empty(0)
    if metrics:
        sums = _metric_sums(batch, terms, mean_log_ratio)
        if correction is not None:
            sums = torch.cat([sums, correction_sums(batch, correction)])
    return *outputs, sums


def policy_loss_bwd(grad: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    if values_are_free(grad_output) and grad_output.item() == 1.0:
        return grad.to(dtype)
    return (grad * grad_output).to(dtype)


def _mean_log_ratio(batch: Batch, terms: TokenLoss) -> Tensor | None:
    """That of the sequence, at its tokens, where a token has not a ratio of its own."""
    if terms.ratio_level == "token" or batch.old_log_probs is None:
        return None
    difference = _log_ratio(batch)
    if terms.token_clip:
        below, above = clipped_tokens(difference, _advantage(batch), *terms.token_clip)
        low, high = terms.token_clip
        difference = difference.masked_fill(below, low).masked_fill(above, high)
    if terms.ratio_level == "sequence_sum":
        return batch.per_token(batch.sequence_sums(difference).float()[:, None])
    return batch.per_token(batch.sequence_means(difference))


def _log_ratio(batch: Batch) -> Tensor:
    """Each token's own; 0 where it does not count."""
    assert batch.old_log_probs is not None
    difference = batch.log_probs.float() - batch.old_log_probs.float()
    return difference.masked_fill_(~batch.counted(), 0.0)


def _advantage(batch: Batch) -> Tensor:
    return batch.per_token(batch.advantages.float())


def _clipped(batch: Batch, terms: TokenLoss) -> tuple[Tensor, Tensor] | None:
    """The tokens that count in their sequence's mean as a bound."""
    if not terms.token_clip or batch.old_log_probs is None:
        return None
    return clipped_tokens(_log_ratio(batch), _advantage(batch), *terms.token_clip)


def _plain_clip(
    batch: Batch, terms: TokenLoss, write_grad: bool, fill: bool
) -> tuple[Tensor, Tensor]:
    """The clip of each token's own ratio, with as few passes over the tokens as can be had."""
    # In place wherever a tensor is not needed any more: here the time goes into memory traffic.
    log_probs = batch.log_probs
    counted, ignored = None, None
    if batch.mask is not None:
        if fill:
            ignored = ~batch.counted()
        else:
            # Never in place: a float32 mask is the caller's own tensor.
            counted = batch.counted().to(torch.float32)
    dropped = ignored
    if fill and batch.policy_weights is not None:
        dropped = batch.per_token(batch.policy_weights == 0)
        dropped = dropped if ignored is None else dropped | ignored

    def drop_(values: Tensor, ignored: Tensor | None) -> Tensor:
        if ignored is not None:
            return values.masked_fill_(ignored, 0.0)
        return values if counted is None else values.mul_(counted)

    advantages = batch.advantages.float()
    coefficient = batch.per_token(_product(batch, -advantages, _policy_weights(batch)))

    low, high = _ratio_bounds(advantages, terms)
    if batch.old_log_probs is None:
        ratio = torch.ones_like(log_probs, dtype=torch.float32)
    else:
        ratio = torch.sub(log_probs.float(), batch.old_log_probs.float())
        ratio.exp_()
    clipped = torch.maximum(ratio, batch.per_token(low))
    torch.minimum(clipped, batch.per_token(high), out=clipped)

    # Where no bound is hit the derivative of -A x r by the log-prob is -A x r itself.
    active = ratio.eq_(clipped)
    loss = drop_(clipped.mul_(coefficient), dropped)
    grad = active.mul_(loss) if write_grad else batch.weights.new_empty(0)
    if terms.beta and batch.ref_log_probs is not None:
        difference = torch.sub(batch.ref_log_probs.float(), log_probs.float())
        exp_difference = difference.exp()
        kl_weight = batch.per_token(batch.weights[:, None]) * terms.beta
        kl = (exp_difference - difference).sub_(1.0)
        loss.add_(drop_(kl.mul_(kl_weight), ignored))
        if write_grad:
            grad.add_(drop_((1.0 - exp_difference).mul_(kl_weight), ignored))
    return loss.sum(), grad


def _ratio_bounds(advantages: Tensor, terms: TokenLoss) -> tuple[Tensor, Tensor]:
    """Every clip is a clamp of the ratio, by the sign of A; the log-ratio clamp too."""
    if not torch.compiler.is_compiling():
        least, most = _exp_of_clamp(terms.log_ratio_clamp)
        positive, low, high = terms.settings
        negative = advantages < 0

        def by_sign(positive: float, negative_: float) -> Tensor:
            return torch.full_like(advantages, positive).masked_fill_(negative, negative_)

        return by_sign(least, max(low, least)), by_sign(min(positive, most), min(high, most))
    bound = torch.full_like(advantages, terms.log_ratio_clamp)
    low, high = Clip.bounds(advantages, *terms.settings)
    return torch.maximum(low, (-bound).exp_()), torch.minimum(high, bound.exp_())


@functools.lru_cache
def _exp_of_clamp(clamp: float) -> tuple[float, float]:
    """Through the same exp as the ratios, so that a tie is a tie."""
    low, high = torch.tensor([-clamp, clamp], dtype=torch.float32).exp().tolist()
    return low, high


def _any_surrogate(
    batch: Batch, terms: TokenLoss, mean_log_ratio: Tensor | None, write_grad: bool
) -> tuple[Tensor, Tensor]:
    """The general case: any surrogate and ratio level."""
    counted = batch.counted()
    kept = counted  # what has a policy term
    if batch.policy_weights is not None:
        kept = kept & (batch.per_token(batch.policy_weights) != 0)

    def drop(values: Tensor, keep: Tensor = counted) -> Tensor:
        return torch.where(keep, values, 0.0)

    log_prob = drop(batch.log_probs.float())
    if batch.old_log_probs is None:
        log_ratio = torch.zeros_like(log_prob)
    elif mean_log_ratio is None:
        log_ratio = log_prob - drop(batch.old_log_probs.float())
    else:
        log_ratio = mean_log_ratio
    bound = terms.log_ratio_clamp
    inside = log_ratio.abs() <= bound
    ratio = log_ratio.clamp(-bound, bound).exp()
    advantage = batch.per_token(batch.advantages.float())
    coefficient = batch.per_token(_policy_weights(batch))

    loss, through_ratio, past_ratio, *_ = kind_of(terms).closed_form(
        log_prob, ratio, advantage, *terms.settings
    )
    loss = drop(loss * coefficient, kept)
    through_ratio = drop(through_ratio * coefficient, kept & inside)
    past_ratio = drop(past_ratio * coefficient, kept)
    if terms.beta and batch.ref_log_probs is not None:
        difference = drop(batch.ref_log_probs.float()) - log_prob
        weight = batch.per_token(batch.weights[:, None]) * terms.beta
        kl, kl_grad = (weight * v for v in token_kl_closed_form(terms.kl, difference, ratio))
        if terms.bias_corrected_kl:
            kl, kl_grad = kl * ratio, kl_grad * ratio
            through_ratio = through_ratio + drop(kl, counted & inside)
        loss = loss + drop(kl)
        past_ratio = past_ratio + drop(kl_grad)
    if not write_grad:
        return loss.sum(), batch.weights.new_empty(0)
    if terms.ratio_level == "sequence":
        # A mean over the tokens: each of them moves it by 1/L.
        through_ratio = drop(batch.per_token(batch.sequence_means(through_ratio)))
    clipped = _clipped(batch, terms)
    if clipped is not None:
        through_ratio = through_ratio.masked_fill(clipped[0] | clipped[1], 0.0)
    return loss.sum(), through_ratio + past_ratio


def _metric_sums(batch: Batch, terms: TokenLoss, mean_log_ratio: Tensor | None) -> Tensor:
    """(NUM_METRIC_SUMS,) sums in the order of the fields of PolicyLossMetrics."""
    counted = batch.counted()
    ones = counted.float()

    def difference(a: Tensor, b: Tensor | None) -> Tensor:
        # 0 where a position does not count: not apart from the old policy.
        if b is None:
            return torch.zeros_like(a, dtype=torch.float32)
        return torch.where(counted, a.float() - b.float(), 0.0)

    if mean_log_ratio is None:
        log_ratio = difference(batch.log_probs, batch.old_log_probs)
    else:
        log_ratio = torch.where(counted, mean_log_ratio, 0.0)
    log_ratio = log_ratio.clamp_(-terms.log_ratio_clamp, terms.log_ratio_clamp)
    ratio = log_ratio.exp()
    advantage = batch.per_token(batch.advantages.float())
    kl = ones.new_zeros(())
    if batch.ref_log_probs is not None:
        ref_log_ratio = difference(batch.ref_log_probs, batch.log_probs)
        kl = token_kl_closed_form(terms.kl, ref_log_ratio, ratio)[0]
        kl = (kl.mul_(ratio) if terms.bias_corrected_kl else kl).sum()
    positive, negative = (advantage > 0).float(), (advantage < 0).float()
    extras: list[Tensor] = []
    if terms.surrogate == "clip":
        # Comparisons in place give numbers, which a CPU multiplies and adds several times faster
        # than flags. 1, the ratio where a position does not count, is within the bounds.
        high, negative_low, negative_high = terms.settings
        clipped = (
            ratio.clone().lt_(negative_low).mul_(negative).sum(),
            ratio.clone().gt_(high).mul_(positive).sum(),
            ratio.clone().gt_(negative_high).mul_(negative).sum(),
        )
    else:
        log_prob = torch.where(counted, batch.log_probs.float(), 0.0)
        below, above, *extras = kind_of(terms).counted(log_prob, ratio, advantage, *terms.settings)
        of_means = _clipped(batch, terms)
        below, above = (flag * ones for flag in of_means or (below, above))
        clipped = (
            (below * (positive + negative)).sum(),
            (above * positive).sum(),
            (above * negative).sum(),
        )
    return torch.stack(
        [
            ones.sum(),
            *clipped,
            torch.mul(ratio, ones).sum(),
            -log_ratio.sum(),
            (ratio - 1.0).sub_(log_ratio).sum(),
            kl,
            torch.mul(ratio, ones).amax() if ratio.numel() else kl,
            *(torch.where(counted, extra, 0).sum(dtype=torch.float32) for extra in extras),
        ]
    )


def _policy_weights(batch: Batch) -> Tensor:
    """x e q w of the formula, per sequence or per token."""
    weights = batch.weights[:, None]
    if batch.policy_weights is None:
        return weights
    return _product(batch, batch.policy_weights.float(), weights)


def _product(batch: Batch, a: Tensor, b: Tensor) -> Tensor:
    """a * b: per sequence if both are, else at the tokens."""
    if batch.is_per_token(a) == batch.is_per_token(b):
        return a * b
    return batch.per_token(a) * batch.per_token(b)
