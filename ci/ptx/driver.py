"""A Triton driver whose launches execute PTX over the memory of CPU tensors."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as triton_driver

from . import execute, instructions, memory
from .parser import PtxError

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
# Kernels of this package store to no memory that holds values but through arguments (or a tuple's
# fields) of these names. Those of others may: the peers' kernels write gradients over logits.
PACKAGE = "dl_norm"
IN_PLACE = {"GRAD", "OUT"}
# Passed as the one element before the first logit that is 16-byte aligned.
EXTENDS = {"LOGITS"}
ALLOCATIONS = (
    (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"),
)  # fmt: skip


class Driver:
    """What Triton asks of a driver, and the launches since the list was last cleared."""

    def __init__(self, target: str):
        self.target = GPUTarget("cuda", TARGETS[target], 32)
        self.launches: list[execute.Launch] = []
        self.utils = self  # load_binary, get_device_properties
        self.last: int | None = None  # to run that many programs of a grid alone, the last ones
        self.names: list[str] = []  # of the arguments of the last launch
        self.replace: Callable[[execute.Kernel], execute.Kernel] = lambda kernel: kernel

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton's key for what is compiled

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """module, function, registers, spills, most threads"""
        return None, _kernel(binary.decode(), shared), 0, 0, 1024

    def launcher_cls(self, source, metadata):
        signature = dict(source.signature)
        ours = source.fn.fn.__module__.startswith(PACKAGE)
        if metadata.num_ctas != 1 or metadata.global_scratch_size:
            raise PtxError(f"{metadata.name}: clusters and scratch memory are not modelled")

        def launch(x, y, z, stream, kernel, packed, launch_metadata, enter, leave, *values):
            arguments = zip(signature.items(), values, strict=True)
            flat = [a for (name, kind), value in arguments for a in _flatten(name, kind, value)]
            self.names = [name for name, _ in flat]
            kernel = self.replace(kernel)  # tests break kernels
            self.launches.append(_launch(kernel, (x, y, z), flat, ours, self.last))

        return launch


@functools.lru_cache(None)
def _kernel(ptx: str, shared: int) -> execute.Kernel:
    return execute.Kernel(ptx, shared)


def _flatten(name: str, kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """What the PTX has a parameter for: no constants, of tuples their fields."""
    if isinstance(kind, (tuple, list)):
        fields = getattr(type(value), "_fields", range(len(value)))
        for field, its, part in zip(fields, kind, value, strict=True):
            yield from _flatten(f"{name}.{field}", its, part)
    elif kind != "constexpr":
        yield name, value


def _launch(kernel: execute.Kernel, grid, flat, ours: bool, last: int | None) -> execute.Launch:
    views: dict[int, memory.View] = {}
    parameters = {}
    # Behind the arguments come pointers to scratch memory that no kernel here uses.
    flat = flat + [("scratch memory", 0)] * (len(kernel.program.parameters) - len(flat))
    for tag, ((parameter, kind), (name, value)) in enumerate(
        zip(kernel.program.parameters.items(), flat, strict=True), 1
    ):
        if isinstance(value, Tensor):
            assert value.device.type == "cpu", f"{name} is on {value.device}"
            if value.numel():
                field = name.rpartition(".")[2].upper()
                in_place = not ours or field in IN_PLACE
                views[tag] = memory.View(name, value, in_place, field in EXTENDS)
            value = (tag << memory.TAG) + value.data_ptr()
        size = int(kind[1:]) // 8
        parameters[parameter] = (
            np.array([value or 0], f"f{size}") if kind[0] == "f"
            else np.array([int(value or 0) % 256**size], f"u{size}")
        ).view("u1")  # fmt: skip
    memory.place(views)
    return execute.run(kernel, grid, parameters, views, last)


def _only_ptx(backend=None, stages=None, options=None, language=None, capability=None):
    """Triton's hook into its stages: the PTX in the place of the machine code, without ptxas.

    Without arguments: what to tell such kernels in the cache by.
    """
    if stages is None:
        return "ptx", "ptx"
    stages["cubin"] = lambda ptx, metadata: ptx.encode()


def _marking(allocate):
    @functools.wraps(allocate)
    def allocate_marked(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor if torch.compiler.is_compiling() else memory.mark(tensor)

    allocate_marked.unmarked = allocate
    return allocate_marked


def install(target: str, mode: str = "exact") -> Driver:
    """Makes this Triton's driver, and memory that torch allocates known as not yet written.

    mode: how approximate instructions err, see `instructions`.
    """
    instructions.set_mode(mode)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 interprets the kernels: unset it to compile them")
    active = Driver(target)
    triton_driver.set_active(active)
    triton.knobs.runtime.add_stages_inspection_hook = _only_ptx
    for owner, name in ALLOCATIONS:
        allocate = getattr(owner, name)
        setattr(owner, name, _marking(getattr(allocate, "unmarked", allocate)))
    return active
