"""The autograd Function: the gradient is final in the forward pass, backward scales it."""

from __future__ import annotations

from dataclasses import astuple

import torch
from torch import Tensor

from . import closed_form
from .metrics import NUM_METRIC_SUMS
from .options import PolicyLossOptions

# old_log_probs, advantages, mask, weights, cu_seqlens, ref_log_probs, rollout_weights
Constants = tuple[
    Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None
]
# entropy_mask, sequence_mask
PolicyMasks = tuple[Tensor | None, Tensor | None]


def _launch(*args) -> tuple[Tensor, Tensor, Tensor]:
    from . import launch  # needs Triton, which the "torch" implementation does not
    from .batch import batch_of
    from .surrogates import token_loss_of

    *tensors, options, write_grad, metrics, entropy_mask, sequence_mask = args
    batch = batch_of(*tensors, entropy_mask, sequence_mask)
    return launch.policy_loss_fwd(batch, token_loss_of(options), write_grad, metrics)


@torch.library.custom_op("dl_norm::policy_loss_fwd", mutates_args=())
def _policy_loss_op(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ref_log_probs: Tensor | None,
    rollout_weights: Tensor | None,
    eps_low: float,
    eps_high: float,
    dual_clip: float | None,
    delta: float | None,
    log_ratio_clamp: float | None,
    beta: float,
    ratio_level: str,
    surrogate: str,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
    bias_corrected_kl: bool,
    write_grad: bool,
    metrics: bool,
    entropy_mask: Tensor | None,
    sequence_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels as one opaque operator, so that torch.compile need not trace the launch."""
    options = PolicyLossOptions(
        eps_low, eps_high, dual_clip, delta, log_ratio_clamp, beta, ratio_level, surrogate,
        sapo_temperature_pos, sapo_temperature_neg, bias_corrected_kl,
    )  # fmt: skip
    return _launch(
        log_probs, old_log_probs, advantages, mask, weights, cu_seqlens, ref_log_probs,
        rollout_weights, options, write_grad, metrics, entropy_mask, sequence_mask,
    )  # fmt: skip


@_policy_loss_op.register_fake
def _(log_probs, *args):
    write_grad, metrics, _, _ = args[-4:]
    grad_dtype = torch.float32 if log_probs.dtype == torch.float16 else log_probs.dtype
    return (
        log_probs.new_empty((), dtype=torch.float32),
        log_probs.new_empty(log_probs.shape if write_grad else (0,), dtype=grad_dtype),
        log_probs.new_empty((NUM_METRIC_SUMS if metrics else 0,), dtype=torch.float32),
    )


class PolicyLossFunction(torch.autograd.Function):
    """Differentiable with respect to log_probs alone."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        log_probs: Tensor,
        constants: Constants,
        options: PolicyLossOptions,
        impl: str,
        write_grad: bool,
        metrics: bool,
        masks: PolicyMasks,
    ) -> tuple[Tensor, Tensor]:
        flags = write_grad, metrics
        if impl == "torch":
            outputs = closed_form.policy_loss_fwd(log_probs, *constants, options, *flags, *masks)
        elif torch.compiler.is_compiling():
            outputs = _policy_loss_op(log_probs, *constants, *astuple(options), *flags, *masks)
        else:
            outputs = _launch(log_probs, *constants, options, *flags, *masks)
        loss, grad, sums = outputs
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(sums)
        ctx.dtype = log_probs.dtype
        ctx.impl = impl
        ctx.scaled = False
        return loss, sums

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        # Gradients are enabled in a backward pass exactly when create_graph=True asks for them.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "policy_loss has no second derivative: its gradient is computed in the forward "
                "pass. Use dl_norm.reference.policy_loss with create_graph=True"
            )
        grad_loss = grad_outputs[0]  # the metrics have no gradient
        (grad,) = ctx.saved_tensors
        if ctx.impl == "torch" or torch.compiler.is_compiling():
            grad = closed_form.policy_loss_bwd(grad, grad_loss, ctx.dtype)
        else:
            from . import launch

            if ctx.scaled:
                raise RuntimeError(
                    "policy_loss: backward ran a second time, but the first run scaled the "
                    "stored gradient in place. Call policy_loss again, add the losses before one "
                    'backward, or use impl="torch".'
                )
            ctx.scaled = True
            grad = launch.policy_loss_bwd(grad, grad_loss, ctx.dtype)
        return grad, None, None, None, None, None, None
