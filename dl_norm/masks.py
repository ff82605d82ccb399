"""Which sequences of a batch have a policy term."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    LOG_PROB_DTYPES,
    check_cu_seqlens,
    check_number,
    check_policy_loss_inputs,
    check_tensor,
)
from .closed_form import sequence_sums
from .weights import sequence_lengths


@torch.no_grad()
def off_policy_sequence_mask(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    threshold: float,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Keeps a sequence where A >= 0 or the mean of old_log_probs - log_probs is <= threshold.

    A bad answer (A < 0) that the policy has moved away from since it was sampled is dropped: what
    is still to be learned from it is little, and its ratio is noise.

    Args:
        log_probs, mask, cu_seqlens: as for :func:`policy_loss`; no gradient flows.
        old_log_probs: like ``log_probs``, from the policy that sampled, best as the inference
            engine gave them. NaN: the token says nothing and counts as no difference.
        advantages: (G,) or one per token.
        threshold: bound > 0 on the mean over the sequence's tokens, in nats.

    Returns:
        bool, True where to keep, of the shape of ``advantages``: (G,) is a ``sequence_mask`` of
        :func:`policy_loss`, one per token an ``entropy_mask``. A sequence without tokens is kept.
        No host sync.

    Raises:
        TypeError, ValueError: as :func:`policy_loss`.

    Source: DeepSeek-V3.2, arXiv:2512.02556, equation 9.
    """
    check_number(threshold, "threshold", "threshold > 0", lambda v: v > 0)
    dtypes = (*LOG_PROB_DTYPES, torch.float64)
    check_tensor("log_probs", log_probs, dtypes)
    check_tensor("old_log_probs", old_log_probs, dtypes)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, log_probs)
    sequences = len(log_probs) if cu_seqlens is None else len(cu_seqlens) - 1
    weights = log_probs.new_empty(sequences)
    check_policy_loss_inputs(
        log_probs, old_log_probs, advantages, mask, weights, cu_seqlens, None, None, dtypes
    )  # fmt: skip
    difference = torch.nan_to_num(old_log_probs.float() - log_probs.float(), nan=0.0)
    if mask is not None:
        difference = difference.masked_fill(mask == 0, 0.0)
    lengths = sequence_lengths(mask, cu_seqlens).clamp(min=1)
    near = sequence_sums(difference, cu_seqlens) / lengths <= threshold
    if advantages.shape != near.shape:
        if cu_seqlens is None:
            near = near[:, None]
        else:
            near = near.repeat_interleave(cu_seqlens.diff(), output_size=log_probs.shape[0])
    return (advantages >= 0) | near
