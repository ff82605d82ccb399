"""Log-probs and entropies of verl's Megatron engine, whose head is spread over processes.

What a user writes: README.md of this folder. verl's engine takes Megatron-Core's cross-entropy,
which keeps the softmax of this rank's logits in float32 for backward, and for the entropy a copy of
the logits and another softmax. Here forward reads the logits once, for the log-probs, the entropy
and sum p^2 together, and keeps nothing but the logits; backward computes the gradient of both from
them again, and only of tokens that have one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._shared import needed
from .log_probs import log_probs


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
    first, *others = log_probs(
        logits, labels, tp_group=group, vocab_size=vocab_size, entropy=entropy, entropy_grad=True,
        sum_sq_probs=sum_sq_probs,
    )  # fmt: skip
    names = ("log_probs", "entropy", "sum_pi_squared")
    found = zip(names, (first, *others), strict=False)
    return {name: values for name, values in found if values is not None}


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
