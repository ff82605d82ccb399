"""Log-probs of tokens without gradient, for the old and the reference policy."""

from __future__ import annotations

import torch
from torch import Tensor

from .._device import implementation_for
from .._kept.sets import KeptSets, check_kept
from .autograd import token_log_probs_forward
from .chunks import ChunkOptions
from .inputs import Wanted, check_logits, check_token_ids, row_settings
from .linear import check_head, whole_head, without_autocast
from .records import TokenRows, VocabShard
from .shards import TensorParallelGroup, shard_of_head, shard_of_logits


@torch.no_grad()
def token_log_probs(
    hidden_or_logits: Tensor,
    token_ids: Tensor,
    lm_head_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int | None = None,
    fp32_logits: bool = False,
    max_tokens: int | None = None,
    compact: bool = False,
    kept: KeptSets | None = None,
    tp_group: TensorParallelGroup | None = None,
    vocab_size: int | None = None,
    entropy: bool = False,
    sum_sq_probs: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """log_softmax(logits / temperature)[token_ids], never differentiated.

    The same code as :func:`dl_norm.linear_policy_loss` and :func:`dl_norm.logits_policy_loss`: for
    equal logits the result has the same bits as theirs, and the ratio to it is exactly 1, if rows
    are whole 16-byte vectors (V a multiple of 8; otherwise to the rounding of one sum). Logits
    from matrix products of other shapes may differ in their last bits.

    Args:
        hidden_or_logits: hidden states (B, T, D) or (N, D) if ``lm_head_weight`` is given, else
            logits (B, T, V) or (N, V); float32, bfloat16 or float16.
        token_ids: (B, T) or (N,), int64 or int32, in [0, V) where mask != 0.
        lm_head_weight: (V, D), or None.
        mask: of the shape of ``token_ids``; where it is 0 the results are 0. None: all tokens.
        bias, temperature, logit_softcap, chunk_size, fp32_logits, max_tokens, compact, kept, impl:
            as for :func:`dl_norm.linear_policy_loss`. For logits only temperature, logit_softcap
            and impl have a meaning.
        tp_group, vocab_size: as for the two losses, of the head or of the logits.
        entropy: also return the entropy of the softmax, in nats.
        sum_sq_probs: also return sum_v p_v^2 of the softmax.

    Returns:
        float32 log-probs of the shape of ``token_ids``, none above 0; or a tuple of these and of
        what else is asked for, in that order.

    Raises:
        TypeError, ValueError: for what cannot be honoured, saying what was expected.
    """
    chunks = ChunkOptions(chunk_size, fp32_logits, max_tokens, compact)
    shard = VocabShard()
    if tp_group is None and vocab_size is None:
        pass
    elif lm_head_weight is None:
        hidden_or_logits, shard = shard_of_logits(
            "hidden_or_logits", hidden_or_logits, tp_group, vocab_size
        )
    else:
        lm_head_weight, bias, shard = shard_of_head(
            hidden_or_logits, lm_head_weight, bias, tp_group, vocab_size
        )
    wanted = Wanted(entropy, True, False, sum_sq_probs)
    settings = row_settings(temperature, logit_softcap, wanted, shard)
    if lm_head_weight is None:
        check_logits("hidden_or_logits", hidden_or_logits, "V", empty=shard.spread)
        for name, value in (
            ("bias", bias), ("kept", kept), ("chunk_size", chunk_size), ("max_tokens", max_tokens),
            ("fp32_logits", fp32_logits), ("compact", compact),
        ):  # fmt: skip
            if value is not None and value is not False:
                raise ValueError(f"{name} has no effect on logits: pass lm_head_weight or drop it")
        vocabulary = hidden_or_logits.shape[-1]
    else:
        check_head(hidden_or_logits, lm_head_weight, bias, empty=shard.spread)
        vocabulary = lm_head_weight.shape[0]
    vocabulary = shard.vocabulary if shard.spread else vocabulary
    check_token_ids(token_ids, mask, hidden_or_logits.detach()[..., 0], vocabulary)
    if kept is not None:
        chunks.check_unused()
        check_kept(kept, token_ids, mask, vocabulary)
    if mask is None:
        active = torch.ones(token_ids.numel(), dtype=torch.bool, device=token_ids.device)
    else:
        active = (mask != 0).reshape(-1).contiguous()
    impl = implementation_for(impl, hidden_or_logits)
    if lm_head_weight is not None:
        hidden_or_logits, lm_head_weight, bias = whole_head(hidden_or_logits, lm_head_weight, bias)
    elif hidden_or_logits.stride(-1) != 1:
        hidden_or_logits = hidden_or_logits.contiguous()
    rows = TokenRows(token_ids.reshape(-1).contiguous(), active)
    # What autocast asks for has been done.
    with without_autocast(token_ids.device.type):
        results = token_log_probs_forward(
            hidden_or_logits, lm_head_weight, bias, rows, settings, chunks, kept, impl
        )
    asked = (True, entropy, sum_sq_probs)
    found = [
        values.view(token_ids.shape) for values, yes in zip(results, asked, strict=True) if yes
    ]
    return found[0] if len(found) == 1 else tuple(found)
