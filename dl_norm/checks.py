"""Input checks shared by the public functions. None of them synchronises a device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

LOG_PROB_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_number(value, name: str, rule: str, holds: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    # Not math.isfinite: torch.compile may hand a symbolic float.
    if not (-math.inf < value < math.inf and holds(value)):
        raise ValueError(f"expected {rule} and finite, got {name}={value}")


def values_are_free(tensor: Tensor) -> bool:
    """Reading a value costs no sync on the CPU; while tracing there is none to read."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_policy_loss_inputs(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ref_log_probs: Tensor | None,
    rollout_weights: Tensor | None,
    dtypes: tuple[torch.dtype, ...] = LOG_PROB_DTYPES,
    *,
    entropy_mask: Tensor | None = None,
    sequence_mask: Tensor | None = None,
) -> None:
    """Checks types, dtypes, devices and shapes of the tensors of a policy loss."""
    check_tensor("log_probs", log_probs, dtypes)
    shape = log_probs.shape
    if cu_seqlens is None:
        if log_probs.ndim != 2:
            raise ValueError(
                f"log_probs must be (B, T), or (N,) with cu_seqlens; got {tuple(shape)} and no "
                "cu_seqlens"
            )
        if mask is None:
            raise ValueError("mask is required for padded (B, T) input: pass a (B, T) tensor")
        sequences = shape[0]
    else:
        if log_probs.ndim != 1:
            raise ValueError(
                f"with cu_seqlens the tokens must be packed in one dimension, (N,); got "
                f"{tuple(shape)}: drop cu_seqlens for padded input"
            )
        check_cu_seqlens(cu_seqlens, log_probs)
        sequences = cu_seqlens.shape[0] - 1
    # (name, tensor, may be per token, may be per sequence)
    constants = (
        ("old_log_probs", old_log_probs, True, False),
        ("ref_log_probs", ref_log_probs, True, False),
        ("advantages", advantages, True, True),
        ("rollout_weights", rollout_weights, True, True),
        ("weights", weights, False, True),
    )
    for name, tensor, per_token, by_sequence in constants:
        if tensor is None:
            if name in ("advantages", "weights"):
                raise TypeError(f"{name} must be a tensor, got None")
            continue
        check_tensor(name, tensor, (*LOG_PROB_DTYPES, torch.float64))
        _check_device(name, tensor, log_probs)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, but policy_loss is differentiable with respect to "
                f"log_probs alone: pass {name}.detach()"
            )
        if not (per_token and tensor.shape == shape) and not (
            by_sequence and tensor.shape == (sequences,)
        ):
            # Formatted here alone: formatting a symbolic size makes torch.compile specialise on it.
            expected = [f"{tuple(shape)} like log_probs"] if per_token else []
            if by_sequence:
                expected.append(f"({'B' if cu_seqlens is None else 'G'},) = ({sequences},)")
            raise ValueError(f"{name} must be {' or '.join(expected)}, got {tuple(tensor.shape)}")
    for name, tensor in (("mask", mask), ("entropy_mask", entropy_mask)):
        if tensor is None:
            continue
        _check_mask(name, tensor, log_probs)
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must be {tuple(shape)} like log_probs, got {tuple(tensor.shape)}"
            )
    if sequence_mask is not None:
        _check_mask("sequence_mask", sequence_mask, log_probs)
        if sequence_mask.shape != (sequences,):
            raise ValueError(
                f"sequence_mask must be ({'B' if cu_seqlens is None else 'G'},) = ({sequences},), "
                f"got {tuple(sequence_mask.shape)}: a mask of tokens is an entropy_mask"
            )


def _check_mask(name: str, mask: Tensor, stream: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    if mask.is_complex():
        raise TypeError(f"{name} must be bool, integer or floating point, got {mask.dtype}")
    _check_device(name, mask, stream)


def check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {names}; got {tensor.dtype}: convert with .float()")


def _check_device(name: str, tensor: Tensor, stream: Tensor) -> None:
    if tensor.device != stream.device:
        raise ValueError(
            f"{name} is on {tensor.device}, log_probs on {stream.device}: move {name} there"
        )


def check_cu_seqlens(cu_seqlens: Tensor, stream: Tensor | None = None) -> None:
    """Checks offsets, against the packed ``stream`` (N, ...) that they cut if it is given."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be (G + 1,), got {tuple(cu_seqlens.shape)}")
    if stream is None:
        return
    _check_device("cu_seqlens", cu_seqlens, stream)
    if values_are_free(cu_seqlens):
        first, last, tokens = int(cu_seqlens[0]), int(cu_seqlens[-1]), stream.shape[0]
        if first != 0 or last != tokens or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to N = {tokens} without falling, got "
                f"[{first}, ..., {last}]"
            )
