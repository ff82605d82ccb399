"""The policy loss over logits and its gradient in closed form, in plain PyTorch operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import closed_form
from .metrics import NUM_METRIC_SUMS
from .options import PolicyLossOptions
from .token_rows import TokenRows

NUM_SUMS = 1 + NUM_METRIC_SUMS  # the loss first, as in kernels/policy_loss.py
_BLOCK_ELEMENTS = 1 << 21  # of float32 scratch: 8 MB, small beside the logits, large beside a call


@dataclass(frozen=True)
class RowSettings:
    """Everything of a pass over rows of logits that is not a tensor.

    options: of the token loss; None for log-probs alone, without loss and gradient.
    """

    temperature: float = 1.0
    softcap: float | None = None
    options: PolicyLossOptions | None = None
    metrics: bool = False
    entropy: bool = False


@dataclass(frozen=True)
class RowOutputs:
    """float32 results of N rows: log_probs (N,), entropy (N,) or None, and partials, (1 or 10, N):
    addends of the loss and of the metrics, the last of ten combined by maximum."""

    log_probs: Tensor
    entropy: Tensor | None
    partials: Tensor

    @classmethod
    def zeros(cls, rows: int, settings: RowSettings, device: torch.device) -> RowOutputs:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        num_sums = 0 if settings.options is None else NUM_SUMS if settings.metrics else 1
        return cls(zeros(rows), zeros(rows) if settings.entropy else None, zeros(num_sums, rows))


def logits_pass(
    logits: Tensor,
    grad: Tensor | None,
    rows: TokenRows,
    first_row: int,
    settings: RowSettings,
    outputs: RowOutputs,
) -> None:
    """Writes ``outputs`` from ``first_row`` on, and d loss / d logits into ``grad``.

    logits: (R, V) or (B, T, V) for the R rows from ``first_row`` on. grad: like ``logits``, maybe
    ``logits`` itself, or None.
    """
    vocabulary = logits.shape[-1]
    row_length = logits.shape[-2]
    active = rows.active[first_row : first_row + logits.shape[:-1].numel()]
    if grad is not None:
        grad = grad.view(active.shape[0], vocabulary)
        grad[~active] = 0.0
    indices = active.nonzero()[:, 0]
    if indices.shape[0] == 0:
        return
    for index in indices.split(max(1, _BLOCK_ELEMENTS // vocabulary)):
        if logits.ndim == 2:
            block = logits.index_select(0, index)
        else:
            # Not flattened: that would copy logits whose rows are not evenly spaced.
            block = logits[index // row_length, index % row_length]
        positions = index + first_row
        block_grad = _block_pass(
            block.float(), rows[positions], positions, settings, outputs, grad is not None
        )
        if grad is not None and block_grad is not None:
            grad.index_copy_(0, index, block_grad.to(grad.dtype))


def _block_pass(
    logits: Tensor,
    rows: TokenRows,
    positions: Tensor,
    settings: RowSettings,
    outputs: RowOutputs,
    write_grad: bool,
) -> Tensor | None:
    """As ``logits_pass`` for a few rows, all active; overwrites ``logits`` and returns the
    gradient in it."""
    inverse_temperature = 1.0 / settings.temperature
    slope = None
    if settings.softcap is not None:
        logits.div_(settings.softcap).tanh_()
        if write_grad:
            slope = 1.0 - logits.square()
        logits.mul_(settings.softcap)
    token_ids = rows.token_ids.long()[:, None]
    logits.sub_(logits.amax(1, keepdim=True)).mul_(inverse_temperature)
    token_logits = logits.gather(1, token_ids)[:, 0]
    if outputs.entropy is not None:
        exp = logits.exp()
        total = exp.sum(1)
        # exp is 0 where the logit is -inf: 0 * -inf is NaN.
        mean = torch.where(exp > 0, logits.mul_(exp), 0.0).sum(1) / total
        outputs.entropy[positions] = total.log() - mean
    else:
        exp = logits.exp_()
        total = exp.sum(1)
    log_probs = token_logits - total.log()
    outputs.log_probs[positions] = log_probs
    if settings.options is None or rows.advantages is None or rows.weights is None:
        return None  # log-probs alone

    def column(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[:, None]

    # Every row as a sequence of one token.
    loss, grad, sums = closed_form.policy_loss_fwd(
        log_probs[:, None], column(rows.old_log_probs), rows.advantages, None, rows.weights, None,
        column(rows.ref_log_probs), rows.rollout_weights, settings.options, write_grad,
        settings.metrics,
    )  # fmt: skip
    outputs.partials[0, positions[0]] = loss
    if settings.metrics:
        outputs.partials[1:, positions[0]] = sums
    if not write_grad:
        return None
    grad = grad.mul_(inverse_temperature)
    out = exp.mul_(grad / -total[:, None])
    out.scatter_add_(1, token_ids, grad)
    if slope is not None:
        out.mul_(slope)
    return out


def reduce_partials(partials: Tensor) -> tuple[Tensor, Tensor]:
    """The loss (0-dim) and the (9,) sums of PolicyLossMetrics (empty without metrics)."""
    loss = partials[0].sum()
    if partials.shape[0] == 1:
        return loss, partials.new_empty(0)
    if partials.shape[1] == 0:
        return loss, partials.new_zeros(partials.shape[0] - 1)
    return loss, torch.cat([partials[1:-1].sum(1), partials[-1].amax().view(1)])
