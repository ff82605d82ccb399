"""Input checks shared by the public functions. None of them synchronises a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

T = TypeVar("T")
LOG_PROB_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REAL_DTYPES = (*LOG_PROB_DTYPES, torch.float64)


def check_number(value, name: str, rule: str, holds: Callable[[float], bool]) -> float:
    """``value`` as a Python number; those of NumPy are taken too."""
    value = check_bound(value, name)
    # Not math.isfinite: torch.compile may hand a symbolic float.
    if not (-math.inf < value < math.inf and holds(value)):
        raise ValueError(f"expected {rule} and finite, got {name}={value}")
    return value


def check_bound(value, name: str) -> float:
    """As :func:`check_number`, of what may be infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: {value!r}")
    return value.item() if isinstance(value, np.generic) else value


def check_flag(value, name: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}: {value!r}")


def check_choice(value, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {names}; got {value!r}")


def values_are_free(tensor: Tensor) -> bool:
    """Reading a value costs no sync on the CPU; while tracing there is none to read."""
    return tensor.device.type == "cpu" and not has_no_values(tensor)


def has_no_values(tensor: Tensor) -> bool:
    """Where there are shapes alone: traced, fake or meta tensors go through an operator's fake."""
    return torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor)


def check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Checks that ``tensor`` is a plain one of one of the dtypes."""
    _check_kind(name, tensor)
    if tensor.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {names}; got {tensor.dtype}: convert with .float()")


def check_mask(name: str, mask: Tensor, like: Tensor) -> None:
    """Checks a mask of tokens or sequences, and on the CPU its values: 0 where nothing counts.

    Elsewhere a value that is negative or NaN cannot raise without a sync.
    """
    _check_kind(name, mask)
    if mask.is_complex():
        raise TypeError(f"{name} must be bool, integer or floating point, got {mask.dtype}")
    check_device(name, mask, like)
    if mask.dtype in (torch.bool, torch.uint8) or not values_are_free(mask) or mask.numel() == 0:
        return
    least = mask.min().item()  # NaN if there is one
    if not least >= 0:
        what = {-math.inf: "an additive attention mask", -100: "labels"}.get(least, "no mask")
        raise ValueError(
            f"{name} must be 0 where a position does not count and positive where it does, got "
            f"{least}: that is {what}; pass a bool mask, such as labels != -100"
        )


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name} is on {tensor.device}, log_probs on {like.device}: move {name} there"
        )


def check_cu_seqlens(cu_seqlens: Tensor, stream: Tensor | None = None) -> None:
    """Checks offsets, against the packed ``stream`` (N, ...) that they cut if it is given."""
    _check_kind("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be (G + 1,), got {tuple(cu_seqlens.shape)}")
    if stream is None:
        return
    check_device("cu_seqlens", cu_seqlens, stream)
    if values_are_free(cu_seqlens):
        first, last, tokens = int(cu_seqlens[0]), int(cu_seqlens[-1]), stream.shape[0]
        if first != 0 or last != tokens or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to N = {tokens} without falling, got "
                f"[{first}, ..., {last}]"
            )


def check_no_transform(name: str) -> None:
    """Refuses torch.func: a gradient that is final in the forward pass cannot be transformed."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name} cannot run under torch.func (grad, vmap, ...): its gradient is computed in "
            "the forward pass. dl_norm.reference.policy_loss can"
        )


def check_first_derivative(name: str) -> None:
    """Refuses a second derivative of a gradient that is computed in the forward pass."""
    # Gradients are enabled in a backward pass exactly when create_graph=True asks for them.
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative: its gradient is computed in the forward pass. Use "
            "dl_norm.reference.policy_loss of the log-probs with create_graph=True"
        )


def one_gradient(name: str, grad_output: Tensor, scale: Callable[[Tensor], T]) -> T:
    """``scale(grad_output)``; says in words that it cannot be done to several at once."""
    if torch.compiler.is_compiling():
        return scale(grad_output)
    try:
        return scale(grad_output)
    except RuntimeError as error:
        if "Batched" not in str(torch._C._dispatch_keys(grad_output)):
            raise
        raise RuntimeError(
            f"{name} takes one gradient at a time, not is_grads_batched=True: it scales the "
            "stored gradient. Use dl_norm.reference.policy_loss"
        ) from error


def _check_kind(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}: use .to_dense()")
