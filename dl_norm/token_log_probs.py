"""Log-probs of tokens without gradient, for the old and the reference policy."""

from __future__ import annotations

import torch
from torch import Tensor

from .functional import _choose
from .linear import autocast_head, check_head, linear_pass, make_plan
from .logits import check_logits, implementation, row_settings
from .logits_closed_form import RowOutputs
from .token_rows import TokenRows, check_token_ids


@torch.compiler.disable
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
    entropy: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
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
        bias, temperature, logit_softcap, chunk_size, fp32_logits, max_tokens, compact, impl: as
            for :func:`dl_norm.linear_policy_loss`. For logits only temperature, logit_softcap and
            impl have a meaning.
        entropy: also return the entropy of the softmax, in nats.

    Returns:
        float32 log-probs of the shape of ``token_ids``, none above 0; or (log_probs, entropy).

    Raises:
        TypeError, ValueError: for what cannot be honoured, saying what was expected.
    """
    settings = row_settings(temperature, logit_softcap, None, False, entropy)
    if lm_head_weight is None:
        check_logits("hidden_or_logits", hidden_or_logits, "V")
        for name, value in (
            ("bias", bias), ("chunk_size", chunk_size), ("max_tokens", max_tokens),
            ("fp32_logits", fp32_logits or None), ("compact", compact or None),
        ):  # fmt: skip
            if value is not None:
                raise ValueError(f"{name} has no effect on logits: pass lm_head_weight or drop it")
        vocabulary = hidden_or_logits.shape[-1]
    else:
        check_head(hidden_or_logits, lm_head_weight, bias)
        vocabulary = lm_head_weight.shape[0]
    check_token_ids(token_ids, mask, hidden_or_logits.detach()[..., 0], vocabulary)
    if mask is None:
        active = torch.ones(token_ids.numel(), dtype=torch.bool, device=token_ids.device)
    else:
        active = (mask != 0).reshape(-1)
    rows = TokenRows(token_ids.reshape(-1), active)
    impl = _choose(impl, hidden_or_logits)
    if lm_head_weight is None:
        logits = hidden_or_logits
        if logits.stride(-1) != 1:
            logits = logits.contiguous()
        outputs = RowOutputs.zeros(rows.count, settings, logits.device)
        implementation(impl).logits_pass(logits, None, rows, 0, settings, outputs)
    else:
        plan = make_plan(rows, chunk_size, fp32_logits, max_tokens, compact)
        hidden, lm_head_weight, bias = autocast_head(hidden_or_logits, lm_head_weight, bias)
        outputs, _ = linear_pass(
            hidden.reshape(-1, hidden.shape[-1]), lm_head_weight, bias, rows, settings, plan, impl,
            (False, False, False),
        )  # fmt: skip
        if plan.overflow is not None:
            outputs.log_probs.masked_fill_(plan.overflow, torch.nan)
    log_probs = outputs.log_probs.view(token_ids.shape)
    if outputs.entropy is None:
        return log_probs
    return log_probs, outputs.entropy.view(token_ids.shape)
