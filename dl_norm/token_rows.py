"""What the loss over logits needs to know of each token, one entry per row of the logits."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .checks import values_are_free


@dataclass(frozen=True)
class TokenRows:
    """Flat (N,) tensors; float32 where not said otherwise.

    active (bool) is False where the token has neither loss nor gradient: its row is not read.
    Inactive rows have advantage and weight 0, whatever was passed there. A loss has advantages
    and weights; log-probs alone need neither.
    """

    token_ids: Tensor  # integer
    active: Tensor
    advantages: Tensor | None = None
    weights: Tensor | None = None
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    policy_weights: Tensor | None = None

    @property
    def count(self) -> int:
        return self.token_ids.shape[0]

    def __getitem__(self, index: slice | Tensor) -> TokenRows:
        """The rows of ``index``, a slice or a tensor of row numbers."""
        taken = {
            field.name: tensor[index]
            for field in fields(self)
            if (tensor := getattr(self, field.name)) is not None
        }
        return TokenRows(**taken)


def policy_loss_rows(
    token_ids: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ref_log_probs: Tensor | None,
    rollout_weights: Tensor | None,
    entropy_mask: Tensor | None,
    sequence_mask: Tensor | None,
    skip_zero_advantages: bool,
) -> TokenRows:
    """Spreads per-sequence values over the tokens of a (B, T) or packed (N,) batch.

    A token that one of the two masks leaves without its policy term has rollout weight 0.

    ``skip_zero_advantages``: tokens of advantage 0, or without a policy term, are inactive too.
    That term and its gradient are exactly 0, so this is right where nothing else of them is asked
    for.
    """
    shape = token_ids.shape
    sequences = weights.shape[0]
    tokens = token_ids.numel()
    device = token_ids.device
    weights = weights.float()
    sequence_of = None
    if cu_seqlens is not None and sequences:
        ends = cu_seqlens[1:].contiguous()
        positions = torch.arange(tokens, dtype=ends.dtype, device=device)
        sequence_of = torch.searchsorted(ends, positions, right=True).clamp_(max=sequences - 1)
        if not values_are_free(cu_seqlens):
            # Offsets that do not span the stream cannot raise without a sync: the loss is NaN.
            spans = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens)
            weights = torch.where(spans, weights, torch.nan)

    def spread(values: Tensor) -> Tensor:
        if values.shape != (sequences,):
            return values.reshape(tokens)
        if cu_seqlens is None:
            return values[:, None].expand(shape).reshape(tokens)
        return values.new_zeros(tokens) if sequence_of is None else values[sequence_of]

    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.float().reshape(tokens)

    advantages = spread(advantages.float())
    weights = spread(weights)
    if rollout_weights is not None:
        rollout_weights = spread(rollout_weights.float())
    active = torch.ones(tokens, dtype=torch.bool, device=device)
    if mask is not None:
        active = (mask != 0).reshape(tokens)
    counted = active
    if skip_zero_advantages:
        active = active & (advantages != 0)
    for policy_mask in (entropy_mask, sequence_mask):
        if policy_mask is None:
            continue
        kept = spread(policy_mask != 0)
        if rollout_weights is None:
            rollout_weights = kept.float()
        else:
            rollout_weights = torch.where(kept, rollout_weights, 0.0)
        if skip_zero_advantages:
            active = active & kept
    return TokenRows(
        token_ids=token_ids.reshape(tokens),
        active=active,
        advantages=torch.where(counted, advantages, 0.0),
        weights=torch.where(counted, weights, 0.0),
        old_log_probs=flat(old_log_probs),
        ref_log_probs=flat(ref_log_probs),
        policy_weights=rollout_weights,
    )


def check_token_ids(token_ids: Tensor, mask: Tensor | None, like: Tensor, vocabulary: int) -> None:
    """``like``: a tensor of the shape and on the device that both must have.

    On a GPU an id outside the vocabulary makes the loss NaN instead of raising.
    """
    if not isinstance(token_ids, Tensor):
        raise TypeError(f"token_ids must be a tensor, got {type(token_ids).__name__}")
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"token_ids must be int64 or int32, got {token_ids.dtype}")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    for name, tensor in (("token_ids", token_ids), ("mask", mask)):
        if tensor is None:
            continue
        if tensor.shape != like.shape:
            raise ValueError(f"{name} must be {tuple(like.shape)}, got {tuple(tensor.shape)}")
        if tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device}, not on {like.device}: move it there")
    if values_are_free(token_ids):
        outside = (token_ids < 0) | (token_ids >= vocabulary)
        if mask is not None:
            outside &= mask != 0
        if bool(outside.any()):
            raise ValueError(
                f"token_ids must be in [0, V = {vocabulary}) where mask != 0, got "
                f"{int(token_ids[outside][0])}"
            )
