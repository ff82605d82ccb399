"""One call of a loss: what its arguments come down to."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Batch, make_batch
from .checks import LOG_PROB_DTYPES, check_no_transform
from .options import TokenLoss, make_token_loss

# The options of policy_loss that are tensors.
TENSOR_OPTIONS = (
    "cu_seqlens", "ref_log_probs", "rollout_weights", "entropy_mask", "sequence_mask"
)  # fmt: skip


def make_call(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    options: dict,
    *,
    metrics: bool,
    dtypes: tuple[torch.dtype, ...] = LOG_PROB_DTYPES,
) -> tuple[Batch, TokenLoss]:
    """Checks all arguments of a loss. ``options``: its keywords but ``impl`` and what it returns.

    The reference's log-probs are left out where nothing reads them.
    """
    check_no_transform("policy_loss")
    tensors = {name: options.get(name) for name in TENSOR_OPTIONS}
    terms = make_token_loss(**token_options(options))
    batch = make_batch(log_probs, old_log_probs, advantages, mask, weights, dtypes, **tensors)
    if terms.beta and batch.ref_log_probs is None:
        raise ValueError(
            f"beta = {terms.beta} needs ref_log_probs, the reference policy's log-probs"
        )
    if not (terms.beta or metrics):
        batch = batch._replace(ref_log_probs=None)  # multiplied by zero
    return batch, terms


def token_options(options: dict) -> dict:
    """Those that are no tensors."""
    return {name: value for name, value in options.items() if name not in TENSOR_OPTIONS}
