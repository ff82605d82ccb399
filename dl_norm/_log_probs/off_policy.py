"""Which sequences of a batch have a policy term."""

from __future__ import annotations

import torch
from torch import Tensor

from .._batch import unweighted_batch
from .._checks import check_number
from .._layout import either, per_token


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
    batch = unweighted_batch(log_probs, mask=mask, cu_seqlens=cu_seqlens)
    old_log_probs = per_token("old_log_probs", old_log_probs, batch.layout)
    difference = torch.nan_to_num(old_log_probs.float() - log_probs.float(), nan=0.0)
    means = batch.sequence_means(difference.masked_fill_(~batch.counted(), 0.0))
    good, near = either("advantages", advantages, batch.layout) >= 0, means <= threshold
    return good | batch.per_token(near) if batch.is_per_token(good) else (good | near)[:, 0]
