"""The tensors of one call of a loss, checked once."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import (
    LOG_PROB_DTYPES,
    REAL_DTYPES,
    check_cu_seqlens,
    check_device,
    check_mask,
    check_tensor,
    values_are_free,
)

WEIGHT_DTYPES = (torch.float32, torch.float64)


class Batch(NamedTuple):
    """What operators, launchers and both implementations take whole.

    A value per token has the shape of ``log_probs``, (B, T) or packed (N,); a value per sequence
    is (G, 1), so that the two are never mistaken for each other.
    """

    log_probs: Tensor
    old_log_probs: Tensor | None
    ref_log_probs: Tensor | None  # None unless a KL term or its metric is asked for
    advantages: Tensor  # per token or per sequence
    mask: Tensor | None
    policy_weights: Tensor | None  # e q w of the formula; float, or bool: kept or dropped
    weights: Tensor  # (G,) float32 (float64 in the reference of float64 log-probs)
    cu_seqlens: Tensor | None
    rollout_log_probs: Tensor | None = None

    @property
    def sequences(self) -> int:
        return self.weights.shape[0]

    def is_per_token(self, values: Tensor) -> bool:
        # torch.compile has a symbolic answer for dynamic shapes, and two of those do not compare.
        return True if values.shape == self.log_probs.shape else False  # noqa: SIM210

    def per_token(self, values: Tensor) -> Tensor:
        """``values`` so that they broadcast against the tokens."""
        if self.cu_seqlens is None or self.is_per_token(values):
            return values
        return spread(values[:, 0], self.cu_seqlens, self.log_probs.shape[0])

    def counted(self) -> Tensor:
        """bool, like the tokens."""
        if self.mask is None:
            return torch.ones_like(self.log_probs, dtype=torch.bool)
        return self.mask if self.mask.dtype == torch.bool else self.mask != 0

    def sequence_sums(self, values: Tensor) -> Tensor:
        """(G,) sums of a value per token, in float64 where the device has it."""
        wide = values if values.device.type == "mps" else values.double()
        if self.cu_seqlens is None:
            return wide.sum(-1)
        # The offsets are checked where that costs no sync; elsewhere the kernels answer with NaN.
        lengths = self.cu_seqlens.diff().long()
        return torch.segment_reduce(wide, "sum", lengths=lengths, unsafe=True)

    def sequence_means(self, values: Tensor) -> Tensor:
        """Means over the counted tokens, per sequence, of what is 0 at all others."""
        lengths = self.sequence_sums(self.counted()).clamp(min=1)
        return (self.sequence_sums(values) / lengths).float()[:, None]


def spread(values: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(N,) of (G,) values: those of each token's sequence."""
    if values_are_free(cu_seqlens):
        return values.repeat_interleave(cu_seqlens.diff(), output_size=tokens)
    if values.shape[0] == 0:
        return values.new_zeros(tokens)
    # Offsets that do not span the stream cannot raise without a sync, but nothing is read out of
    # bounds.
    ends = cu_seqlens[1:].contiguous()
    positions = torch.arange(tokens, dtype=ends.dtype, device=ends.device)
    sequence = torch.searchsorted(ends, positions, right=True).clamp_(max=values.shape[0] - 1)
    return values[sequence]


