"""How the tokens of a call lie, and the check of each of its other tensors against that."""

from __future__ import annotations

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
)

WEIGHT_DTYPES = (torch.float32, torch.float64)


class Layout(NamedTuple):
    """Padded (B, T), where G = B, or packed (N,)."""

    log_probs: Tensor
    sequences: int  # G
    packed: bool


def layout_of(log_probs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Layout:
    shape = log_probs.shape
    if cu_seqlens is None:
        if log_probs.ndim != 2:
            raise ValueError(
                f"log_probs must be (B, T), or (N,) with cu_seqlens; got {tuple(shape)} and no "
                "cu_seqlens"
            )
        if mask is None:
            raise ValueError("mask is required for padded (B, T) input: pass a (B, T) tensor")
        return Layout(log_probs, shape[0], False)
    if log_probs.ndim != 1:
        raise ValueError(
            f"with cu_seqlens the tokens must be packed in one dimension, (N,); got "
            f"{tuple(shape)}: drop cu_seqlens for padded input"
        )
    check_cu_seqlens(cu_seqlens, log_probs)
    return Layout(log_probs, cu_seqlens.shape[0] - 1, True)


# A check takes a name, what came and the layout, and returns it in the shape that a Batch has.


def per_token(name: str, values: Tensor, layout: Layout) -> Tensor:
    _check_constant(name, values, layout)
    _check_shape(name, values, layout, of_sequences=False)
    return values


def either(name: str, values: Tensor, layout: Layout) -> Tensor:
    """One value a token, or (G,): one a sequence."""
    _check_constant(name, values, layout)
    _check_shape(name, values, layout, of_sequences=True)
    return values if values.shape != (layout.sequences,) else values[:, None]


def mask_of_tokens(name: str, mask: Tensor, layout: Layout) -> Tensor:
    check_mask(name, mask, layout.log_probs)
    _check_shape(name, mask, layout, of_sequences=False)
    return mask


def mask_of_sequences(name: str, mask: Tensor, layout: Layout) -> Tensor:
    check_mask(name, mask, layout.log_probs)
    if mask.shape != (layout.sequences,):
        raise ValueError(
            f"{name} must be {_sequences(layout)}, got {tuple(mask.shape)}: a mask of tokens is an "
            "entropy_mask"
        )
    return mask[:, None]


def sequence_weights(name: str, weights: Tensor, layout: Layout) -> Tensor:
    """(G,), in the dtype of a Batch's."""
    if isinstance(weights, Tensor) and weights.dtype not in WEIGHT_DTYPES:
        remedy = "they underflow in 16 bits: use what sequence_weights returns, in float32"
        if weights.dtype not in LOG_PROB_DTYPES:
            remedy = "of lengths make weights: sequence_weights(lengths, ...)"
        raise TypeError(f"{name} must be float32 or float64; got {weights.dtype}: {remedy}")
    _check_constant(name, weights, layout)
    if weights.shape != (layout.sequences,):
        remedy = f": pass {name}.squeeze(-1)" if weights.shape == (layout.sequences, 1) else ""
        raise ValueError(f"{name} must be {_sequences(layout)}, got {tuple(weights.shape)}{remedy}")
    return weights.to(weights_dtype(layout))


def mean_weight(name: str, mean: Tensor, layout: Layout) -> Tensor:
    _check_constant(name, mean, layout)
    if mean.ndim != 0:
        raise ValueError(
            f"{name} must be a 0-dim tensor, what dl_norm.rollout_mean_weight returns; got "
            f"{tuple(mean.shape)}"
        )
    return mean.to(weights_dtype(layout))


def weights_dtype(layout: Layout) -> torch.dtype:
    return torch.float64 if layout.log_probs.dtype == torch.float64 else torch.float32


def _check_constant(name: str, tensor: Tensor, layout: Layout) -> None:
    check_tensor(name, tensor, REAL_DTYPES)
    check_device(name, tensor, layout.log_probs)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but policy_loss is differentiable with respect to "
            f"log_probs alone: pass {name}.detach()"
        )


def _check_shape(name: str, tensor: Tensor, layout: Layout, *, of_sequences: bool) -> None:
    """The shape of the tokens, or (G,) where there may be one value a sequence."""
    tokens, sequences = layout.log_probs.shape, layout.sequences
    if tensor.shape == tokens or (of_sequences and tensor.shape == (sequences,)):
        return
    # Formatted here alone: formatting a symbolic size makes torch.compile specialise on it.
    expected, remedy = f"{tuple(tokens)} like log_probs", ""
    if of_sequences:
        expected += f" or {_sequences(layout)}"
        if tensor.shape == (sequences, 1):
            remedy = f": pass {name}.squeeze(-1)"
    raise ValueError(f"{name} must be {expected}, got {tuple(tensor.shape)}{remedy}")


def _sequences(layout: Layout) -> str:
    return f"({'G' if layout.packed else 'B'},) = ({layout.sequences},)"
