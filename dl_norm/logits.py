"""The policy loss over logits."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import logits_closed_form
from .checks import LOG_PROB_DTYPES, check_number, check_policy_loss_inputs, values_are_free
from .functional import _choose
from .logits_closed_form import RowOutputs, RowSettings
from .metrics import PolicyLossMetrics
from .options import PolicyLossOptions
from .token_rows import TokenRows, check_token_ids, policy_loss_rows


@dataclass(frozen=True)
class PolicyLossOutputs:
    """What the loss over logits or hidden states has seen on its way. All detached.

    - log_probs: float32, of the shape of ``token_ids``; 0 where mask == 0.
    - entropy: the same, of softmax(logits / temperature), in nats; None unless asked for.
    - metrics: None unless asked for.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    metrics: PolicyLossMetrics | None = None


# torch.compile breaks its graph here and calls the function as it is.
@torch.compiler.disable
def logits_policy_loss(
    logits: Tensor,
    token_ids: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    in_place: bool = False,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    ref_log_probs: Tensor | None = None,
    beta: float = 0.0,
    rollout_weights: Tensor | None = None,
    impl: str | None = None,
    entropy: bool = False,
    return_log_probs: bool = False,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, PolicyLossOutputs]:
    r""":func:`dl_norm.policy_loss` of log_probs = log_softmax(logits / temperature)[token_ids].

    The gradient at the logits, g_t (onehot(token) - softmax) / temperature with g_t the gradient
    of :func:`dl_norm.policy_loss` at the log-prob, is computed in the forward pass, one kernel for
    both. A row with mask 0, or with advantage 0 where neither a KL term nor an output is asked
    for, is not read; its gradient is 0.

    Args:
        logits: (B, T, V), or (N, V) with ``cu_seqlens``; float32, bfloat16 or float16. Row t holds
            the prediction **of** ``token_ids[t]`` (shift before the call). The rows may have any
            strides: ``logits[:, :-1]`` is not copied. Arithmetic is float32.
        token_ids: (B, T) or (N,), int64 or int32, in [0, V) where mask != 0. On a GPU the loss is
            NaN if one is not.
        old_log_probs, advantages, mask, weights, cu_seqlens: as for :func:`dl_norm.policy_loss`,
            and so are the other options.
        temperature: > 0, of the policy that sampled.
        in_place: write the gradient over ``logits``, so that there is no second (B, T, V) buffer.
            The logits are lost to the caller. They must be contiguous and not a leaf that
            requires a gradient, and another operation that keeps them for its own backward pass
            raises there. Without a gradient to compute nothing is written.
        entropy, return_log_probs, return_metrics: also return :class:`PolicyLossOutputs`, from the
            same pass.

    Returns:
        A 0-dim float32 loss, or (loss, PolicyLossOutputs). No host sync on a GPU.

    Raises:
        TypeError, ValueError: for what cannot be honoured, saying what was expected.
        RuntimeError: on a second backward through one call (the stored gradient is scaled in
            place), and on a second derivative.

    Source: as :func:`dl_norm.policy_loss`; online softmax arXiv:1805.02867.
    """
    options = PolicyLossOptions(eps_low, eps_high, dual_clip, delta, log_ratio_clamp, beta)
    check_logits("logits", logits, "V")
    returns = entropy or return_log_probs or return_metrics
    rows = check_and_flatten(
        logits, token_ids, old_log_probs, advantages, mask, weights, cu_seqlens, ref_log_probs,
        rollout_weights, logits.shape[-1], options, returns, return_metrics,
    )  # fmt: skip
    settings = row_settings(temperature, None, options, return_metrics, entropy)
    write_grad = torch.is_grad_enabled() and logits.requires_grad
    if in_place and write_grad:
        _check_in_place(logits)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    outputs = LogitsPolicyLossFunction.apply(
        logits, rows, settings, _choose(impl, logits), in_place, write_grad
    )
    return with_outputs(outputs, token_ids.shape, weights, settings, returns)


def check_logits(name: str, tensor: Tensor, size: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in LOG_PROB_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16; got {tensor.dtype}: use .float()"
        )
    if tensor.ndim not in (2, 3) or tensor.shape[-1] == 0:
        raise ValueError(
            f"{name} must be (B, T, {size}), or packed (N, {size}), with {size} > 0; got "
            f"{tuple(tensor.shape)}"
        )


def check_and_flatten(
    logits_or_hidden: Tensor,
    token_ids: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ref_log_probs: Tensor | None,
    rollout_weights: Tensor | None,
    vocabulary: int,
    options: PolicyLossOptions,
    returns: bool,
    metrics: bool,
) -> TokenRows:
    """Checks the tensors that have one entry a token or a sequence, and makes rows of them."""
    like_log_probs = logits_or_hidden.detach()[..., 0]
    check_policy_loss_inputs(
        like_log_probs, old_log_probs, advantages, mask, weights, cu_seqlens, ref_log_probs,
        rollout_weights,
    )  # fmt: skip
    check_token_ids(token_ids, mask, like_log_probs, vocabulary)
    if options.beta and ref_log_probs is None:
        raise ValueError(
            f"beta = {options.beta} needs ref_log_probs, the reference policy's log-probs"
        )
    if not (options.beta or metrics):
        ref_log_probs = None  # multiplied by zero: not read
    skip_zero_advantages = not returns and ref_log_probs is None
    return policy_loss_rows(
        token_ids, old_log_probs, advantages, mask, weights, cu_seqlens, ref_log_probs,
        rollout_weights, skip_zero_advantages,
    )  # fmt: skip


