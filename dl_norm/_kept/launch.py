"""Launches the kernels of ``kernels/kept_policy_loss.py``."""

# A launch takes options of Triton (num_warps) that the kernel's own signature has not.
# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .._device import target
from .._log_probs.launch import policy_loss_fwd as policy_loss_fwd
from .._rows.records import RowSettings
from ..kernels.kept_policy_loss import (
    kept_head_grad_kernel,
    kept_hidden_grad_kernel,
    kept_log_probs_kernel,
)
from .entries import Entries
from .records import KeptLogits


@dataclass(frozen=True)
class KeptConfig:
    """A program works on tiles of ``rows`` rows by ``groups`` vectors of ``vector`` values, and on
    ``entries`` numbers where there is one an entry."""

    rows: int
    entries: int
    groups: int
    vector: int
    num_warps: int


def kept_config(itemsize: int, vector: int, warp_size: int) -> KeptConfig:
    """Half of all sets with an entry have two or three, so few rows at a time, and of each as much
    as gives a thread two vectors of 16 bytes."""
    return KeptConfig(4, 128, 1024 // itemsize // vector, vector, 128 // warp_size)


def kept_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    entries: Entries,
    settings: RowSettings,
    entropy: bool,
) -> KeptLogits:
    """What :func:`dl_norm._kept.closed_form.kept_log_probs` does, one program a token."""
    logits = _empty_logits(entries, settings, entropy)
    _launch_log_probs(hidden, weight, bias, entries, settings, logits, None)
    return logits


def kept_sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    entries: Entries,
    settings: RowSettings,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """What :func:`dl_norm._kept.closed_form.kept_sums` does, one program a token."""
    logits = _empty_logits(entries, settings, entropy)
    tokens = hidden.shape[0]
    rows = 3 + entropy + settings.sum_sq_probs
    sums = torch.empty((rows, tokens), dtype=torch.float32, device=hidden.device)
    _launch_log_probs(hidden, weight, bias, entries, settings, logits, sums)
    return logits.logits, sums


def _empty_logits(entries: Entries, settings: RowSettings, entropy: bool) -> KeptLogits:
    tokens, device = entries.active.shape[0], entries.active.device

    def empty(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.float32, device=device)

    return KeptLogits(
        empty(entries.count), empty(tokens), empty(tokens), empty(tokens),
        empty(tokens) if entropy else None, empty(tokens) if settings.sum_sq_probs else None,
    )  # fmt: skip


def _launch_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    entries: Entries,
    settings: RowSettings,
    logits: KeptLogits,
    sums: Tensor | None,
) -> None:
    tokens = hidden.shape[0]
    if tokens == 0:
        return
    hidden, weight = _rows_in_place(hidden), _rows_in_place(weight)
    vector = _vector(hidden, weight)
    config = kept_config(hidden.element_size(), vector, target().warp_size)
    with torch.accelerator.device_index(hidden.device.index):
        kept_log_probs_kernel[(tokens,)](
            hidden, weight, _contiguous(bias), entries.ids, entries.hits, entries.offsets,
            entries.active, entries.bad, logits.logits, logits.references, logits.log_totals,
            logits.log_probs, logits.entropy, logits.sum_sq_probs, sums,
            hidden.shape[1] // vector, hidden.stride(0) // vector, weight.stride(0) // vector,
            1.0 / settings.temperature, settings.softcap, ROWS=config.rows, ENTRIES=config.entries,
            GROUPS=config.groups, VECTOR=vector, num_warps=config.num_warps,
        )  # fmt: skip


def kept_hidden_grad(
    hidden: Tensor,
    weight: Tensor,
    entries: Entries,
    logits: KeptLogits,
    token_grads: Tensor,
    entropy_weights: Tensor | None,
    settings: RowSettings,
    needed: bool,
) -> tuple[Tensor, Tensor]:
    """What :func:`dl_norm._kept.closed_form.kept_hidden_grad` does, one program a token."""
    tokens, size = hidden.shape
    score_grads = torch.empty_like(logits.logits)
    grad = torch.empty(hidden.shape if needed else 0, dtype=hidden.dtype, device=hidden.device)
    if tokens == 0:
        return score_grads, grad
    weight = _rows_in_place(weight)
    vector = _vector(weight, grad if needed else weight)
    config = kept_config(weight.element_size(), vector, target().warp_size)
    with torch.accelerator.device_index(hidden.device.index):
        kept_hidden_grad_kernel[(tokens,)](
            weight, entries.ids, entries.hits, entries.offsets, logits.logits, logits.references,
            logits.log_totals, token_grads, logits.entropy, _contiguous(entropy_weights),
            score_grads, grad if needed else None,
            size // vector, weight.stride(0) // vector, 1.0 / settings.temperature,
            settings.softcap, ROWS=config.rows, ENTRIES=config.entries, GROUPS=config.groups,
            VECTOR=vector, num_warps=config.num_warps,
        )  # fmt: skip
    return score_grads, grad


def kept_head_grad(
    hidden: Tensor,
    weight: Tensor,
    entries: Entries,
    grads: Tensor,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """What :func:`dl_norm._kept.closed_form.kept_head_grad` does, one program an entry and block of
    columns, of which those of the first entries of an id work."""
    vocabulary, size = weight.shape
    dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    head_grad = bias_grad = None
    if needed[0]:
        head_grad = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    if needed[1]:
        bias_grad = torch.zeros(vocabulary, dtype=torch.float32, device=weight.device)
    if entries.count == 0 or not any(needed):
        return head_grad, bias_grad
    hidden = _rows_in_place(hidden)
    vector = _vector(hidden) if head_grad is None else _vector(hidden, head_grad)
    made_for = target()
    config = kept_config(hidden.element_size(), vector, made_for.warp_size)
    blocks = triton.cdiv(size // vector, config.groups) if needed[0] else 1
    # Left alone, ptxas fits float16 into 48 registers on sm_80, and a few bytes into memory.
    limit = {"maxnreg": 64 if vector > 1 else 80} if made_for.backend == "cuda" else {}
    with torch.accelerator.device_index(hidden.device.index):
        kept_head_grad_kernel[(entries.count, blocks)](
            hidden, entries.sorted_ids, entries.order, entries.tokens, grads, head_grad, bias_grad,
            size // vector, hidden.stride(0) // vector, entries.count, vocabulary,
            ROWS=config.rows, GROUPS=config.groups, VECTOR=vector, num_warps=config.num_warps,
            **limit,
        )  # fmt: skip
    return head_grad, bias_grad


def _rows_in_place(matrix: Tensor) -> Tensor:
    """A matrix whose rows are contiguous, at any distance: a copy only where they are not."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _contiguous(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _vector(*matrices: Tensor) -> int:
    """Values that every row of the matrices is read in: a vector of 16 bytes of the first one's, if
    all rows start on one and are whole vectors, else 1."""
    vector = 16 // matrices[0].element_size()
    for matrix in matrices:
        rows = (matrix.shape[1], matrix.stride(0)) if matrix.shape[0] > 1 else matrix.shape[1:]
        if matrix.data_ptr() % 16 or any(length % vector for length in rows):
            return 1
    return vector
