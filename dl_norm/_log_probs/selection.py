"""Which tokens of a whole batch a loss leaves out, or penalises: clip-cov, KL-cov and M2PO."""

from __future__ import annotations

import torch
from torch import Tensor

from .._batch import Batch, unweighted_batch
from .._checks import REAL_DTYPES, check_number, check_tensor
from .._layout import either, per_token
from ..weights.group_sums import Group, sum_over
from .order import largest, order_keys, smallest_of_mean_below, wide

_POINT = 2**23  # keys of second moments are fixed-point numbers


@torch.no_grad()
def clip_cov_mask(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    generator: torch.Generator | None = None,
    cu_seqlens: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    r"""Drops a few tokens, drawn by chance, of those whose covariance is large: Clip-Cov.

    .. math::
        c_t = (A_t - \bar A) (\log\pi_t - \overline{\log\pi})

    with the means over the batch's tokens. Of the tokens with low < c < high that PPO's clip does
    not clip, max(1, int(fraction N)) are drawn, N the tokens of the batch, or all if there are
    fewer. Those tokens make the entropy fall.

    Args:
        log_probs, old_log_probs, mask, cu_seqlens: as for :func:`policy_loss`, of **all** sequences
            of this process, before they are cut into micro-batches; no gradient flows.
        advantages: (G,) or one per token.
        fraction, low, high: how many tokens, and of which covariance.
        eps_low, eps_high: the clip of the loss.
        generator: what draws, on the device of ``log_probs``; on every process one of its own,
            seeded differently. None: PyTorch's default generator.
        group: as for :func:`sequence_weights`; the batch is that of the group.

    Returns:
        bool like ``log_probs``, False at the tokens that were drawn: an ``entropy_mask`` of
        :func:`policy_loss`. No host sync.

    Raises:
        TypeError, ValueError: as :func:`policy_loss` and :func:`sequence_weights`.

    Source: arXiv:2505.22617. verl and SkyRL have it as ``clip_cov``, over a micro-batch each.
    """
    _check_fraction(fraction)
    check_number(low, "low", "low < high", lambda v: v < high)
    check_number(high, "high", "high > low", lambda v: v > low)
    for name, value in (("eps_low", eps_low), ("eps_high", eps_high)):
        check_number(value, name, f"{name} >= 0", lambda v: v >= 0)
    batch = unweighted_batch(log_probs, mask=mask, cu_seqlens=cu_seqlens)
    old_log_probs = per_token("old_log_probs", old_log_probs, batch.layout)
    advantage = batch.per_token(either("advantages", advantages, batch.layout))
    covariance, counted, tokens = _covariance(batch, advantage, group)
    ratio = (log_probs.float() - old_log_probs.float()).exp()
    clipped = ((advantage > 0) & (ratio > 1 + eps_high)) | ((advantage < 0) & (ratio < 1 - eps_low))
    candidates = counted & ~clipped & (covariance > low) & (covariance < high)
    keys = torch.randint(
        2**32, (counted.numel(),), generator=generator, device=counted.device, dtype=torch.int64
    )
    drawn = largest(keys, candidates.flatten(), _count(fraction, tokens), group)
    return ~drawn.view(log_probs.shape)


@torch.no_grad()
def kl_cov_tokens(
    log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    fraction: float = 2e-4,
    cu_seqlens: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    r"""The tokens of the largest covariance c (see :func:`clip_cov_mask`), which KL-Cov penalises.

    The loss of KL-Cov is -A r, and weight abs(log r) at these tokens, a second call:

        tokens = kl_cov_tokens(log_probs.detach(), advantages, mask, group=group)
        loss = policy_loss(log_probs, *rest, surrogate="importance_sampling")
        loss += policy_loss(log_probs, *rest, surrogate="abs_drift(0.1)", entropy_mask=tokens)

    Args:
        log_probs, advantages, mask, cu_seqlens, group: as for :func:`clip_cov_mask`.
        fraction: how many of the batch's N tokens: max(1, int(fraction N)). Of equal covariances
            the first count, in the order of processes and positions.

    Returns:
        bool like ``log_probs``. No host sync.

    Raises:
        TypeError, ValueError: as :func:`policy_loss` and :func:`sequence_weights`.

    Source: arXiv:2505.22617. verl and SkyRL have it as ``kl_cov``, over a micro-batch each.
    """
    _check_fraction(fraction)
    batch = unweighted_batch(log_probs, mask=mask, cu_seqlens=cu_seqlens)
    advantage = batch.per_token(either("advantages", advantages, batch.layout))
    covariance, counted, tokens = _covariance(batch, advantage, group)
    keys = order_keys(covariance.flatten())
    return largest(keys, counted.flatten(), _count(fraction, tokens), group).view(log_probs.shape)


@torch.no_grad()
def second_moment_mask(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor | None,
    threshold: float,
    *,
    cu_seqlens: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    r"""Drops the tokens that the policy has moved furthest at since they were sampled: M2PO.

    Those with the largest m = (old_log_probs - rollout_log_probs)^2, until the mean of m over the
    others is below ``threshold``; one token stays in any case.

    Args:
        old_log_probs: as for :func:`policy_loss`, of **all** sequences of this process.
        rollout_log_probs: likewise, of the policy that sampled, as the inference engine gave them.
            NaN: the token says nothing and counts as no difference.
        mask, cu_seqlens, group: as for :func:`clip_cov_mask`.
        threshold: bound in (0, 256) of the mean, in nats squared; 0.04 in the paper.

    Returns:
        bool like ``old_log_probs``, False where dropped: an ``entropy_mask`` of
        :func:`policy_loss`, or, as AReaL uses it, a factor of ``mask``. Of equal m the first stay.
        m is known to 1.2e-7 and counts as 256 where it is more. No host sync.

    Raises:
        TypeError, ValueError: as :func:`policy_loss` and :func:`sequence_weights`.

    Source: arXiv:2510.01161; AReaL's ``m2_threshold``, over a micro-batch each.
    """
    rule = "0 < threshold < 256"
    check_number(threshold, "threshold", rule, lambda v: 0 < v < 256)
    check_tensor("old_log_probs", old_log_probs, REAL_DTYPES)
    check_tensor("rollout_log_probs", rollout_log_probs, REAL_DTYPES)
    batch = unweighted_batch(
        old_log_probs, old_log_probs=rollout_log_probs, mask=mask, cu_seqlens=cu_seqlens
    )
    difference = wide(old_log_probs) - wide(rollout_log_probs)
    moment = torch.nan_to_num(difference, nan=0.0).square().clamp(max=256.0)
    keys = (moment * _POINT).round().long().flatten()
    kept = smallest_of_mean_below(keys, batch.counted().flatten(), threshold * _POINT, group)
    return kept.view(old_log_probs.shape) | ~batch.counted()


def _check_fraction(fraction: float) -> None:
    check_number(fraction, "fraction", "0 < fraction <= 1", lambda v: 0 < v <= 1)


def _covariance(batch: Batch, advantage: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token, which tokens count, and how many do over the group."""
    counted = batch.counted()
    log_probs = wide(batch.log_probs).masked_fill(~counted, 0.0)
    advantages = wide(advantage).expand_as(log_probs).masked_fill(~counted, 0.0)
    sums = torch.stack([wide(counted.sum()), advantages.sum(), log_probs.sum()])
    tokens, *totals = sum_over(sums, group)
    mean_advantage, mean_log_prob = (total / tokens.clamp(min=1) for total in totals)
    return (advantages - mean_advantage) * (log_probs - mean_log_prob), counted, tokens


def _count(fraction: float, tokens: Tensor) -> Tensor:
    return (fraction * tokens).floor().clamp(min=1).long()
