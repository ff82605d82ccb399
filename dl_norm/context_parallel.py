"""One sequence spread over the processes of a context-parallel group."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import values_are_free
from .group_sums import Group, sum_over
from .weights import sequence_lengths


def context_parallel_lengths(
    mask: Tensor | None, group: Group, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    r"""Whole lengths of sequences of which every process of ``group`` holds some tokens.

    Each of the C processes of the context group has a part of the tokens of the same G sequences
    (contiguous, zig-zag or any other split). The loss is a sum over tokens, so the parts need
    nothing of each other but the length that sets the weight:

        lengths = context_parallel_lengths(mask, context_group)     # L_i, over the context
        weights = sequence_weights(lengths, ..., group=data_group)  # sum over j, over the data
        scale = gradient_scale(num_processes=data_size * context_size)
        loss = scale * policy_loss(log_probs, old, advantages, mask, weights)

    The losses of all data x context processes add up to the loss of the batch. The sums of the
    weights run over the data-parallel group alone: its processes have different sequences, while
    those of a context group have the same, and a sum over both would count each sequence C times.
    ``PolicyLossMetrics.all_reduce`` over both counts ``sequences`` C times, for that reason; all
    its other fields are sums over tokens.

    What is a mean over a sequence's tokens sees this process's part alone and is **not** right
    here: ``ratio_level="sequence"`` and ``"sequence_token"`` (GSPO) and off-policy sequence masks.
    Gather the sequences' log-probs for those.

    Args:
        mask: (G, T') mask of this process's columns, or (N',) of its part of a packed stream. A
            sequence without tokens here keeps its row, or its empty stretch of ``cu_seqlens``:
            G and the order of the sequences are those of the whole group.
        group: the context-parallel process group; "local" if the context is not spread. None as
            for :func:`sequence_weights`: it raises in a program of several processes.
        cu_seqlens: (G + 1,) offsets of this process's part of a packed stream; mask is optional.

    Returns:
        (G,) int64 lengths, the same on every process of the group (one all-reduce of G numbers).
        No host sync.

    Raises:
        TypeError, ValueError: as :func:`sequence_weights` and :func:`sequence_lengths`; on the CPU
            also ValueError if the processes disagree on G. On a GPU that would need a host sync.
    """
    lengths = sequence_lengths(mask, cu_seqlens)
    if group not in (None, "local") and values_are_free(lengths):
        _check_same_count(lengths.shape[0], group)
    return sum_over(lengths, group)


def _check_same_count(count: int, group: Group) -> None:
    # The sums of 1, G and G^2 over the group: all equal exactly where the variance is 0.
    processes, total, squares = sum_over(torch.tensor([1, count, count**2]), group).tolist()
    if processes * squares != total**2:
        raise ValueError(
            f"the processes of the context group disagree on the number of sequences: {count} "
            f"here, {total / processes:g} on average; each needs a row for every sequence of the "
            "group, also for one without tokens there"
        )
