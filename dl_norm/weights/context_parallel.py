"""One sequence spread over the processes of a context-parallel group."""

from __future__ import annotations

from torch import Tensor

from .group_sums import Group, check_same_count, is_spread, sum_over
from .lengths import sequence_lengths


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
        (G,) int64 lengths, the same on every process of the group (one all-reduce of G
        numbers and one of three). No host sync on a CUDA device.

    Raises:
        TypeError, ValueError: as :func:`sequence_weights` and :func:`sequence_lengths`. ValueError
            also if the processes disagree on G; on a CUDA device an assertion of the device.
    """
    lengths = sequence_lengths(mask, cu_seqlens)
    if is_spread(group):
        remedy = (
            "each needs a row for every sequence of the group, also for one without tokens there"
        )
        check_same_count(lengths.shape[0], group, lengths.device, remedy)
    return sum_over(lengths, group)
