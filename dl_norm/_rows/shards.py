"""Which part of the vocabulary this process has, of the head or of the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch.distributed as dist
from torch import Tensor

from .._checks import check_flag
from .inputs import is_dtensor
from .records import VocabShard

if TYPE_CHECKING or dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh

    TensorParallelGroup: TypeAlias = dist.ProcessGroup | DeviceMesh
else:  # a torch built without torch.distributed
    TensorParallelGroup = Any


def shard_of_head(
    hidden: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    tp_group: TensorParallelGroup | None,
    vocab_size: int | None,
    partial_hidden_grad: bool = False,
) -> tuple[Tensor, Tensor | None, VocabShard]:
    """The rows of the head, and of its bias, that this process has and that are of a token."""
    check_flag(partial_hidden_grad, "partial_hidden_grad")
    group = _checked_group(tp_group, vocab_size, partial_hidden_grad)
    rows = _rows_in_all(lm_head_weight, 0)
    lm_head_weight = _local("lm_head_weight", lm_head_weight, group, 0)
    if bias is not None:
        bias = _local("bias", bias, group, 0)
        if bias.shape != lm_head_weight.shape[:1]:
            raise ValueError(
                f"bias must be the shard of this rank, (V_local,) = ({lm_head_weight.shape[0]},) "
                f"like lm_head_weight; got {tuple(bias.shape)}"
            )
    shard, here = _shard(group, lm_head_weight.shape[0], rows, vocab_size, partial_hidden_grad)
    if here < lm_head_weight.shape[0]:
        lm_head_weight, bias = lm_head_weight[:here], None if bias is None else bias[:here]
    return lm_head_weight, bias, shard


def shard_of_logits(
    name: str, logits: Tensor, tp_group: TensorParallelGroup | None, vocab_size: int | None
) -> tuple[Tensor, VocabShard]:
    """The columns of the logits that this process has and that are of a token."""
    group = _checked_group(tp_group, vocab_size, False)
    columns = _rows_in_all(logits, -1)
    logits = _local(name, logits, group, logits.ndim - 1)
    shard, here = _shard(group, logits.shape[-1], columns, vocab_size, False)
    return logits if here == logits.shape[-1] else logits[..., :here], shard


def _checked_group(
    tp_group: TensorParallelGroup | None, vocab_size: int | None, partial_hidden_grad: bool
) -> dist.ProcessGroup:
    if tp_group is None:
        name = "partial_hidden_grad" if partial_hidden_grad else "vocab_size"
        raise ValueError(f"{name} has no effect without tp_group: pass both or neither")
    if not dist.is_available():
        raise ValueError("tp_group needs torch.distributed, which this torch was built without")
    if isinstance(tp_group, DeviceMesh):
        if tp_group.ndim != 1:
            raise ValueError(
                f"tp_group must be a mesh of one dimension, got {tp_group.ndim}: pass the one over "
                "which the vocabulary is spread, such as mesh['tp']"
            )
        tp_group = tp_group.get_group()
    if not isinstance(tp_group, dist.ProcessGroup):
        raise TypeError(
            "tp_group must be a process group of which this process is a member, or a DeviceMesh; "
            f"got {type(tp_group).__name__}"
        )
    if dist.get_rank(tp_group) < 0:
        raise ValueError("this process is not a member of tp_group")
    if vocab_size is not None:
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, np.integer)):
            raise TypeError(f"vocab_size must be an int or None, got {type(vocab_size).__name__}")
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {vocab_size}")
    return tp_group


def _rows_in_all(tensor: Tensor, dim: int) -> int | None:
    """How many a DTensor has on all processes; of a shard alone this is not known."""
    return tensor.shape[dim] if is_dtensor(tensor) else None


def _local(name: str, tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """This process's part of a DTensor that is Shard(dim) over the group; further dimensions of its
    mesh are gathered, and their gradients averaged, as FSDP2 does."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    sharded = cast(DTensor, tensor)
    mesh = sharded.device_mesh
    ranks = dist.get_process_group_ranks(group)
    over = [
        d for d in range(mesh.ndim)
        if dist.get_process_group_ranks(mesh.get_group(d)) == ranks
    ]  # fmt: skip
    if len(over) != 1 or sharded.placements[over[0]] != Shard(dim):
        raise ValueError(
            f"{name} is a DTensor of {sharded.placements} on {mesh}, of which tp_group, ranks "
            f"{ranks}, is not the one dimension with Shard({dim}): pass that one's group, or the "
            "local shard"
        )
    if mesh.ndim == 1:
        return sharded.to_local()
    kept = [Shard(dim) if d == over[0] else Replicate() for d in range(mesh.ndim)]
    grads = [Shard(dim) if d == over[0] else Partial("avg") for d in range(mesh.ndim)]
    return sharded.redistribute(placements=kept).to_local(grad_placements=grads)


def _shard(
    group: dist.ProcessGroup,
    local: int,
    in_all: int | None,
    vocab_size: int | None,
    partial_hidden_grad: bool,
) -> tuple[VocabShard, int]:
    """Where this process's ``local`` rows begin, and how many of them are of a token.

    All shards but the last ones are equally large: cut as by torch.chunk, or padded to be equal.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    vocabulary = int(vocab_size or in_all or local * ranks)

    def chunk_of(total: int) -> tuple[int, int]:
        """Size of a chunk, and of this process's."""
        size = -(-total // ranks)
        return size, min(max(total - rank * size, 0), size)

    size, expected = chunk_of(in_all or vocabulary)
    if local != expected:
        if in_all is not None or local * ranks < vocabulary:
            raise ValueError(
                f"rank {rank} of {ranks} must have {expected} of {in_all or vocabulary} words, the "
                f"chunk of torch.chunk, or more where all shards are padded alike; it has {local}"
            )
        size = local
    here = min(max(vocabulary - rank * size, 0), local)
    return VocabShard(group.group_name, rank * size, vocabulary, partial_hidden_grad), here