def make_batch(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    dtypes: tuple[torch.dtype, ...] = LOG_PROB_DTYPES,
    *,
    cu_seqlens: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    sequence_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    rollout_mean_weight: Tensor | None = None,
) -> Batch:
    """Checks types, dtypes, devices, layouts and shapes, and on the CPU what values can tell.

    The tensors that mean one factor of the policy term become ``policy_weights``.
    """
    check_tensor("log_probs", log_probs, dtypes)
    sequences = _check_layout(log_probs, mask, cu_seqlens)
    packed = cu_seqlens is not None

    def per_token(name: str, values: Tensor | None) -> Tensor | None:
        if values is not None:
            _check_constant(name, values, log_probs)
            _check_shape(name, values, log_probs.shape, None, packed)
        return values

    def either(name: str, values: Tensor) -> Tensor:
        _check_constant(name, values, log_probs)
        _check_shape(name, values, log_probs.shape, sequences, packed)
        return values if values.shape != (sequences,) else values[:, None]

    old_log_probs = per_token("old_log_probs", old_log_probs)
    ref_log_probs = per_token("ref_log_probs", ref_log_probs)
    advantages = either("advantages", advantages)
    if rollout_weights is not None:
        rollout_weights = either("rollout_weights", rollout_weights)
    rollout_log_probs = per_token("rollout_log_probs", rollout_log_probs)
    _check_rollout(rollout_weights, rollout_log_probs, rollout_mean_weight, log_probs)
    _check_weights(weights, log_probs, sequences, packed)
    for name, tensor in (("mask", mask), ("entropy_mask", entropy_mask)):
        if tensor is not None:
            check_mask(name, tensor, log_probs)
            _check_shape(name, tensor, log_probs.shape, None, packed)
    if sequence_mask is not None:
        check_mask("sequence_mask", sequence_mask, log_probs)
        if sequence_mask.shape != (sequences,):
            raise ValueError(
                f"sequence_mask must be ({_count(packed)},) = ({sequences},), got "
                f"{tuple(sequence_mask.shape)}: a mask of tokens is an entropy_mask"
            )
        sequence_mask = sequence_mask[:, None]
    weights_dtype = torch.float64 if log_probs.dtype == torch.float64 else torch.float32
    if weights.dtype != weights_dtype:
        weights = weights.to(weights_dtype)
    batch = Batch(
        log_probs, old_log_probs, ref_log_probs, advantages, mask, rollout_weights, weights,
        cu_seqlens, rollout_log_probs,
    )  # fmt: skip
    if rollout_mean_weight is not None:
        factor = rollout_mean_weight.to(weights_dtype).reciprocal()
        batch = batch._replace(policy_weights=factor.expand(sequences, 1))
    if values_are_free(weights) and values_are_free(log_probs):
        _check_weights_fit(batch)
    if entropy_mask is sequence_mask is None:
        return batch
    return _with_masks(batch, entropy_mask, sequence_mask)


def unweighted_batch(
    log_probs: Tensor, *, advantages: Tensor | None = None, **tensors: Tensor | None
) -> Batch:
    """One whose sequences all weigh 1, of any real dtype: for what is known before the loss.

    ``tensors``: of :func:`make_batch`. advantages None: 1, where they have no part.
    """
    check_tensor("log_probs", log_probs, REAL_DTYPES)
    sequences = _check_layout(log_probs, tensors.get("mask"), tensors.get("cu_seqlens"))
    # Whatever the default dtype is.
    ones = torch.ones(sequences, dtype=torch.float32, device=log_probs.device)
    return make_batch(
        log_probs,
        advantages=ones if advantages is None else advantages,
        weights=ones,
        dtypes=REAL_DTYPES,
        **{"old_log_probs": None, **tensors},  # type: ignore
    )


def _with_masks(batch: Batch, entropy_mask: Tensor | None, sequence_mask: Tensor | None) -> Batch:
    """The rollout weights, 0 where a mask drops the policy term; without them what is kept."""
    weights = batch.policy_weights
    for mask in (sequence_mask, entropy_mask):
        if mask is None:
            continue
        kept = mask if mask.dtype == torch.bool else mask != 0
        if weights is None:
            weights = kept
            continue
        if batch.is_per_token(weights) != batch.is_per_token(kept):
            weights, kept = batch.per_token(weights), batch.per_token(kept)
        weights = weights & kept if weights.dtype == torch.bool else torch.where(kept, weights, 0)
    return batch._replace(policy_weights=weights)


def _check_layout(log_probs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """Returns the number of sequences."""
    shape = log_probs.shape
    if cu_seqlens is None:
        if log_probs.ndim != 2:
            raise ValueError(
                f"log_probs must be (B, T), or (N,) with cu_seqlens; got {tuple(shape)} and no "
                "cu_seqlens"
            )
        if mask is None:
            raise ValueError("mask is required for padded (B, T) input: pass a (B, T) tensor")
        return shape[0]
    if log_probs.ndim != 1:
        raise ValueError(
            f"with cu_seqlens the tokens must be packed in one dimension, (N,); got "
            f"{tuple(shape)}: drop cu_seqlens for padded input"
        )
    check_cu_seqlens(cu_seqlens, log_probs)
    return cu_seqlens.shape[0] - 1


def _check_constant(name: str, tensor: Tensor, log_probs: Tensor) -> None:
    check_tensor(name, tensor, REAL_DTYPES)
    check_device(name, tensor, log_probs)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but policy_loss is differentiable with respect to "
            f"log_probs alone: pass {name}.detach()"
        )


