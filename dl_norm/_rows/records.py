"""The records of the losses over rows of logits: of their tokens, settings and outputs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .._batch import Batch
from .._checks import values_are_free
from .._options import TokenLoss, kind_of, num_sums
from .._rollout import NO_ROLLOUT


@dataclass(frozen=True)
class TokenRows:
    """Flat (N,) contiguous tensors; float32 where not said otherwise.

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
    policy_weights: Tensor | None = None  # 0 where there is no policy term
    rollout_log_probs: Tensor | None = None  # of a correction by the log-probs of the pass
    # What the entropy is multiplied by and taken off the loss.
    entropy_weights: Tensor | None = None

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

    def as_batch(self, log_probs: Tensor) -> Batch:
        """Every row, all active, as a sequence of one token."""
        assert self.advantages is not None and self.weights is not None

        def column(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[:, None]

        return Batch(
            log_probs[:, None], column(self.old_log_probs), column(self.ref_log_probs),
            self.advantages[:, None], None, column(self.policy_weights), self.weights, None,
            column(self.rollout_log_probs),
        )  # fmt: skip


# Those of float32.
_NUMBERS = tuple(field.name for field in fields(TokenRows)[2:])


class VocabShard(NamedTuple):
    """The part of a vocabulary that is here, where it is spread over the processes of a group.

    group: its name; "" where all of the vocabulary is here, and the rest means nothing.
    """

    group: str = ""
    first: int = 0  # the id of the first token that is here
    vocabulary: int = 0  # how many there are in all
    partial_hidden_grad: bool = False

    @property
    def spread(self) -> bool:
        return self.group != ""


WHOLE = VocabShard()


@dataclass(frozen=True)
class RowSettings:
    """Everything of a pass over rows of logits that is not a tensor.

    terms: of the token loss; None for log-probs alone, without loss and gradient.
    """

    temperature: float = 1.0
    softcap: float | None = None
    terms: TokenLoss | None = None
    metrics: bool = False
    entropy: bool = False
    sum_sq_probs: bool = False
    shard: VocabShard = WHOLE

    @property
    def extra_names(self) -> tuple[str, ...]:
        return () if self.terms is None else kind_of(self.terms).extra_names

    @property
    def with_rollout(self) -> bool:
        """Whether the pass counts what a rollout correction does."""
        return self.terms is not None and self.terms.rollout != NO_ROLLOUT


def with_entropy(rows: TokenRows, settings: RowSettings) -> bool:
    """It is an output, or in the loss."""
    return settings.entropy or rows.entropy_weights is not None


@dataclass(frozen=True)
class RowOutputs:
    """float32 results of N rows: log_probs (N,), entropy and sum_sq_probs (N,) or None, and
    partials, (sums, N): addends of the loss, then of the metrics in their order, of which one is a
    maximum."""

    log_probs: Tensor
    entropy: Tensor | None
    sum_sq_probs: Tensor | None
    partials: Tensor

    @classmethod
    def zeros(cls, rows: int, settings: RowSettings, device: torch.device) -> RowOutputs:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        sums = 0 if settings.terms is None else 1
        if settings.terms is not None and settings.metrics:
            sums += num_sums(settings.terms)
        entropy, sum_sq_probs = (
            zeros(rows) if wanted else None for wanted in (settings.entropy, settings.sum_sq_probs)
        )
        return cls(zeros(rows), entropy, sum_sq_probs, zeros(sums, rows))


def make_rows(
    batch: Batch,
    token_ids: Tensor,
    skip_zero_advantages: bool,
    entropy_weights: Tensor | None = None,
) -> TokenRows:
    """Spreads per-sequence values over the tokens; everything is contiguous, as a kernel reads it.

    ``skip_zero_advantages``: tokens of advantage 0, or without a policy term, are inactive too,
    unless they have an entropy weight. That term and its gradient are exactly 0, so this is right
    where nothing else of them is asked for.
    """

    def flat(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return batch.per_token(values).expand(token_ids.shape).reshape(-1).to(dtype).contiguous()

    weights = batch.weights[:, None]
    if batch.cu_seqlens is not None and not values_are_free(batch.cu_seqlens):
        # Offsets that do not span the stream cannot raise without a sync: the loss is NaN.
        spans = (batch.cu_seqlens[0] == 0) & (batch.cu_seqlens[-1] == token_ids.shape[0])
        weights = torch.where(spans, weights, torch.nan)
    given = {**batch._asdict(), "weights": weights, "entropy_weights": entropy_weights}
    rows = {name: flat(given[name]) for name in _NUMBERS if given[name] is not None}
    counted = flat(batch.counted(), torch.bool)
    for name in ("advantages", "weights", "entropy_weights"):
        if name in rows:
            rows[name] = torch.where(counted, rows[name], 0.0)
    active = counted
    if skip_zero_advantages:
        needed = rows["advantages"] != 0
        if "policy_weights" in rows:
            needed = needed & (rows["policy_weights"] != 0)
        if "entropy_weights" in rows:
            needed = needed | (rows["entropy_weights"] != 0)
        active = active & needed
    return TokenRows(token_ids.reshape(-1).contiguous(), active, **rows)
