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

from dl_norm._metrics import PolicyLossMetrics
from dl_norm.surrogates import DppoTV, Drift, Ipo

from ._shared import adapter_loss, checked, needed, offsets, required, setting, token_mean_factors
from .kept import log_probs as kept_log_probs
from .kept import padded_sets

_NEEDS = "prime-rl, from its repository"


def own_loss(config: Any) -> dict[str, Any]:
    """prime-rl's own losses, ``[trainer.loss] type = "default"`` and ``"ipo"``, as options.

    Their policy term is -adv_tau A r with r = trainer / inference probability, but for tokens whose
    probability has moved by more than ``dppo_mask_low`` or ``dppo_mask_high`` (``ipo_threshold``
    either way), and the drift from the sampler costs kl_tau (log r)^2. The weights are on the
    advantages, so that term stays as prime-rl has it: a mean over tokens.

    Args:
        config: prime-rl's ``DefaultLossConfig`` or ``IPOLossConfig``, or a mapping with their
            fields. What is left out has prime-rl's default.

    Raises:
        ValueError: another ``type``.
    """
    kind = setting(config, "type", "default")
    if kind == "default":
        region = DppoTV(*(setting(config, f"dppo_mask_{side}", 0.2) for side in ("low", "high")))
    elif kind == "ipo":
        region = Ipo(setting(config, "ipo_threshold", 0.1))
    else:
        raise ValueError(
            f"own_loss is one of prime-rl's own losses, type 'default' or 'ipo', got {kind!r}"
        )
    kl_tau = setting(config, "kl_tau", 1e-3)
    return {
        "surrogate": region + Drift(2 * kl_tau) if kl_tau else region,
        "advantage_scale": setting(config, "adv_tau", 1.0),
        "unweighted_terms": True,
    }


def delta_l_loss(inputs: Any, *, own: Any = None, **options: Any) -> Any:
    """Loss of one sequence as a plain masked sum, by :func:`dl_norm.policy_loss`.

    Args:
        inputs: prime-rl's ``LossInputs``, (T,) streams. ``inference_logprobs`` are the old
            log-probs, ``loss_weights`` multiply the token losses.
        own: the settings of one of prime-rl's own losses, in the place of the clipped one:
            :func:`own_loss`.
        **options: of :func:`dl_norm.policy_loss`: eps_low, eps_high, surrogate, delta, ...

    Returns:
        prime-rl's ``LossOutputs``; metrics are 0-dim tensors under the names of its default loss.
    """
    outputs = needed("prime_rl.trainer.rl.loss", _NEEDS).LossOutputs
    names = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask")
    weights = inputs.loss_weights
    loss, metrics = _loss(
        *(getattr(inputs, name)[None] for name in names),
        rollout_weights=None if weights is None else weights[None],
        **_options(own, options),
    )
    return outputs(loss=loss, metrics=_names(metrics))


def make_compute_loss(*, own: Any = None, **options: Any):
    """A function with the signature of prime-rl's ``compute_loss``: one launch for all sequences.

    ``own`` and ``options`` are as for :func:`delta_l_loss`, ``own=config.loss`` is prime-rl's own
    loss; ``rl_loss_fn`` is not called. Put it in the place of the original:
    ``prime_rl.trainer.rl.train.compute_loss = make_compute_loss(...)``.
    Other components than rl (``ce_weights``, ``ref_kl_weights``) raise ValueError: they need the
    original with :func:`delta_l_loss`.
    """
    options = _options(own, options)
    checked({n: v for n, v in options.items() if n not in ("advantage_scale", "unweighted_terms")})

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
        streams = trainer_logprobs, inference_logprobs, advantages, loss_mask
        loss, metrics = _loss(
            *map(torch.cat, streams),
            rollout_weights=None if rl_weights is None else torch.cat(rl_weights),
            weights=1 / rl_scale,
            cu_seqlens=offsets([len(s) for s in trainer_logprobs], trainer_logprobs[0].device),
            **options,
        )
        return loss, {name: value[None] for name, value in _names(metrics).items()}

    return compute_loss


def _options(own: Any, options: dict[str, Any]) -> dict[str, Any]:
    if own is None:
        return options
    if "surrogate" in options:
        raise ValueError(
            f"surrogate={options['surrogate']!r} and own: own is a token loss already; give one"
        )
    return {**own_loss(own), **options}


def _loss(
    *streams: Tensor,
    rollout_weights: Tensor | None,
    advantage_scale: float = 1.0,
    **options: Any,
) -> tuple[Tensor, PolicyLossMetrics]:
    """Of padded or packed sequences; a token of weight 0 does not count."""
    *policies, advantages, mask = streams
    if rollout_weights is not None:
        mask = (mask != 0) & (rollout_weights != 0)
    if advantage_scale != 1:
        advantages = advantages * advantage_scale
    return adapter_loss(*policies, advantages, mask, rollout_weights=rollout_weights, **options)


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


def replay_kept_sets(head: type, **options: Any) -> None:
    """Make prime-rl's head compute a token that was drawn from a kept set over that set alone.

    For prime-rl with sampling replay, whose ``FusedOutputLinear`` makes all logits and masks them.
    Log-probs and their gradients are the same, by a gathered product
    (:func:`dl_norm.integrations.kept.log_probs`); the entropy, which prime-rl logs, is that of the
    softmax over the set there. Tokens without a set, those of the prompt too, go through the whole
    head; on a GPU counting them is one host sync.

    Args:
        head: ``prime_rl.trainer.models.layers.lm_head.FusedOutputLinear``.
        **options: of :func:`dl_norm.integrations.kept.log_probs`: compact, impl, ... With
            ``temperature``, that of all tokens, prime-rl's, one a token, are not read; by these
            the hidden states are divided, which rounds them where they are in half precision.
    """
    whole_head = head.forward
    outputs = needed("prime_rl.trainer.models.layers.lm_head", _NEEDS).PrimeLmOutput

    def forward(self, hidden_states, labels=None, temperature=None, kept_tokens=None):
        if kept_tokens is None:
            return whole_head(self, hidden_states, labels, temperature=temperature)
        labels = required(labels, "labels", "prime-rl's forward hands them to the head")
        if "temperature" not in options:
            each = required(temperature, "temperature", "prime-rl's forward hands it to the head")
            hidden_states = (hidden_states / each[..., None]).to(hidden_states.dtype)
        log_probs, entropy = kept_log_probs(
            hidden_states, self.weight, labels, *padded_sets(kept_tokens, labels), **options
        )
        return outputs(logprobs=log_probs, entropy=entropy)

    head.forward = forward


def _rl_tokens(sample: Any) -> int:
    if sample.rl_weights is None:
        return sum(map(bool, sample.mask))
    return sum(bool(m) and w != 0 for m, w in zip(sample.mask, sample.rl_weights, strict=True))


def _names(metrics: PolicyLossMetrics) -> dict[str, Tensor]:
    """Shares of the tokens without gradient, prime-rl's names: all, and by the side of a bound."""
    seen = metrics.summary()
    low, high, dual = (seen[f"clip_fraction_{kind}"] for kind in ("low", "high", "dual"))
    return {"is_masked": low + high + dual, "is_masked_low": low, "is_masked_high": high}
