"""Kept sets as trainers hold them, and differentiable log-probs over them.

A trainer whose loss takes log-probs, not hidden states, gets them from :func:`log_probs`; one that
has hidden states in its loss hands the sets to :func:`dl_norm.linear_policy_loss` itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dl_norm import KeptSets
from dl_norm._checks import values_are_free

from .log_probs import log_probs as with_gradient


def padded_sets(kept_tokens: Tensor, token_ids: Tensor) -> tuple[KeptSets, Tensor]:
    """prime-rl's kept ids, padded with -1, as sets, and which tokens have one.

    Args:
        kept_tokens: (B, S, K) integers, those of ``token_ids[b, s]``.
        token_ids: (B, S), what is predicted: prime-rl's ``labels``.

    Returns:
        (sets, (B, S) bool). A token has a set if it is in it, as for prime-rl: one that has none
        is over the whole vocabulary. On a GPU nothing is read on the host, so the sets keep the
        room of the padding, and the last token, whose label prime-rl makes up, holds it and has
        none.
    """
    tokens = token_ids.numel()
    flat = kept_tokens.reshape(tokens, -1)
    kept = flat >= 0
    has_set = (flat == token_ids.reshape(-1, 1)).any(-1)
    if not values_are_free(flat):
        has_set = has_set & (torch.arange(tokens, device=flat.device) < tokens - 1)
    kept = kept & has_set[:, None]
    offsets = F.pad(kept.sum(-1).cumsum(0), (1, 0))
    if values_are_free(flat):
        ids = flat[kept]
    else:
        flat, kept = flat.reshape(-1), kept.reshape(-1)
        ids = flat[torch.argsort((~kept).to(torch.uint8), stable=True)]
        offsets[-1] = ids.shape[0]
    return KeptSets(ids.long(), offsets), has_set.view(token_ids.shape)


def listed_sets(
    ids: Sequence[Any], offsets: Sequence[Any], lengths: Sequence[int], device: torch.device
) -> tuple[KeptSets, Tensor | None]:
    """slime's sets of each response, lists or tensors on the host, as sets of the packed tokens.

    Args:
        ids, offsets: of each response, in CSR form.
        lengths: tokens of each response. Tokens behind the recorded sets have none.

    Returns:
        (sets, (N,) bool which tokens have one), or None for the second where all have.
    """
    parts, recorded = [], []
    for part_ids, part_offsets, length in zip(ids, offsets, lengths, strict=True):
        part_offsets = torch.as_tensor(part_offsets, dtype=torch.int64)[: length + 1]
        if part_offsets.numel() == 0:
            part_offsets = torch.zeros(1, dtype=torch.int64)
        known, last = part_offsets.shape[0] - 1, int(part_offsets[-1])
        part_offsets = torch.cat([part_offsets, part_offsets[-1:].expand(length - known)])
        parts.append((torch.as_tensor(part_ids, dtype=torch.int64)[:last], part_offsets))
        recorded.append(torch.arange(length) < known)
    sets = KeptSets.cat(parts)
    sets = KeptSets(*(tensor.to(device, non_blocking=True) for tensor in sets))
    has_set = torch.cat(recorded) if recorded else torch.ones(0, dtype=torch.bool)
    return sets, None if bool(has_set.all()) else has_set.to(device, non_blocking=True)


def log_probs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    kept: KeptSets,
    has_set: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    compact: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Log-probs of tokens over their kept sets, and over the whole vocabulary where they have none.

    The log-probs have a gradient at ``hidden`` and ``lm_head_weight``, of which no logit is stored:
    :func:`dl_norm.integrations.log_probs.log_probs`.

    Args:
        hidden, lm_head_weight, token_ids, mask: as for :func:`dl_norm.token_log_probs`.
        kept, has_set: of :func:`padded_sets` or :func:`listed_sets`. has_set None: all have one.
        compact: tokens without a set alone go through the whole head, which counts them: on a GPU
            one host sync. False: no sync, and all tokens go through it, unless has_set is None.
        **options: of :func:`dl_norm.token_log_probs`: temperature, bias, impl, ... Those of the
            whole head (chunk_size, fp32_logits) are for the tokens without a set.

    Returns:
        (log-probs, entropy) float32 of the shape of ``token_ids``, 0 where mask is 0. The entropy
        has no gradient, and is that of the softmax over the set.

    Raises:
        TypeError, ValueError: as :func:`dl_norm.token_log_probs`.
    """
    chunked = {name: options.pop(name) for name in _OF_THE_HEAD if name in options}
    tensors = hidden, token_ids, lm_head_weight
    if has_set is None:
        return with_gradient(*tensors, mask=mask, kept=kept, **options)
    counted = torch.ones_like(has_set) if mask is None else mask != 0
    whole = {"compact": compact, **chunked, **options}
    parts = (
        with_gradient(*tensors, mask=counted & has_set, kept=kept, **options),
        with_gradient(*tensors, mask=counted & ~has_set, **whole),
    )
    # Each is 0 where the other is not.
    found, entropy = (first + second for first, second in zip(*parts, strict=True))
    return found, entropy


_OF_THE_HEAD = ("chunk_size", "fp32_logits", "max_tokens")
