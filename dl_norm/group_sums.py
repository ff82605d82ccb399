"""Sums over the processes that hold a batch. What is missing raises: no sum is silently local."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch.distributed as dist
from torch import Tensor

# Quoted: a torch built without torch.distributed has no ProcessGroup.
Group: TypeAlias = "dist.ProcessGroup | Literal['local'] | None"


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
    if isinstance(group, str):
        if group != "local":
            raise ValueError(f"group must be a process group, 'local' or None; got {group!r}")
        return values
    initialised = dist.is_available() and dist.is_initialized()
    if group is None:
        if initialised and dist.get_world_size() > 1:
            raise ValueError(
                f"{dist.get_world_size()} processes, but no group: it is not known whether these "
                "are all sequences of the batch. Pass group=torch.distributed.group.WORLD (or the "
                "data-parallel group) if each process has its own sequences, or group='local' if "
                "this process has all of them, gathered already"
            )
        return values
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
    dist.all_reduce(values, group=group)
    return values
