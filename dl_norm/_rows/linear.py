"""The policy loss over hidden states: the head's matrix products and the loss, chunk by chunk."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal, cast, overload

import torch
from torch import Tensor

from .._checks import LOG_PROB_DTYPES
from .._device import implementation_for
from .._kept.sets import KeptSets, check_kept
from .._keywords import Impl, LinearOptions, LossOptions
from .autograd import LinearPolicyLossFunction
from .chunks import ChunkOptions
from .entropy import EntropyBonus
from .inputs import (
    PolicyLossOutputs,
    Wanted,
    check_logits,
    is_dtensor,
    make_row_call,
    row_settings,
)
from .records import VocabShard
from .shards import TensorParallelGroup, shard_of_head

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of typing from Python 3.11 on

# Asked here, as torch.compile of PyTorch 2.10 cannot trace the question.
AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "maia", "xla")
    if torch.amp.is_autocast_available(device)
)


@overload
def linear_policy_loss(  # pyright: ignore[reportOverlappingOverload]
    hidden: Tensor,
    lm_head_weight: Tensor,
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
    **options: Unpack[LinearOptions],
) -> Tensor: ...


@overload
def linear_policy_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
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
    **options: Unpack[LinearOptions],
) -> tuple[Tensor, PolicyLossOutputs]: ...


def linear_policy_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int | None = None,
    fp32_logits: bool = False,
    max_tokens: int | None = None,
    compact: bool = False,
    kept: KeptSets | None = None,
    entropy_coef: float = 0.0,
    entropy_weights: Tensor | None = None,
    tp_group: TensorParallelGroup | None = None,
    vocab_size: int | None = None,
    partial_hidden_grad: bool = False,
    impl: Impl | None = None,
    entropy: bool = False,
    sum_sq_probs: bool = False,
    return_log_probs: bool = False,
    return_metrics: bool = False,
    **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, PolicyLossOutputs]:
    r""":func:`dl_norm.logits_policy_loss` of logits = hidden @ lm_head_weight.T + bias.

    The logits exist for one chunk of tokens at a time. As their gradient is known in the forward
    pass, so are those of ``hidden`` and of the head: three matrix products in all, and the backward
    pass only scales what is stored. The head's gradient is summed over chunks in float32.

    Tokens that count for nothing (mask 0, or advantage 0 where neither a KL term nor an output is
    asked for) can be left out of the matrix products. How many are left has to be known on the
    host, so on a GPU there are three ways: by default every token goes through (no host sync);
    ``max_tokens`` says an upper bound (no host sync); ``compact=True`` counts them (one host
    sync). On a CPU they are always left out.

    Args:
        hidden: (B, T, D), or (N, D) with ``cu_seqlens``; float32, bfloat16 or float16. Row t
            predicts ``token_ids[t]``.
        lm_head_weight: (V, D), of the dtype of ``hidden``; under autocast both are cast. Frozen
            (requires_grad False): its matrix product is skipped. A DTensor (the head of a model
            under FSDP2) is gathered for the call, and its gradient is the mean over the ranks of
            its mesh, as FSDP2 takes it of all parameters.
        bias: (V,), or None.
        temperature, entropy_coef, entropy_weights, entropy, sum_sq_probs, return_log_probs,
            return_metrics, impl, and the tensors and options of the loss: as for
            :func:`dl_norm.logits_policy_loss`.
        logit_softcap: c > 0: logits become c tanh(logits / c), before the temperature. Or None.
        chunk_size: the least number of tokens in a chunk, unless there are fewer; a chunk has less
            than twice as many. Memory is one chunk's logits, at most 2 chunk_size * V elements.
            None: 4096 on a GPU, 192 on a CPU.
        fp32_logits: keep the logits of half-precision matrix products in float32. A bfloat16 logit
            between 16 and 32 is rounded to 0.125, up to 6 % of a ratio. Costs 3 times the memory
            of a chunk.
        max_tokens: an upper bound of the number of tokens with mask != 0, if the host knows one.
            If there are more, ValueError on a CPU; on a GPU the loss is NaN.
        compact: see above.
        kept: :class:`dl_norm.KeptSets`, what top-k, top-p or min-p sampling had left to draw each
            token from. The policy is then the softmax over that set K_t,

            log pi = z_y - log sum_{v in K_t} exp(z_v), z = logits / temperature,

            entropy (in the loss too) and sum_sq_probs are those of this softmax, and
            ``old_log_probs`` and ``ref_log_probs`` have to be over the same sets. Of the head the
            rows in the sets alone are read: two products of length D for each entry of a set, and a
            third for the head's gradient. A token whose set is itself has log-prob 0, no gradient,
            and costs nothing. Logits are float32, and tokens that count for nothing are left out,
            so chunk_size, max_tokens and compact are refused. On a CPU the head's gradient is
            sparse until backward, and its rows that are in no set take no memory until somebody
            writes them. With ``tp_group`` every rank has the sets of the whole vocabulary and reads
            the rows that are its own.
            A token that counts must be in its set: mask tokens without a set here, and add the loss
            of a call without ``kept`` whose mask is theirs.
        tp_group: the process group, or its 1-D DeviceMesh, over whose ranks the head is spread:
            tensor parallelism. ``lm_head_weight`` is then this rank's (V_local, D), ``bias`` its
            (V_local,), or DTensors that are Shard(0) on that mesh; a further dimension of a
            DTensor's mesh, that of FSDP2, is gathered, this one never. Everything else is the same
            on all ranks, ``token_ids`` ids of the whole vocabulary; rank r has the ids from
            r * ceil(V / ranks) on, as torch.chunk cuts. The gradient at ``hidden`` is summed over
            the ranks, chunk by chunk beside the products of the next, that at the head stays here.
            Communicated per token: 8 bytes (4 more for the entropy, 4 for sum_sq_probs) and one
            hidden state. Loss and outputs have the same bits on every rank. Ranks that disagree on
            tokens: ValueError on a CPU; on a GPU the loss is NaN, but one that passes fewer tokens
            than the others leaves them waiting, as in every collective.
        vocab_size: with ``tp_group``: V, where the shards are not equally large or are padded to
            be (Megatron's): rows of the head beyond V have no probability. None: V_local * ranks.
        partial_hidden_grad: with ``tp_group``: leave the gradient at ``hidden`` the part of this
            rank, for who adds it up in backward, as the all-gather of sequence parallelism does by
            a reduce-scatter.

    Returns:
        A 0-dim float32 loss, or (loss, PolicyLossOutputs). Deterministic: no atomics.

    Raises:
        TypeError, ValueError: for what cannot be honoured, saying what was expected. A wrong kept
            set makes the loss NaN on a GPU, where no value is read on the host.
        RuntimeError: on a second backward through one call (the stored gradients are scaled in
            place), and on a second derivative.

    Source: as :func:`dl_norm.logits_policy_loss`; kept sets arXiv:2512.02556.
    """
    chunks = ChunkOptions(chunk_size, fp32_logits, max_tokens, compact)
    shard = VocabShard()
    if tp_group is not None or vocab_size is not None or partial_hidden_grad:
        lm_head_weight, bias, shard = shard_of_head(
            hidden, lm_head_weight, bias, tp_group, vocab_size, partial_hidden_grad
        )
    check_head(hidden, lm_head_weight, bias, empty=shard.spread)
    vocabulary = shard.vocabulary if shard.spread else lm_head_weight.shape[0]
    wanted = Wanted(entropy, return_log_probs, return_metrics, sum_sq_probs)
    settings, rows, rollout_sums = make_row_call(
        "linear_policy_loss", hidden, token_ids,
        dict(
            options, old_log_probs=old_log_probs, advantages=advantages, mask=mask, weights=weights
        ),
        row_settings(temperature, logit_softcap, wanted, shard),
        vocabulary=vocabulary, wanted=wanted, bonus=EntropyBonus(entropy_coef, entropy_weights),
    )  # fmt: skip
    if kept is not None:
        chunks.check_unused()
        check_kept(kept, token_ids, mask, vocabulary)
    hidden, lm_head_weight, bias = whole_head(hidden, lm_head_weight, bias)
    needed = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (hidden, lm_head_weight, bias)
    )
    # What autocast asks for has been done: inside, it would cast the products' float32 operands.
    with without_autocast(hidden.device.type):
        results = LinearPolicyLossFunction.apply(
            hidden, lm_head_weight, bias, rows, settings, chunks, kept,
            implementation_for(impl, hidden), needed,
        )  # fmt: skip
    return wanted.outputs(results, token_ids.shape, weights, settings, rollout_sums)


def check_head(
    hidden: Tensor, lm_head_weight: Tensor, bias: Tensor | None, *, empty: bool = False
) -> None:
    """``empty``: it may be the part of a head that has no row."""
    check_logits("hidden", hidden, "D")
    size = (None, hidden.shape[-1])
    _check_parameter("lm_head_weight", lm_head_weight, hidden, size, "(V, D)", empty)
    if bias is not None:
        _check_parameter("bias", bias, hidden, (lm_head_weight.shape[0],), "(V,)", empty)


def _check_parameter(
    name: str, tensor: Tensor, hidden: Tensor, shape: tuple[int | None, ...], names: str,
    empty: bool,
) -> None:  # fmt: skip
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in LOG_PROB_DTYPES or (
        tensor.dtype != hidden.dtype and not _autocasts(hidden.device.type)
    ):
        raise TypeError(
            f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}: "
            "convert one of them, or call under torch.autocast"
        )
    if tensor.device != hidden.device:
        raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}: move it")
    wrong = tensor.ndim != len(shape) or tensor.shape[-1] != shape[-1]
    if wrong or (tensor.numel() == 0 and not empty):
        raise ValueError(
            f"{name} must be {names} and not empty, with hidden (..., D) = "
            f"{tuple(hidden.shape)}; got {tuple(tensor.shape)}"
        )


def _autocasts(device: str) -> bool:
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager:
    """A meta device has none to leave."""
    return torch.autocast(device, enabled=False) if device in AUTOCAST_DEVICES else nullcontext()


def whole_head(
    hidden: Tensor, lm_head_weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The head on this rank, cast as torch.nn.functional.linear does it under autocast; autograd
    casts, and spreads over the shards, the gradients."""
    device = hidden.device.type
    if _autocasts(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, lm_head_weight = hidden.to(dtype), lm_head_weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return hidden, _gathered(lm_head_weight), None if bias is None else _gathered(bias)


def _gathered(tensor: Tensor) -> Tensor:
    """All of a DTensor, whose gradient is then the mean over the ranks of its mesh."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Partial

    sharded = cast(DTensor, tensor)
    return sharded.full_tensor(grad_placements=[Partial("avg")] * sharded.device_mesh.ndim)