def _check_rollout(
    rollout_weights: Tensor | None,
    rollout_log_probs: Tensor | None,
    rollout_mean_weight: Tensor | None,
    log_probs: Tensor,
) -> None:
    if rollout_weights is not None and rollout_log_probs is not None:
        raise ValueError(
            "rollout_weights are the finished weights that rollout_log_probs would be made into: "
            "pass one of them"
        )
    if rollout_mean_weight is None:
        return
    if rollout_log_probs is None:
        raise ValueError(
            "rollout_mean_weight divides the weights that are made of rollout_log_probs, and there "
            "are none: pass them, or divide rollout_weights yourself"
        )
    _check_constant("rollout_mean_weight", rollout_mean_weight, log_probs)
    if rollout_mean_weight.ndim != 0:
        raise ValueError(
            "rollout_mean_weight must be a 0-dim tensor, what dl_norm.rollout_mean_weight returns; "
            f"got {tuple(rollout_mean_weight.shape)}"
        )


def _count(packed: bool) -> str:
    return "G" if packed else "B"


def _check_shape(
    name: str, tensor: Tensor, tokens: torch.Size, sequences: int | None, packed: bool
) -> None:
    """The shape of the tokens, or (G,) where there may be one value a sequence."""
    if tensor.shape == tokens or (sequences is not None and tensor.shape == (sequences,)):
        return
    # Formatted here alone: formatting a symbolic size makes torch.compile specialise on it.
    expected, remedy = f"{tuple(tokens)} like log_probs", ""
    if sequences is not None:
        expected += f" or ({_count(packed)},) = ({sequences},)"
        if tensor.shape == (sequences, 1):
            remedy = f": pass {name}.squeeze(-1)"
    raise ValueError(f"{name} must be {expected}, got {tuple(tensor.shape)}{remedy}")


def _check_weights(weights: Tensor, log_probs: Tensor, sequences: int, packed: bool) -> None:
    if isinstance(weights, Tensor) and weights.dtype not in WEIGHT_DTYPES:
        remedy = "they underflow in 16 bits: use what sequence_weights returns, in float32"
        if weights.dtype not in LOG_PROB_DTYPES:
            remedy = "of lengths make weights: sequence_weights(lengths, ...)"
        raise TypeError(f"weights must be float32 or float64; got {weights.dtype}: {remedy}")
    _check_constant("weights", weights, log_probs)
    if weights.shape != (sequences,):
        remedy = ": pass weights.squeeze(-1)" if weights.shape == (sequences, 1) else ""
        raise ValueError(
            f"weights must be ({_count(packed)},) = ({sequences},), got "
            f"{tuple(weights.shape)}{remedy}"
        )


def _check_weights_fit(batch: Batch) -> None:
    """What weights alone tell of a mistake; the tokens are counted only if they do."""
    if batch.sequences == 0:
        return
    least, largest = (value.item() for value in batch.weights.aminmax())
    if largest > 1:
        lengths = batch.sequence_sums(batch.counted())
        if torch.equal(lengths, batch.weights.to(lengths.dtype)):
            raise ValueError(
                "weights are the lengths themselves: pass sequence_weights(lengths, ...)"
            )
    if least == 0:
        dropped = (batch.weights == 0) & (batch.sequence_sums(batch.counted()) > 0)
        if bool(dropped.any()):
            warnings.warn(
                f"sequences {dropped.nonzero()[:, 0].tolist()[:8]} have tokens that count but "
                "weight 0, so they have no part in the loss. Were the weights computed from the "
                "lengths of another mask? To drop sequences on purpose, pass a mask that is 0 "
                "there",
                stacklevel=4,
            )
