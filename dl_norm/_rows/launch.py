"""Launches the kernel of ``kernels/logits_policy_loss.py``."""

# A launch takes options of Triton (num_warps) that the kernel's own signature has not.
# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._device import target
from .._log_probs.launch import aligned, device_terms, kl_terms, rollout_terms
from .._log_probs.launch import reduce_partials as launch_reduce
from ..kernels.logits_policy_loss import RowTokens, logits_policy_loss_kernel
from .records import RowOutputs, RowSettings, TokenRows


@dataclass(frozen=True)
class RowConfig:
    """How a row is cut into tiles of ``groups`` vectors of ``vector`` logits."""

    groups: int
    vector: int
    num_warps: int


def row_config(itemsize: int, warp_size: int) -> RowConfig:
    """One 16-byte vector a thread, of which the kernel has two under way.

    One program of 1024 threads fills a multiprocessor, so that the rows being worked on (one each)
    stay in the L2 cache between the two passes. At least one vector a thread: in place, no logit
    may belong to two threads. The same with and without a gradient: another order of summation
    would give the log-probs other bits.
    """
    threads = 1024
    return RowConfig(threads, 16 // itemsize, threads // warp_size)


def logits_pass(
    logits: Tensor,
    grad: Tensor | None,
    rows: TokenRows,
    first_row: int,
    settings: RowSettings,
    outputs: RowOutputs,
    sums: Tensor | None = None,
) -> None:
    """What :func:`dl_norm._rows.closed_form.logits_pass` does, in one launch.

    ``logits`` may have any strides but the last, which is 1; ``grad`` is contiguous.
    """
    if grad is not None and not _alike(logits, grad):
        logits = grad.copy_(logits)  # rows of odd length cut out of a larger tensor
    _launch(logits, grad, rows, first_row, settings, outputs, None, sums)


def row_sums(
    logits: Tensor, rows: TokenRows, first_row: int, settings: RowSettings, sums: Tensor
) -> None:
    """What :func:`dl_norm._rows.closed_form.row_sums` does, in one launch."""
    # Without the loss: one kernel serves all of them. The outputs only say that they are wanted.
    rows = TokenRows(rows.token_ids, rows.active, entropy_weights=rows.entropy_weights)
    settings = replace(settings, terms=None, metrics=False)
    outputs = RowOutputs.zeros(0, settings, logits.device)
    _launch(logits, None, rows, first_row, settings, outputs, sums, None)


def reference_scale(settings: RowSettings) -> float:
    """What the reference of ``row_sums`` is to be multiplied by, to be an exponent of 2."""
    return 1.0


def _launch(
    logits: Tensor,
    grad: Tensor | None,
    rows: TokenRows,
    first_row: int,
    settings: RowSettings,
    outputs: RowOutputs,
    out_sums: Tensor | None,
    sums: Tensor | None,
) -> None:
    programs = logits.shape[:-1].numel()
    if programs == 0:
        return
    base, offset = _aligned_base(logits)
    strides = (0, *logits.stride())[-3:]
    row_length = programs if logits.ndim == 2 else logits.shape[1]
    made_for = target()
    config = row_config(logits.element_size(), made_for.warp_size)
    # Left alone, ptxas fits some kernels into 32 registers: a second program on a multiprocessor
    # then drives the first one's row out of the cache, and some registers into memory.
    limit = {"maxnreg": 64} if made_for.backend == "cuda" and grad is not None else {}
    terms = settings.terms
    tokens = RowTokens(*(aligned(getattr(rows, name), rows.count) for name in RowTokens._fields))
    shard = settings.shard
    with torch.accelerator.device_index(logits.device.index):
        logits_policy_loss_kernel[(programs,)](
            base, tokens, grad, outputs.log_probs, outputs.entropy, outputs.sum_sq_probs,
            outputs.partials, out_sums, sums,
            shard.first if shard.spread else None, shard.vocabulary if shard.spread else None,
            offset, first_row, rows.count, row_length, logits.shape[-1], strides[0], strides[1],
            1.0 / settings.temperature, settings.softcap,
            *(
                (None, None, None) if terms is None else
                (device_terms(terms), kl_terms(terms, rows.ref_log_probs),
                 rollout_terms(terms.rollout, rows.rollout_log_probs))
            ),
            METRICS=settings.metrics, NUM_EXTRAS=len(settings.extra_names),
            GROUPS=config.groups, VECTOR=config.vector, num_warps=config.num_warps, **limit,
        )  # fmt: skip


def reduce_partials(partials: Tensor, rollout: bool) -> tuple[Tensor, Tensor]:
    """What :func:`dl_norm._rows.closed_form.reduce_partials` does, in one launch."""
    num_sums, rows = partials.shape
    loss = partials.new_empty(())
    sums = partials.new_empty(num_sums - 1)
    if rows == 0:
        return loss.zero_(), sums.zero_()
    with torch.accelerator.device_index(partials.device.index):
        launch_reduce(partials, loss, sums, rollout)
    return loss, sums


def _aligned_base(logits: Tensor) -> tuple[Tensor, int]:
    """A tensor that starts on a multiple of 16 bytes, and where in it the logits start."""
    offset = logits.data_ptr() % 16 // logits.element_size()
    if offset == 0:
        return logits, 0
    if offset > logits.storage_offset():  # memory that PyTorch did not allocate
        return logits.clone(memory_format=torch.contiguous_format), 0
    return logits.as_strided((1,), (1,), logits.storage_offset() - offset), offset


def _alike(logits: Tensor, grad: Tensor) -> bool:
    """Rows of ``grad``, contiguous, start as far from a vector boundary as those of ``logits``."""
    vector = 16 // logits.element_size()
    shift = logits.data_ptr() // logits.element_size() - grad.data_ptr() // grad.element_size()
    lengths = () if logits.is_contiguous() else (logits.shape[-1], *logits.stride()[:-1])
    return all(length % vector == 0 for length in (shift, *lengths))
