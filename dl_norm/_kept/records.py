"""What the forward pass over kept sets hands to the passes that make its gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class KeptLogits:
    """float32; the probability of entry e of token t is exp((logits[e] - references[t]) /
    temperature - log_totals[t])."""

    logits: Tensor  # (E,) after the soft cap, before the temperature
    references: Tensor  # (N,) the largest logit of each token
    log_totals: Tensor  # (N,)
    log_probs: Tensor  # (N,) 0 where the token does not count or its set is itself, NaN where bad
    entropy: Tensor | None  # (N,) the same
    sum_sq_probs: Tensor | None  # (N,) the same, but 1 where the set is the token itself
