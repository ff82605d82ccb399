"""The policy loss over logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from .._checks import check_flag
from .._device import implementation_for
from .._keywords import Impl, LogitsOptions, LossOptions
from .autograd import LogitsPolicyLossFunction
from .entropy import EntropyBonus
from .inputs import PolicyLossOutputs, Wanted, check_logits, make_row_call, row_settings
from .records import VocabShard
from .shards import TensorParallelGroup, shard_of_logits

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of typing from Python 3.11 on


@overload
def logits_policy_loss(  # pyright: ignore[reportOverlappingOverload]
    logits: Tensor,
    token_ids: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    *,
    entropy: Literal[False] = False,
    sum_sq_probs: Literal[False] = False,
    return_log_probs: Literal[False] = False,
    return_metrics: Literal[False] = False,
    **options: Unpack[LogitsOptions],
) -> Tensor: ...


@overload
def logits_policy_loss(
    logits: Tensor,
    token_ids: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    *,
    entropy: bool = False,
    sum_sq_probs: bool = False,
    return_log_probs: bool = False,
    return_metrics: bool = False,
    **options: Unpack[LogitsOptions],
) -> tuple[Tensor, PolicyLossOutputs]: ...


def logits_policy_loss(
    logits: Tensor,
    token_ids: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    *,
    temperature: float = 1.0,
    in_place: bool = False,
    entropy_coef: float = 0.0,
    entropy_weights: Tensor | None = None,
    tp_group: TensorParallelGroup | None = None,
    vocab_size: int | None = None,
    impl: Impl | None = None,
    entropy: bool = False,
    sum_sq_probs: bool = False,
    return_log_probs: bool = False,
    return_metrics: bool = False,
    **options: Unpack[LossOptions],
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
            rollout_log_probs, rollout_correction, rollout_mean_weight, entropy_mask,
            sequence_mask: as for :func:`dl_norm.policy_loss`. Given ``old_log_probs`` a rollout
            correction is known before the logits are read, and rows that it drops are left out
            like those of advantage 0. Without them the kernel corrects by its own log-probs, one
            token at a time: what needs a whole sequence is refused.
        temperature: > 0, of the policy that sampled.
        in_place: write the gradient over ``logits``, so that there is no second (B, T, V) buffer.
            The logits are lost to the caller. They must be contiguous and not a leaf that
            requires a gradient, and another operation that keeps them for its own backward pass
            raises there. Without a gradient to compute nothing is written. Not under
            torch.compile, which plans its memory itself.
        entropy_coef: c >= 0: the loss is less by c sum_t w_t H_t, with H_t the entropy of
            softmax(logits / temperature), over the tokens with mask != 0 whatever their advantage
            or policy weight. Its gradient, at the logits c w_t p (log p + H_t) / temperature, comes
            from the same two passes over the row. The number may be another one in every step.
        entropy_weights: w_t, float32: (G,), or one per token like ``token_ids`` (0 leaves a token
            out, as a mask of high entropy does). None: ``weights``.
        entropy, sum_sq_probs, return_log_probs, return_metrics: also return
            :class:`PolicyLossOutputs`, from the same pass.
        tp_group: the process group, or its 1-D DeviceMesh, over whose ranks the vocabulary is
            spread: ``logits`` are then this rank's (B, T, V_local), or a DTensor that is
            Shard(-1) on that mesh, and everything else is the same on all ranks, ``token_ids``
            ids of the whole vocabulary. Rank r has the ids from r * ceil(V / ranks) on, as
            torch.chunk cuts. No rank holds a whole row; two small collectives take its place (8 to
            20 bytes a token). Loss and outputs have the same bits on every rank.
        vocab_size: with ``tp_group``: V, where the shards are not equally large or are padded to
            be (Megatron's): columns beyond V have no probability. None: V_local * ranks.
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
    check_flag(in_place, "in_place")
    shard = VocabShard()
    if tp_group is not None or vocab_size is not None:
        logits, shard = shard_of_logits("logits", logits, tp_group, vocab_size)
    check_logits("logits", logits, "V", empty=shard.spread)
    wanted = Wanted(entropy, return_log_probs, return_metrics, sum_sq_probs)
    settings, rows, rollout_sums = make_row_call(
        "logits_policy_loss", logits, token_ids,
        dict(
            options, old_log_probs=old_log_probs, advantages=advantages, mask=mask, weights=weights
        ),
        row_settings(temperature, None, wanted, shard),
        vocabulary=shard.vocabulary if shard.spread else logits.shape[-1],
        wanted=wanted, bonus=EntropyBonus(entropy_coef, entropy_weights),
    )  # fmt: skip
    write_grad = torch.is_grad_enabled() and logits.requires_grad
    if in_place and write_grad:
        _check_in_place(logits)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    results = LogitsPolicyLossFunction.apply(
        logits, rows, settings, implementation_for(impl, logits), in_place, write_grad
    )
    return wanted.outputs(results, token_ids.shape, weights, settings, rollout_sums)


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
