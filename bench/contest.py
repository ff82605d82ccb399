"""What is compared: one entry of the package, its cases, and everyone who computes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.lift import NotInstalled

OURS = "dl_norm"
Loss = Callable[[], Tensor]


class NotHere(Exception):
    """The contestant cannot run this case, or not on this machine."""


def runs_kernels(tensor: Tensor) -> bool:
    """Whether compiled Triton kernels run on this tensor: on a GPU, or under the driver of ci/ptx,
    which counts what they do."""
    if tensor.is_cuda:
        return True
    from triton.runtime import driver

    try:
        return driver.active.get_active_torch_device().type == tensor.device.type
    except RuntimeError:  # no driver
        return False


def our_impl(tensor: Tensor) -> str | None:
    """The argument ``impl`` of dl_norm: its kernels wherever kernels run."""
    return "triton" if runs_kernels(tensor) else None


class AnyCase(Protocol):
    """A shape, and the least that any implementation must move and multiply."""

    @property
    def name(self) -> str: ...
    @property
    def scaled_from(self) -> str | None: ...
    @property
    def tokens(self) -> int: ...
    def bytes_moved(self) -> int: ...
    def flops(self) -> int: ...


class AnyInputs(Protocol):
    @property
    def leaves(self) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Prepared:
    """What a contestant made of the inputs before the clock starts.

    result: the timed call, () -> scalar loss, or the result itself where nothing is differentiated.
    leaves: what the loss is differentiated by. gradients: their gradients in the layout of the
    case's truth. restore: called untimed before each timed call that would find its inputs
    overwritten by the last.
    """

    result: Loss
    leaves: tuple[Tensor, ...]
    gradients: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda gradients: gradients
    restore: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Contestant:
    """prepare(inputs) is not timed; it returns the timed call, or a `Prepared` if the leaves are
    not those of the inputs. `note` says what the timed call includes."""

    name: str
    note: str
    prepare: Callable[[Any], Loss | Prepared]
    graphable: bool = False  # worth timing as a CUDA graph too


@dataclass(frozen=True)
class Expected:
    """The result in float64, its gradients by the leaves, and the size of the terms it sums."""

    result: Tensor
    gradients: tuple[Tensor, ...]
    scale: float


@dataclass(frozen=True)
class Suite:
    """cases(device) and tiny are shapes; passes is what of "forward", "backward" and "both" tells
    something; check(prepared, expected) raises `parity.Wrong`."""

    name: str
    about: str
    cases: Callable[[torch.device], tuple[AnyCase, ...]]
    tiny: tuple[AnyCase, ...]
    make_inputs: Callable[[Any, torch.device, int], Any]
    contestants: tuple[Contestant, ...]
    truth: Callable[[Any], Expected]
    check: Callable[[Prepared, Expected], None]
    passes: tuple[str, ...] = ("forward", "backward", "both")


def prepare(contestant: Contestant, inputs: AnyInputs) -> Prepared:
    """`NotHere` says why there is nothing to time."""
    try:
        prepared = contestant.prepare(inputs)
    except NotInstalled as problem:
        raise NotHere(str(problem)) from problem
    if isinstance(prepared, Prepared):
        return prepared
    return Prepared(prepared, tuple(leaf for leaf in inputs.leaves if leaf.requires_grad))
