"""Log-probs that have a gradient, for trainers whose losses take log-probs.

dl-norm's losses know their gradient in the forward pass, and have no use for these. A trainer that
cannot give its logits or hidden states to a loss gets here what :func:`dl_norm.token_log_probs`
computes, with a gradient: it keeps the logits (or hidden states) and nothing else, and reads them
again in backward, where the loss -A log pi with A = -(what comes in) has the gradient that is
wanted, in one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dl_norm


def log_probs(
    hidden_or_logits: Tensor,
    token_ids: Tensor,
    lm_head_weight: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    entropy: bool = True,
    entropy_grad: bool = False,
    sum_sq_probs: bool = False,
    **options: Any,
) -> tuple[Any, ...]:
    """:func:`dl_norm.token_log_probs` and entropy, with gradients.

    Args:
        hidden_or_logits, token_ids, lm_head_weight, mask: as for :func:`dl_norm.token_log_probs`.
        entropy: whether it is wanted; otherwise it is None.
        entropy_grad: whether it has a gradient, too.
        sum_sq_probs: whether sum p^2 is wanted, as a third output, which has no gradient.
        **options: of :func:`dl_norm.token_log_probs`: temperature, tp_group, kept, impl, ...

    Returns:
        (log-probs, entropy), float32 of the shape of ``token_ids``, 0 where mask is 0.

    Raises:
        TypeError, ValueError: as :func:`dl_norm.token_log_probs`.
        RuntimeError: on a second derivative.
    """
    asked = {"entropy": entropy, "sum_sq_probs": sum_sq_probs}
    first, *others = _LogProbs.apply(
        hidden_or_logits, lm_head_weight, token_ids, mask, asked, entropy_grad, options
    )
    return first, others.pop(0) if entropy else None, *others


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        inputs: Tensor,
        weight: Tensor | None,
        token_ids: Tensor,
        mask: Tensor | None,
        asked: dict[str, bool],
        entropy_grad: bool,
        options: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        found: Any = dl_norm.token_log_probs(
            inputs, token_ids, weight, mask=mask, **asked, **options
        )
        outputs = found if isinstance(found, tuple) else (found,)
        ctx.save_for_backward(inputs, weight, token_ids, mask)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[2 if asked["entropy"] and entropy_grad else 1 :])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs, weight, token_ids, mask = ctx.saved_tensors
        token_ids = token_ids.reshape(1, -1)
        mask = torch.ones_like(token_ids) if mask is None else mask.reshape(1, -1)
        of_log_probs, of_entropy = (
            None if grad is None else grad.reshape(1, -1).float() for grad in (*grads, None)[:2]
        )
        options = {**ctx.options, "surrogate": "policy_gradient"}
        if of_entropy is not None:
            options |= {"entropy_coef": 1.0, "entropy_weights": -of_entropy}
        zeros = torch.zeros(token_ids.shape, device=token_ids.device)
        advantages = zeros if of_log_probs is None else -of_log_probs
        loss_of: Any = dl_norm.logits_policy_loss if weight is None else dl_norm.linear_policy_loss
        given = (inputs,) if weight is None else (inputs, weight)
        with torch.enable_grad():
            leaves = [
                tensor.detach().requires_grad_(wanted)
                for tensor, wanted in zip(given, ctx.needs_input_grad, strict=False)
            ]
            rows = leaves[0].reshape(1, -1, inputs.shape[-1])
            ones = zeros.new_ones(1)
            loss = loss_of(rows, *leaves[1:], token_ids, None, advantages, mask, ones, **options)
        found = iter(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad]))
        wanted = ctx.needs_input_grad[:2]
        return *(next(found) if needed else None for needed in wanted), *(None,) * 5


def shard_log_probs(
    logits: Tensor, token_ids: Tensor, group: Any, **options: Any
) -> tuple[Any, ...]:
    """:func:`log_probs` of this rank's columns of the logits, cut evenly over ``group``.

    ``options``: entropy, entropy_grad, ... A group of one rank, or None, has whole rows.
    """
    return log_probs(logits, token_ids, tp_group=spread_over(group), **options)


def spread_over(group: Any) -> Any:
    """``group``, or None if it has one rank, which then has all of the vocabulary."""
    return group if group is not None and group.size() > 1 else None
