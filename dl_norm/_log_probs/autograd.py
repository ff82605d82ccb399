"""The autograd Function: the gradient is final in the forward pass, backward scales it."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .._batch import Batch
from .._checks import check_first_derivative, has_no_values, one_gradient
from .._operators import operator
from .._options import TokenLoss, num_sums
from . import closed_form


def implementation(impl: str) -> ModuleType:
    """The module whose ``policy_loss_fwd`` and ``policy_loss_bwd`` do the work."""
    if impl == "torch":
        return closed_form
    from . import launch  # needs Triton, which the "torch" implementation does not

    return launch


@operator("policy_loss_fwd", outputs=3)
def policy_loss_op(
    batch: Batch, terms: TokenLoss, write_grad: bool, metrics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels as one opaque operator, so that torch.compile need not trace the launch."""
    return implementation("triton").policy_loss_fwd(batch, terms, write_grad, metrics)


@policy_loss_op.fake
def _(
    batch: Batch, terms: TokenLoss, write_grad: bool, metrics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    log_probs = batch.log_probs
    grad_dtype = torch.float32 if log_probs.dtype == torch.float16 else log_probs.dtype
    return (
        log_probs.new_empty((), dtype=torch.float32),
        log_probs.new_empty(log_probs.shape if write_grad else (0,), dtype=grad_dtype),
        log_probs.new_empty(num_sums(terms) if metrics else 0, dtype=torch.float32),
    )


class PolicyLossFunction(torch.autograd.Function):
    """Differentiable with respect to log_probs alone, which ``batch`` holds once more."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        log_probs: Tensor,
        batch: Batch,
        terms: TokenLoss,
        impl: str,
        write_grad: bool,
        metrics: bool,
    ) -> tuple[Tensor, Tensor]:
        forward = implementation(impl).policy_loss_fwd
        if impl == "triton" and has_no_values(log_probs):
            forward = policy_loss_op
        batch = batch._replace(log_probs=log_probs)
        loss, grad, sums = forward(batch, terms, write_grad, metrics)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(sums)
        ctx.dtype = log_probs.dtype
        ctx.impl = impl
        ctx.scaled = False
        return loss, sums

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_loss = grad_outputs[0]  # the metrics have no gradient
        check_first_derivative("policy_loss")
        (grad,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return closed_form.policy_loss_bwd(grad, grad_loss, ctx.dtype), *(None,) * 5
        if ctx.scaled and ctx.impl == "triton":
            raise RuntimeError(
                "policy_loss: backward ran a second time, but the first run scaled the stored "
                "gradient in place. Call policy_loss again, add the losses before one backward, "
                'or use impl="torch".'
            )
        ctx.scaled = True
        backward = implementation(ctx.impl).policy_loss_bwd
        grad = one_gradient("policy_loss", grad_loss, lambda g: backward(grad, g, ctx.dtype))
        return grad, *(None,) * 5
