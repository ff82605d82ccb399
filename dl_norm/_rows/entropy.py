"""The entropy in the loss: its coefficient and weights, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._batch import Batch
from .._checks import check_device, check_number, check_tensor
from .._layout import WEIGHT_DTYPES


@dataclass(frozen=True)
class EntropyBonus:
    """What ``entropy_coef`` and ``entropy_weights`` of a loss over rows of logits say."""

    coef: float
    weights: Tensor | None

    def __post_init__(self):
        check_number(self.coef, "entropy_coef", "entropy_coef >= 0", lambda v: v >= 0)

    def row_weights(self, batch: Batch) -> Tensor | None:
        """Coefficient times weight, (G, 1) or like the tokens; None without a bonus.

        Weights beside a coefficient of 0 are no mistake: an adaptive one is 0 at times.
        """
        weights = self.weights
        if weights is None:
            return self.coef * batch.weights[:, None] if self.coef else None
        if isinstance(weights, Tensor) and weights.dtype not in WEIGHT_DTYPES:
            raise TypeError(
                f"entropy_weights must be float32 or float64; got {weights.dtype}: weights "
                "underflow in 16 bits, and a mask is to be multiplied by weights"
            )
        check_tensor("entropy_weights", weights, WEIGHT_DTYPES)
        check_device("entropy_weights", weights, batch.log_probs)
        if weights.requires_grad and torch.is_grad_enabled():
            raise ValueError("entropy_weights requires grad, but is a constant: pass .detach()")
        if weights.shape == (batch.sequences,):
            weights = weights[:, None]
        elif not batch.is_per_token(weights):
            raise ValueError(
                f"entropy_weights must be (G,) = ({batch.sequences},), or one per token like "
                f"token_ids, {tuple(batch.log_probs.shape)}; got {tuple(weights.shape)}"
            )
        return self.coef * weights.to(torch.float32) if self.coef else None
