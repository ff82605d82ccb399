"""The policy loss over logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import LOG_PROB_DTYPES, check_number, check_policy_loss_inputs
from .device import implementation_for
from .logits_closed_form import RowSettings
from .metrics import PolicyLossMetrics
from .options import PolicyLossOptions
from .row_autograd import LogitsPolicyLossFunction
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
    ref_log_probs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    entropy_mask: Tensor | None = None,
    sequence_mask: Tensor | None = None,
    impl: str | None = None,
    entropy: bool = False,
    return_log_probs: bool = False,
    return_metrics: bool = False,
    **options,
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
        old_log_probs, advantages, mask, weights, cu_seqlens, ref_log_probs, rollout_weights,
            entropy_mask, sequence_mask: as for :func:`dl_norm.policy_loss`.
        temperature: > 0, of the policy that sampled.
        in_place: write the gradient over ``logits``, so that there is no second (B, T, V) buffer.
            The logits are lost to the caller. They must be contiguous and not a leaf that
            requires a gradient, and another operation that keeps them for its own backward pass
            raises there. Without a gradient to compute nothing is written. Not under
            torch.compile, which plans its memory itself.
        entropy, return_log_probs, return_metrics: also return :class:`PolicyLossOutputs`, from the
            same pass.
        impl: as for :func:`dl_norm.policy_loss`. "triton" makes no host sync on a GPU; "torch"
            counts the tokens on the host.
        **options: every other option of :func:`dl_norm.policy_loss`: eps_low, eps_high, dual_clip,
            delta, log_ratio_clamp, beta, surrogate and what belongs to it, bias_corrected_kl. A
            ``ratio_level`` other than "token" needs the log-probs of a whole sequence before its
            first gradient, and is refused.

    Returns:
        A 0-dim float32 loss, or (loss, PolicyLossOutputs).

    Raises:
        TypeError, ValueError: for what cannot be honoured, saying what was expected.
        RuntimeError: on a second backward through one call (the stored gradient is scaled in
            place), and on a second derivative.

    Source: as :func:`dl_norm.policy_loss`; online softmax arXiv:1805.02867.
    """
    settings = row_settings(
        temperature, None, token_options("logits_policy_loss", options), return_metrics, entropy
    )
    check_logits("logits", logits, "V")
    returns = entropy or return_log_probs or return_metrics
    rows = check_and_flatten(
        logits, token_ids, old_log_probs, advantages, mask, weights, cu_seqlens, ref_log_probs,
        rollout_weights, entropy_mask, sequence_mask, logits.shape[-1], settings, returns,
    )  # fmt: skip
    write_grad = torch.is_grad_enabled() and logits.requires_grad
    if in_place and write_grad:
        _check_in_place(logits)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    outputs = LogitsPolicyLossFunction.apply(
        logits,
        settings,
        implementation_for(impl, logits),
        in_place,
        write_grad,
        *vars(rows).values(),
    )
    return with_outputs(outputs, token_ids.shape, weights, settings, returns)


def token_options(name: str, options: dict) -> PolicyLossOptions:
    """The options of ``name``, a loss that has one token in hand at a time."""
    checked = PolicyLossOptions(**options)
    if checked.ratio_level != "token":
        raise ValueError(
            f"{name} has ratio_level='token' alone, got {checked.ratio_level!r}: the ratio of a "
            "sequence needs all its log-probs before the first gradient. Compute log-probs with a "
            "gradient and pass them to policy_loss"
        )
    return checked


def check_logits(name: str, tensor: Tensor, size: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if is_dtensor(tensor):
        raise ValueError(f"{name} is a DTensor: pass the tokens of this rank, {name}.to_local()")
    if tensor.dtype not in LOG_PROB_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16; got {tensor.dtype}: use .float()"
        )
    if tensor.ndim not in (2, 3) or tensor.shape[-1] == 0:
        raise ValueError(
            f"{name} must be (B, T, {size}), or packed (N, {size}), with {size} > 0; got "
            f"{tuple(tensor.shape)}"
        )


def is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # an import of DTensor would cost everyone


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
    entropy_mask: Tensor | None,
    sequence_mask: Tensor | None,
    vocabulary: int,
    settings: RowSettings,
    returns: bool,
) -> TokenRows:
    """Checks the tensors that have one entry a token or a sequence, and makes rows of them."""
    like_log_probs = logits_or_hidden.detach()[..., 0]
    check_policy_loss_inputs(
        like_log_probs, old_log_probs, advantages, mask, weights, cu_seqlens, ref_log_probs,
        rollout_weights, entropy_mask=entropy_mask, sequence_mask=sequence_mask,
    )  # fmt: skip
    check_token_ids(token_ids, mask, like_log_probs, vocabulary)
    beta = 0.0 if settings.options is None else settings.options.beta
    if beta and ref_log_probs is None:
        raise ValueError(f"beta = {beta} needs ref_log_probs, the reference policy's log-probs")
    if not (beta or settings.metrics):
        ref_log_probs = None  # multiplied by zero: not read
    skip_zero_advantages = not returns and ref_log_probs is None
    return policy_loss_rows(
        token_ids, old_log_probs, advantages, mask, weights, cu_seqlens, ref_log_probs,
        rollout_weights, entropy_mask, sequence_mask, skip_zero_advantages,
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


def _check_in_place(logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        raise ValueError(
            "in_place=True is not available under torch.compile, which plans its memory itself: "
            "pass in_place=False, or call logits_policy_loss outside the compiled function"
        )
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
