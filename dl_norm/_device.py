"""Where the kernels run: which implementation a tensor gets, and what the kernels are made for.

Triton's active driver is asked, not a list of device types: whatever driver is set (of a GPU, or
one that executes compiled kernels over CPU tensors), the rest of the package is the same.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

IMPLEMENTATIONS = ("triton", "torch")
HAS_TRITON = find_spec("triton") is not None


def implementation_for(impl: str | None, tensor: Tensor) -> str:
    """ "triton" or "torch" for the public argument ``impl``; None: Triton for a GPU's tensors."""
    on_gpu = tensor.device.type in ("cuda", "xpu")  # ROCm devices are "cuda" too
    if impl is None:
        return "triton" if on_gpu else "torch"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be None or one of {', '.join(IMPLEMENTATIONS)}; got {impl!r}")
    if impl == "torch":
        return impl
    if not HAS_TRITON:
        raise ValueError(
            'impl="triton" needs Triton, which is not installed: pip install triton, or pass '
            'impl="torch"'
        )
    if not (on_gpu or _kernels_take(tensor.device.type)):
        raise ValueError(
            f'impl="triton" got tensors on {tensor.device}: move them to a GPU, use '
            'impl="torch", or set TRITON_INTERPRET=1 before importing dl_norm'
        )
    return impl


def interpreted() -> bool:
    """Whether the kernels were made for Triton's interpreter; that is fixed at their import."""
    from triton.runtime.interpreter import InterpretedFunction

    from .kernels.policy_loss import policy_loss_fwd_kernel

    return isinstance(policy_loss_fwd_kernel, InterpretedFunction)


def target() -> GPUTarget:
    """What the kernels are compiled for."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    if interpreted():
        return GPUTarget("cpu", "", 32)
    return cast(GPUTarget, driver.active.get_current_target())


def _kernels_take(device_type: str) -> bool:
    from triton.runtime import driver

    if interpreted():
        return True
    try:
        return cast(torch.device, driver.active.get_active_torch_device()).type == device_type
    except RuntimeError:  # no driver
        return False


# As torch.compiler.assume_constant_result does, which imports torch._dynamo: that takes a second.
_kernels_take._dynamo_marked_constant = True  # type: ignore
