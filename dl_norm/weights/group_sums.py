"""Sums over the processes that hold a batch. What is missing raises: no sum is silently local."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING or dist.is_available():
    Group: TypeAlias = dist.ProcessGroup | Literal["local"] | None
else:  # a torch built without torch.distributed has no ProcessGroup
    Group = Literal["local"] | None


def sum_over(values: Tensor, group: Group) -> Tensor:
    """``values`` of all processes of ``group`` added up, in place (one all-reduce).

    - A ``torch.distributed`` process group, of which this process must be a member.
    - "local": this process holds the whole batch; no communication.
    - None: the same in a program of one process. In a program of several it is not known whether
      the batch is spread over them, so it raises.

    Raises:
        TypeError: ``group`` is something else, such as a DeviceMesh.
        ValueError: None with more than one process, no process group initialised, or this process
            not in the group (torch would warn and leave its values as they are).
    """
    if is_spread(group):
        dist.all_reduce(values, group=group)
    return values


def gather_over(values: Tensor, group: Group) -> tuple[Tensor, slice]:
    """(k, n) ``values`` of all P processes of ``group`` side by side, (k, P n), and this process's
    columns of them (one all-gather, and one all-reduce of three numbers).

    Raises:
        TypeError, ValueError: as :func:`sum_over`, and :func:`check_same_count`.
    """
    if not is_spread(group):
        return values, slice(None)
    count = values.shape[1]
    remedy = "add sequences of length 0, which count nowhere, until all have as many"
    check_same_count(count, group, values.device, remedy)
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values.contiguous(), group=group)
    start = dist.get_rank(group) * count
    return torch.cat(parts, 1), slice(start, start + count)


def check_same_count(count: int, group: Group, device: torch.device, remedy: str) -> None:
    """Raises unless every process of ``group`` has as many sequences: collectives of unequal sizes
    would hang, or not even that (one all-reduce of three numbers).

    A ValueError; on a CUDA device an assertion of the device, so that the host need not wait.
    """
    # The sums of 1, n and n^2 over the group: all equal exactly where the variance is 0.
    powers = torch.full((3,), count, device=device) ** torch.arange(3, device=device)  # no copy
    sums = sum_over(powers, group)
    same = sums[0] * sums[2] == sums[1] ** 2
    what = "the processes of the group disagree on the number of sequences"
    if device.type == "cuda":
        torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
            same, f"{what}: {remedy}"
        )
    elif not same:
        mean = float(sums[1] / sums[0])
        raise ValueError(f"{what}: {count} here, {mean:g} on average; {remedy}")


def is_spread(group: Group) -> TypeGuard[dist.ProcessGroup]:
    """Whether there are processes to talk to. Raises as :func:`sum_over`."""
    if isinstance(group, str):
        if group != "local":
            raise ValueError(f"group must be a process group, 'local' or None; got {group!r}")
        return False
    initialised = dist.is_available() and dist.is_initialized()
    if group is None:
        if initialised and dist.get_world_size() > 1:
            raise ValueError(
                f"{dist.get_world_size()} processes, but no group: it is not known whether these "
                "are all sequences of the batch. Pass group=torch.distributed.group.WORLD (or the "
                "data-parallel group) if each process has its own sequences, or group='local' if "
                "this process has all of them, gathered already"
            )
        return False
    if not dist.is_available():
        raise ValueError("a group was given, but this build of torch has no torch.distributed")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not in the group: its sequences would be left out")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed process group, 'local' or None; got "
            f"{type(group).__name__} (of a DeviceMesh pass mesh.get_group())"
        )
    if not initialised:
        raise ValueError(
            "a group was given, but torch.distributed is not initialised: call "
            "torch.distributed.init_process_group first"
        )
    return True
