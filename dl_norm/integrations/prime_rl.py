r"""DeltaL Normalization in prime-rl, as a custom loss.

The hook is ``f(inputs: LossInputs, **kwargs) -> LossOutputs``, called once per sequence. What a
user writes: README.md of this folder.

**Where the weights come from.** They ride on the advantages: prime-rl adds the sequences' losses
up and divides by N, the rl tokens of the step on all ranks, so the orchestrator multiplies the
advantages by x_i N, with N the same count, before it ships the step (:func:`weight_samples`).

The step's batch is the whole batch. ``filter_zero_advantages`` drops sequences before that; turn it
off, or they are left out of sum_j L_j^-alpha. Samples that prime-rl later cuts to its ``seq_len``
count with their full length here.

:func:`make_compute_loss` makes a ``prime_rl.trainer.rl.train.compute_loss`` that gives the packed
sequences to one kernel, without the loop over sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dl_norm.metrics import PolicyLossMetrics

from .shared import adapter_loss, checked, needed, offsets, token_mean_factors


def delta_l_loss(inputs: Any, **options: Any) -> Any:
    """Clipped loss of one sequence as a plain masked sum, by :func:`dl_norm.policy_loss`.

    Args:
        inputs: prime-rl's ``LossInputs``, (T,) streams. ``inference_logprobs`` are the old
            log-probs, ``loss_weights`` multiply the token losses.
        **options: of :func:`dl_norm.policy_loss`: eps_low, eps_high, surrogate, delta, ...

    Returns:
        prime-rl's ``LossOutputs``; metrics are 0-dim tensors under the names of its default loss.
    """
    outputs = needed("prime_rl.trainer.rl.loss", "prime-rl, from its repository").LossOutputs
    loss, metrics = adapter_loss(
        inputs.trainer_logprobs[None],
        inputs.inference_logprobs[None],
        inputs.advantages[None],
        inputs.loss_mask[None],
        rollout_weights=None if inputs.loss_weights is None else inputs.loss_weights[None],
        **options,
    )
    return outputs(loss=loss, metrics=_names(metrics))


def make_compute_loss(**options: Any):
    """A function with the signature of prime-rl's ``compute_loss``: one launch for all sequences.

    ``options`` are those of :func:`dl_norm.policy_loss`; ``rl_loss_fn`` is not called. Put it in
    the place of the original: ``prime_rl.trainer.rl.train.compute_loss = make_compute_loss(...)``.
    Other components than rl (``ce_weights``, ``ref_kl_weights``) raise ValueError: they need the
    original with :func:`delta_l_loss`.
    """
    checked(options)

    def compute_loss(
        trainer_logprobs,
        inference_logprobs,
        ref_logprobs,
        advantages,
        loss_mask,
        rl_weights,
        ce_weights,
        ref_kl_weights,
        rl_loss_fn,
        rl_scale,
        ce_scale,
        ref_kl_scale,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if ce_weights is not None or ref_kl_weights is not None:
            raise ValueError(
                "ce_weights and ref_kl_weights need prime-rl's own compute_loss: set the custom "
                "loss dl_norm.integrations.prime_rl.delta_l_loss instead"
            )
        log_probs, mask = torch.cat(trainer_logprobs), torch.cat(loss_mask)
        weights = None if rl_weights is None else torch.cat(rl_weights)
        if weights is not None:
            mask = (mask != 0) & (weights != 0)
        loss, metrics = adapter_loss(
            log_probs,
            torch.cat(inference_logprobs),
            torch.cat(advantages),
            mask,
            weights=1 / rl_scale,
            cu_seqlens=offsets([len(stream) for stream in trainer_logprobs], log_probs.device),
            rollout_weights=weights,
            **options,
        )
        return loss, {name: value[None] for name, value in _names(metrics).items()}

    return compute_loss


def weight_samples(samples: list[Any], *, alpha: float = 1.0, max_length: int) -> None:
    """Multiply the advantages of a step's samples by x_i N, in place.

    Args:
        samples: all of the step's ``TrainingSample``, before packing. L_i counts the tokens whose
            ``mask`` is set and whose ``rl_weights`` (if any) are not 0; N = sum_i L_i.
        alpha, max_length: as for :func:`dl_norm.sequence_weights`.

    Raises:
        ValueError: a sample with rl tokens but no advantages.
    """
    lengths = [_rl_tokens(sample) for sample in samples]
    factors = token_mean_factors(lengths, alpha=alpha, max_length=max_length)
    for sample, length, factor in zip(samples, lengths, factors, strict=True):
        if sample.advantages is None:
            if length:
                raise ValueError(f"a sample has {length} rl tokens but no advantages to weight")
            continue
        sample.advantages = [factor * advantage for advantage in sample.advantages]


def _rl_tokens(sample: Any) -> int:
    if sample.rl_weights is None:
        return sum(map(bool, sample.mask))
    return sum(bool(m) and w != 0 for m, w in zip(sample.mask, sample.rl_weights, strict=True))


def _names(metrics: PolicyLossMetrics) -> dict[str, Tensor]:
    seen = metrics.summary()
    low, high = seen["clip_fraction_low"], seen["clip_fraction_high"]
    return {"is_masked": low + high, "is_masked_low": low, "is_masked_high": high}
