"""What the losses over rows check and make of their arguments, and what they return."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._batch import Batch
from .._call import make_call
from .._checks import (
    LOG_PROB_DTYPES,
    check_flag,
    check_mask,
    check_number,
    check_tensor,
    values_are_free,
)
from .._metrics import PolicyLossMetrics
from .._options import TokenLoss, kind_of
from .._rollout import NO_ROLLOUT, apply, correct, correction_sums, needs_sequences
from .entropy import EntropyBonus
from .records import RowSettings, TokenRows, VocabShard, make_rows


@dataclass(frozen=True)
class PolicyLossOutputs:
    """What the loss over logits or hidden states has seen on its way. All detached.

    - log_probs: float32, of the shape of ``token_ids``; 0 where mask == 0.
    - entropy: the same, of softmax(logits / temperature), in nats; None unless asked for.
    - sum_sq_probs: the same, sum_v p_v^2 of that softmax; None unless asked for. The squared norm
      of the score at the logits / temperature is 1 - 2 exp(log_probs) + sum_sq_probs.
    - metrics: None unless asked for.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    sum_sq_probs: Tensor | None = None
    metrics: PolicyLossMetrics | None = None


@dataclass(frozen=True)
class Wanted:
    """Which of :class:`PolicyLossOutputs` the caller asks for."""

    entropy: bool
    return_log_probs: bool
    return_metrics: bool
    sum_sq_probs: bool

    def __post_init__(self):
        for name in ("entropy", "return_log_probs", "return_metrics", "sum_sq_probs"):
            check_flag(getattr(self, name), name)

    @property
    def anything(self) -> bool:
        return self.entropy or self.return_log_probs or self.return_metrics or self.sum_sq_probs

    def outputs(
        self,
        results: tuple[Tensor, ...],
        shape: torch.Size,
        weights: Tensor,
        settings: RowSettings,
        rollout_sums: Tensor | None,
    ) -> Tensor | tuple[Tensor, PolicyLossOutputs]:
        """What the public function returns, of the results of its autograd Function."""
        loss, log_probs, entropy, sum_sq_probs, sums = results
        if rollout_sums is not None:
            sums = torch.cat([sums, rollout_sums])
        with_rollout = rollout_sums is not None or settings.with_rollout
        if not self.anything:
            return loss
        return loss, PolicyLossOutputs(
            log_probs.view(shape),
            entropy.view(shape) if self.entropy else None,
            sum_sq_probs.view(shape) if self.sum_sq_probs else None,
            PolicyLossMetrics.from_sums(sums, weights, settings.extra_names, with_rollout)
            if self.return_metrics
            else None,
        )


def make_row_call(
    name: str,
    logits_or_hidden: Tensor,
    token_ids: Tensor,
    arguments: dict,
    settings: RowSettings,
    *,
    vocabulary: int,
    wanted: Wanted,
    bonus: EntropyBonus,
) -> tuple[RowSettings, TokenRows, Tensor | None]:
    """Checks the tensors that have one entry a token or a sequence, and makes rows of them.

    ``arguments``: those of :func:`dl_norm.policy_loss` but the log-probs. The last result is what
    the metrics count of a rollout correction, if that is known by now and asked for.
    """
    like_log_probs = logits_or_hidden.detach()[..., 0]
    batch, terms = make_call(
        {**arguments, "log_probs": like_log_probs}, metrics=wanted.return_metrics
    )
    if terms.ratio_level != "token":
        raise ValueError(
            f"{name} has ratio_level='token' alone, got {terms.ratio_level!r}: the ratio of a "
            "sequence needs all its log-probs before the first gradient. Compute log-probs with a "
            "gradient and pass them to policy_loss"
        )
    batch, terms, rollout_sums = _with_rollout(name, batch, terms, wanted.return_metrics)
    check_token_ids(token_ids, batch.mask, like_log_probs, vocabulary)
    nothing_else = not wanted.anything and batch.ref_log_probs is None
    skip = nothing_else and kind_of(terms).scales_with_advantage
    rows = make_rows(batch, token_ids, skip, bonus.row_weights(batch))
    return replace(settings, terms=terms), rows, rollout_sums