def row_settings(
    temperature: float,
    softcap: float | None,
    options: PolicyLossOptions | None,
    metrics: bool,
    entropy: bool,
) -> RowSettings:
    check_number(temperature, "temperature", "temperature > 0", lambda v: v > 0)
    if softcap is not None:
        rule = "logit_softcap > 0 (or None)"
        check_number(softcap, "logit_softcap", rule, lambda v: v > 0)
    return RowSettings(temperature, softcap, options, metrics, entropy)


def with_outputs(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    shape: torch.Size,
    weights: Tensor,
    settings: RowSettings,
    returns: bool,
) -> Tensor | tuple[Tensor, PolicyLossOutputs]:
    """What the public function returns, of the outputs of its autograd Function."""
    loss, log_probs, entropy, sums = outputs
    if not returns:
        return loss
    return loss, PolicyLossOutputs(
        log_probs.view(shape),
        entropy.view(shape) if settings.entropy else None,
        PolicyLossMetrics.from_sums(sums, weights) if settings.metrics else None,
    )


def implementation(impl: str) -> ModuleType:
    """The module whose ``logits_pass`` and ``reduce_partials`` do the work."""
    if impl == "torch":
        return logits_closed_form
    from . import logits_launch  # needs Triton, which the "torch" implementation does not

    return logits_launch


def half_scale(rows: TokenRows, dtype: torch.dtype) -> tuple[TokenRows, Tensor | None]:
    """DeltaL weights underflow in float16: there a power of two brings the largest weight to
    about 1, and backward takes it out again in float32."""
    if dtype != torch.float16 or rows.count == 0 or rows.weights is None:
        return rows, None
    _, exponent = torch.frexp(rows.weights.nan_to_num(0.0).amax())
    scale = torch.ldexp(rows.weights.new_ones(()), -exponent)
    fields = {**vars(rows), "weights": rows.weights * scale}
    return TokenRows(**fields), scale


def scale_grad(
    grad: Tensor, grad_output: Tensor, half: Tensor | None, dtype: torch.dtype, impl: str
) -> Tensor:
    """grad * grad_output in ``dtype``, in place where that is the dtype of ``grad``."""
    if half is not None:
        grad_output = grad_output / half
    if impl == "triton":
        from . import launch

        return launch.policy_loss_bwd(grad, grad_output, dtype)
    if values_are_free(grad_output) and bool(grad_output == 1):
        return grad.to(dtype)
    if half is None and grad.dtype == dtype:
        return grad.mul_(grad_output)
    # As a (1,) tensor grad_output is not rounded to float16 first.
    return (grad * grad_output.view(1)).to(dtype)


def check_first_backward(ctx, name: str) -> None:
    if ctx.scaled:
        raise RuntimeError(
            f"{name}: backward ran a second time, but the first run scaled the stored gradient in "
            f"place. Call {name} again, or add the losses before one backward."
        )
    ctx.scaled = True


def _check_in_place(logits: Tensor) -> None:
    if logits.is_leaf:
        raise ValueError(
            "in_place=True would overwrite logits that are a leaf requiring grad: pass the output "
            "of the model, or in_place=False"
        )
    if not logits.is_contiguous() or logits.data_ptr() % 16:
        raise ValueError(
            f"in_place=True needs contiguous logits that start on a multiple of 16 bytes, got "
            f"strides {logits.stride()} and an offset of {logits.storage_offset()}: instead of "
            "slicing positions off give them mask 0, or pass in_place=False"
        )


class LogitsPolicyLossFunction(torch.autograd.Function):
    """Differentiable with respect to the logits alone."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        logits: Tensor,
        rows: TokenRows,
        settings: RowSettings,
        impl: str,
        in_place: bool,
        write_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        module = implementation(impl)
        rows, half = half_scale(rows, logits.dtype if write_grad else torch.float32)
        grad = None
        if write_grad:
            grad = (
                logits.detach()
                if in_place
                else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
            )
        outputs = RowOutputs.zeros(rows.count, settings, logits.device)
        module.logits_pass(logits.detach(), grad, rows, 0, settings, outputs)
        loss, sums = module.reduce_partials(outputs.partials)
        if half is not None:
            loss = loss / half
        if grad is not None and in_place:
            # So that autograd refuses a backward elsewhere that needs the logits as they were.
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(grad, half)
        ctx.impl = impl
        ctx.scaled = False
        entropy = loss.new_empty(0) if outputs.entropy is None else outputs.entropy
        ctx.mark_non_differentiable(outputs.log_probs, entropy, sums)
        ctx.set_materialize_grads(False)
        return loss, outputs.log_probs, entropy, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_loss = grad_outputs[0]  # the other outputs have no gradient
        if grad_loss is None:
            return None, None, None, None, None, None
        check_first_backward(ctx, "logits_policy_loss")
        grad, half = ctx.saved_tensors
        grad = scale_grad(grad, grad_loss, half, grad.dtype, ctx.impl)
        return grad, None, None, None, None, None
