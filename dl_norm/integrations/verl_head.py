"""Log-probs and entropies of verl's Megatron engine, whose head is spread over processes.

What a user writes: README.md of this folder. verl's engine takes Megatron-Core's cross-entropy,
which keeps the softmax of this rank's logits in float32 for backward, and for the entropy a copy of
the logits and another softmax. Here forward reads the logits once, for the log-probs, the entropy
and sum p^2 together, and keeps nothing but the logits; backward computes the gradient of both from
them again, and only of tokens that have one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dl_norm

from ._shared import needed


def shard_outputs(
    logits: Tensor,
    labels: Tensor,
    group: Any,
    *,
    entropy: bool = False,
    sum_sq_probs: bool = False,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """Log-probs of ``labels``, differentiable, from this rank's columns of the logits.

    Args:
        logits: (1, N, V_local) or (B, T, V_local); float32, bfloat16 or float16.
        labels: (1, N) or (B, T), ids of the whole vocabulary.
        group: the tensor-parallel process group, of one process or more.
        entropy, sum_sq_probs: also these, of the softmax over the whole vocabulary.
        vocab_size: without the columns that pad the vocabulary; None counts them in, as
            Megatron-Core does.

    Returns:
        float32 like ``labels``, under verl's names: "log_probs"; "entropy", differentiable too;
        "sum_pi_squared", without gradient.

    Raises:
        TypeError, ValueError: as :func:`dl_norm.token_log_probs`.
    """
    found = _ShardOutputs.apply(logits, labels, group, entropy, sum_sq_probs, vocab_size)
    asked = {"log_probs": True, "entropy": entropy, "sum_pi_squared": sum_sq_probs}
    return dict(zip([name for name, yes in asked.items() if yes], found, strict=True))


class _ShardOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, group, entropy, sum_sq_probs, vocab_size):
        ctx.save_for_backward(logits, labels)
        ctx.spread = {"tp_group": group, "vocab_size": vocab_size}
        asked = {"entropy": entropy, "sum_sq_probs": sum_sq_probs}
        found: Any = dl_norm.token_log_probs(logits, labels, **asked, **ctx.spread)
        ctx.entropy = entropy
        outputs = found if isinstance(found, tuple) else (found,)
        if sum_sq_probs:
            ctx.mark_non_differentiable(outputs[-1])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (logits, labels), (of_log_probs, *others) = ctx.saved_tensors, gradients
        bonus: dict[str, Any] = {}
        counts = of_log_probs != 0
        if ctx.entropy:
            counts = counts | (others[0] != 0)
            bonus = {"entropy_coef": 1.0, "entropy_weights": -others[0].float()}
        leaf = logits.detach().requires_grad_()
        ones = torch.ones(len(labels), device=logits.device)
        with torch.enable_grad():
            # Without old log-probs the loss of advantage A has gradient -A at a log-prob.
            loss: Any = dl_norm.logits_policy_loss(
                leaf, labels, None, -of_log_probs.float(), counts, ones, **bonus, **ctx.spread
            )
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient, None, None, None, None, None


def use_sharded_head(engine: Any) -> None:
    """Makes ``engine``, verl's ``MegatronEngineWithLMHead``, take :func:`shard_outputs`.

    Its ``_lm_head_logits_processor`` is replaced. Distillation stays verl's own, and so does the
    engine's fused forward (``use_fused_kernels=true``), which has no logits.

    Raises:
        TypeError: the class has no such method: it is of another version of verl.
    """
    verls = getattr(engine, "_lm_head_logits_processor", None)
    if verls is None:
        raise TypeError(
            f"use_sharded_head takes verl 0.9.1's MegatronEngineWithLMHead; {engine!r} has no "
            "_lm_head_logits_processor"
        )

    def processor(
        self: Any,
        logits: Tensor,
        label: Tensor,
        temperature: Tensor,
        *,
        calculate_sum_pi_squared: bool,
        calculate_entropy: bool,
        **others: Any,
    ) -> dict[str, Tensor]:
        asked = {"entropy": calculate_entropy, "sum_sq_probs": calculate_sum_pi_squared}
        if others.get("distillation_use_topk") or others.get("distillation_only"):
            return verls(
                self, logits, label, temperature, calculate_entropy=calculate_entropy,
                calculate_sum_pi_squared=calculate_sum_pi_squared, **others,
            )  # fmt: skip
        # 0 is that of padding.
        logits.div_(temperature.clamp(min=1e-8).unsqueeze(-1).to(logits.dtype))
        parallel = needed("megatron.core.parallel_state", "Megatron-Core, as verl's engine")
        group = parallel.get_tensor_model_parallel_group()
        return shard_outputs(logits, label, group, **asked)

    engine._lm_head_logits_processor = processor