def _with_rollout(
    name: str, batch: Batch, terms: TokenLoss, metrics: bool
) -> tuple[Batch, TokenLoss, Tensor | None]:
    """With the log-probs of the old policy the weights of a rollout correction are known before the
    pass, and what they drop need not go through the head. Without them the pass computes them."""
    if batch.rollout_log_probs is None:
        return batch, terms, None
    if batch.old_log_probs is not None:
        correction = correct(batch, terms.rollout)
        sums = correction_sums(batch, correction) if metrics else None
        return apply(batch, correction), terms._replace(rollout=NO_ROLLOUT), sums
    if needs_sequences(terms.rollout):
        raise ValueError(
            f"{name} without old_log_probs corrects by the log-probs that it computes, one token "
            "at a time: level='sequence' or 'geometric', a rejection over a sequence and a veto "
            "need all of the sequence before the first gradient. Pass old_log_probs, or compute "
            "log-probs with a gradient and pass them to policy_loss"
        )
    unscored = terms.rollout.unscored
    if unscored is not None:  # rows are float32, which may not hold what 16 bits have made of it
        values = batch.rollout_log_probs
        values = torch.where(values == unscored, torch.nan, values)
        batch = batch._replace(rollout_log_probs=values)
    return batch, terms, None


def row_settings(
    temperature: float, softcap: float | None, wanted: Wanted, shard: VocabShard
) -> RowSettings:
    """Settings of a pass that computes log-probs alone, until it has the terms of a loss."""
    temperature = check_number(temperature, "temperature", "temperature > 0", lambda v: v > 0)
    if softcap is not None:
        rule = "logit_softcap > 0 (or None)"
        softcap = check_number(softcap, "logit_softcap", rule, lambda v: v > 0)
    return RowSettings(
        temperature, softcap, metrics=wanted.return_metrics, entropy=wanted.entropy,
        sum_sq_probs=wanted.sum_sq_probs, shard=shard,
    )  # fmt: skip


def check_logits(name: str, tensor: Tensor, size: str, *, empty: bool = False) -> None:
    """``empty``: the last dimension may be."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if is_dtensor(tensor):
        raise ValueError(
            f"{name} is a DTensor: pass the tokens of this rank, {name}.to_local(), or if it is "
            "logits whose vocabulary is spread, tp_group"
        )
    if tensor.dtype not in LOG_PROB_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16; got {tensor.dtype}: use .float()"
        )
    if tensor.ndim not in (2, 3) or (tensor.shape[-1] == 0 and not empty):
        raise ValueError(
            f"{name} must be (B, T, {size}), or packed (N, {size}), with {size} > 0; got "
            f"{tuple(tensor.shape)}"
        )


def is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # an import of DTensor would cost everyone


def check_token_ids(token_ids: Tensor, mask: Tensor | None, like: Tensor, vocabulary: int) -> None:
    """``like``: a tensor of the shape and on the device that both must have.

    On a GPU an id outside the vocabulary makes the loss NaN instead of raising.
    """
    if isinstance(token_ids, Tensor) and token_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"token_ids must be int64 or int32, got {token_ids.dtype}")
    check_tensor("token_ids", token_ids, (torch.int64, torch.int32))
    for name, tensor in (("token_ids", token_ids), ("mask", mask)):
        if tensor is None:
            continue
        if isinstance(tensor, Tensor) and tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device}, not on {like.device}: move it there")
        if name == "mask":
            check_mask(name, tensor, like)
        if tensor.shape != like.shape:
            raise ValueError(f"{name} must be {tuple(like.shape)}, got {tuple(tensor.shape)}")
    if values_are_free(token_ids):
        outside = (token_ids < 0) | (token_ids >= vocabulary)
        if mask is not None:
            outside &= mask != 0
        if bool(outside.any()):
            raise ValueError(
                f"token_ids must be in [0, V = {vocabulary}) where mask != 0, got "
                f"{int(token_ids[outside][0])}"
            )
