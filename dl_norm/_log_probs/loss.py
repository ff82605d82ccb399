"""The public loss functions."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from .._call import make_call
from .._checks import LOG_PROB_DTYPES, check_cu_seqlens, check_flag, check_mask, check_tensor
from .._device import implementation_for
from .._keywords import CallOptions, Impl, KLName, RatioLevel, SurrogateName
from .._kl import KL
from .._metrics import PolicyLossMetrics
from .._options import kind_of
from .._rollout import RolloutCorrection
from ..surrogates import Surrogate
from ..weights import sequence_lengths, sequence_weights
from ..weights.group_sums import Group
from .autograd import PolicyLossFunction

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of typing from Python 3.11 on


@overload
def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[CallOptions],
) -> Tensor: ...


@overload
def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    *,
    return_metrics: bool,
    **options: Unpack[CallOptions],
) -> tuple[Tensor, PolicyLossMetrics]: ...


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    ref_log_probs: Tensor | None = None,
    beta: float = 0.0,
    kl: KLName | KL = "k3",
    rollout_weights: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    rollout_correction: RolloutCorrection | None = None,
    rollout_mean_weight: Tensor | None = None,
    ratio_level: RatioLevel = "token",
    surrogate: SurrogateName | Surrogate = "clip",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    bias_corrected_kl: bool = False,
    entropy_mask: Tensor | None = None,
    sequence_mask: Tensor | None = None,
    impl: Impl | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, PolicyLossMetrics]:
    r"""Policy loss of a batch, or of any slice of one, under per-sequence weights.

    .. math::
        \sum_i x_i \sum_t m_{it} \left[ e_{it} q_i w_{it} \ell_{it}
            + \beta (e^{d_{it}} - d_{it} - 1) \right], \qquad d = \log\pi_{ref} - \log\pi

    with the ratio r = exp(clamp(log_probs - old_log_probs, +-log_ratio_clamp)) and the token loss
    l = -min(min(r, delta) A, clip(r, 1 - eps_low, 1 + eps_high) A), capped at -dual_clip A where
    A < 0. Equivalent PyTorch: :func:`dl_norm.reference.policy_loss`. The gradient with respect to
    ``log_probs`` is computed in the forward pass. A bound belongs to the branch that has a
    gradient: at r exactly 1 + eps_high the gradient is the unclipped one (``torch.clamp`` has 1 or
    0 there, by version).

    Two layouts: padded (B, T), where G = B, or packed (N,) with ``cu_seqlens``.

    Args:
        log_probs: (B, T) or (N,), float32, bfloat16 or float16, any strides. Arithmetic is
            float32; the gradient has the dtype of ``log_probs``.
        old_log_probs: like ``log_probs``, of the policy that sampled. None: the ratio is exactly
            1, whatever ``log_probs`` holds, and the gradient that of the plain policy gradient.
        advantages: (G,) or one per token.
        mask: (B, T) or (N,), bool, integer or float; a position counts where mask != 0, and there
            may be holes. A position that does not count contributes nothing, whatever the other
            tensors hold there (NaN included). Optional for packed input.
        weights: (G,) from :func:`sequence_weights` over the whole rollout batch. A slice of the
            batch takes the same slice of the weights: losses and gradients of the slices add up.
        cu_seqlens: (G + 1,) int32 or int64 offsets of the packed sequences, from 0 to N. On a GPU
            their values are not read on the host: if they do not span [0, N] the loss is NaN.
        eps_low, eps_high: clip range of the ratio.
        dual_clip: c > 1, or None.
        delta: two-sided bound > 1 of the ratio in the unclipped branch, or None.
        log_ratio_clamp: bound of the log-ratio, without gradient beyond it, or None.
        ref_log_probs: like ``log_probs``; needed if ``beta`` > 0. With beta = 0 it only feeds
            the metric ``kl_ref``.
        beta: coefficient of the estimate of KL(policy || reference).
        kl: "k3", which is in the formula; "k1", "abs", "k2"; or :class:`dl_norm.KL`, for clamps
            and for the gradient of one with the value of another.
        rollout_weights: (G,) or one per token; multiplies the policy term, not the KL term: w of
            the formula. Or w is computed of
        rollout_log_probs: like ``log_probs``, of the inference engine that sampled. NaN: it has
            not scored the token. Their weights are constants and multiply the policy term alone;
            weight 0 drops it, whatever its factors are.
        rollout_correction: :class:`RolloutCorrection`, how; needed with ``rollout_log_probs``.
        rollout_mean_weight: 0-dim, divides w: what :func:`rollout_mean_weight` returns for the
            whole rollout batch; or None.
        ratio_level: "token", or the ratio of the whole sequence for each of its tokens:
            r = exp(clamp(mean over the sequence's tokens of log_probs - old_log_probs)).
            "sequence" is GSPO: every log-prob changes that mean. "sequence_token" has the same
            value and the gradient of a token through its own log-prob alone; the two differ only
            where the terms of a sequence's tokens do. "sequence_sum" has the sum for the mean, and
            no gradient through it: for surrogates that use the ratio as a constant. A sequence must
            not be cut.
        surrogate: "clip", the token loss above; "cispo", -sg(clip(r, 1 - eps_low, 1 + eps_high))
            A log_probs, where sg has no gradient and the clip is that of either sign of A (1 -
            eps_low = 0 leaves no lower bound; eps_high may be negative); "sapo",
            -(4 / tau) sigmoid(tau (r - 1)) A without clips; or another of the table of
            :mod:`dl_norm.surrogates` (policy gradient with a truncated weight or none, DPPO, DRO,
            VESPO, GMPO, ...) by its name, with options as in "dppo_tv(delta_high=0.15)", as a sum,
            "dppo_tv + drift(tau=0.002)", or as an instance, ``DppoTV(delta_high=0.15)``.
        sapo_temperature_pos, sapo_temperature_neg: tau where A > 0 and elsewhere, for "sapo".
        bias_corrected_kl: multiply the KL term by r before any clip, with the gradient of both.
        entropy_mask: like ``mask``, e of the formula: the policy term of a token is dropped where
            it is 0 and the KL term kept. Lengths and means do not change.
        sequence_mask: (G,), q of the formula: likewise for whole sequences, for example
            :func:`off_policy_sequence_mask`.
        impl: "triton", "torch", or None: Triton for a GPU tensor, else PyTorch. "triton" runs on
            the CPU when TRITON_INTERPRET=1 was set before this package was imported.
        return_metrics: also return :class:`PolicyLossMetrics`.

    Returns:
        A 0-dim float32 loss to minimise, or (loss, metrics). No host sync on a GPU.

    Raises:
        TypeError, ValueError: for what cannot be honoured, saying what was expected. All tensors
            but ``log_probs`` are constants: one that requires grad is refused. So is an option
            that the chosen surrogate does not read.
        RuntimeError: on a second backward through one call of impl="triton", and on a second
            derivative.

    Source: PPO clip arXiv:1707.06347, asymmetric clip arXiv:2503.14476, dual clip
    arXiv:1912.09729, k3 http://joschu.net/blog/kl-approx.html, weights arXiv:2509.07558, GSPO
    arXiv:2507.18071, CISPO arXiv:2506.13585, SAPO arXiv:2511.20347, entropy mask arXiv:2506.01939,
    KL correction and sequence mask arXiv:2512.02556, rollout correction
    :class:`RolloutCorrection`.
    """
    check_flag(return_metrics, "return_metrics")
    batch, terms = make_call(
        dict(
            log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, mask=mask,
            weights=weights, cu_seqlens=cu_seqlens, eps_low=eps_low, eps_high=eps_high,
            dual_clip=dual_clip, delta=delta, log_ratio_clamp=log_ratio_clamp,
            ref_log_probs=ref_log_probs, beta=beta, kl=kl,
            rollout_weights=rollout_weights, rollout_log_probs=rollout_log_probs,
            rollout_correction=rollout_correction, rollout_mean_weight=rollout_mean_weight,
            ratio_level=ratio_level, surrogate=surrogate,
            sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg,
            bias_corrected_kl=bias_corrected_kl, entropy_mask=entropy_mask,
            sequence_mask=sequence_mask,
        ),
        metrics=return_metrics,
    )  # fmt: skip
    write_grad = torch.is_grad_enabled() and log_probs.requires_grad
    loss, sums = PolicyLossFunction.apply(
        log_probs, batch, terms, implementation_for(impl, log_probs), write_grad, return_metrics
    )
    if return_metrics:
        return loss, PolicyLossMetrics.from_sums(
            sums, weights, kind_of(terms).extra_names, rollout_log_probs is not None
        )
    return loss


@overload
def delta_l_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    alpha: float,
    max_length: float,
    group: Group = None,
    return_metrics: Literal[False] = False,
    **options: Unpack[CallOptions],
) -> Tensor: ...


@overload
def delta_l_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    alpha: float,
    max_length: float,
    group: Group = None,
    return_metrics: bool,
    **options: Unpack[CallOptions],
) -> tuple[Tensor, PolicyLossMetrics]: ...


def delta_l_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    alpha: float,
    max_length: float,
    group: Group = None,
    return_metrics: bool = False,
    **options: Unpack[CallOptions],
) -> Tensor | tuple[Tensor, PolicyLossMetrics]:
    """:func:`policy_loss` of a **whole** rollout batch, with its DeltaL weights.

    Not for a micro-batch: it would be weighted as if it were the batch, so a loss of -0.003 may
    come out as -0.79. If the batch is cut, compute :func:`sequence_weights` once before the cut
    and call :func:`policy_loss` on each slice with its slice of the weights. The tensors are those
    of this process; with ``group`` the whole batch is that of the group. A batch of one sequence
    is taken for a slice and warned of.

    Args:
        log_probs, old_log_probs, advantages, mask: as for :func:`policy_loss`.
        alpha, max_length, group: as for :func:`sequence_weights`.
        return_metrics, **options: as for :func:`policy_loss`.

    Returns:
        A 0-dim float32 loss to minimise, or (loss, metrics).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`sequence_weights` and :func:`policy_loss`.
    """
    cu_seqlens = options.get("cu_seqlens")
    check_tensor("log_probs", log_probs, LOG_PROB_DTYPES)
    if cu_seqlens is None and log_probs.ndim != 2:
        raise ValueError(
            f"log_probs must be (B, T), or (N,) with cu_seqlens; got {tuple(log_probs.shape)}"
        )
    if mask is not None:
        check_mask("mask", mask, log_probs)
    lengths = sequence_lengths(mask, cu_seqlens)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, log_probs)
    if lengths.shape[0] == 1 and group is None and not torch.compiler.is_compiling():
        warnings.warn(
            "delta_l_loss got one sequence. If it is a micro-batch, its loss is not its share of "
            "the batch's: call sequence_weights once for the whole rollout batch, and policy_loss "
            "with a slice of its weights. If it is the batch, pass group='local'",
            stacklevel=2,
        )
    weights = sequence_weights(lengths, alpha=alpha, max_length=max_length, group=group)
    return policy_loss(
        log_probs, old_log_probs, advantages, mask, weights, return_metrics=return_metrics,
        **options,
    )  # fmt: skip
