"""Executes the PTX of Triton's real JIT path on a CPU, over the memory of CPU tensors.

    from ci.ptx import driver

    active = driver.install("sm_90")  # TRITON_INTERPRET must not be set
    dl_norm.policy_loss(..., impl="triton").backward()  # host code unchanged
    active.launches[0].instructions

`driver` is a Triton driver whose launches run here; `parser` reads PTX, `translate` turns every
basic block into a Python function of NumPy operations by the table of `instructions`, `execute`
runs these over all threads of many CTAs at a time, `memory` checks what they touch.

A launch raises `PtxError` for an access outside the passed view or misaligned, a read of memory
that nothing wrote, a store to an input, a race between threads of a CTA without a barrier or
between CTAs, a barrier or warp-wide instruction that not all threads reach, and an instruction that
is not known. Not modelled: ptxas, caches, time, orders of memory weaker than barriers, clusters,
tensor cores, TMA.
"""

from .parser import PtxError

__all__ = ["PtxError"]
