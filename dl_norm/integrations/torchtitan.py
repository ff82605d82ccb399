r"""DeltaL Normalization in torchtitan's RL trainer (``torchtitan/experiments/rl``).

Its hooks are two configurations: ``AsyncLoopConfig.batcher`` and ``PolicyTrainer.Config.loss``.
What a user writes: README.md of this folder.

**Where the weights come from.** They ride on the advantages. torchtitan adds the token losses of a
step up over micro-batches and ranks (its FSDP does not average) and divides by N, the step's
response tokens with a finite sampler log-prob. The batcher holds all samples of a step, so
:class:`DeltaLBatcher` multiplies their advantages by x_i N, with the same tokens counted. That is
all that torchtitan's own ``GRPOLoss`` and ``DAPOLoss`` need, under ``ChunkedLossWrapper``, tensor
and context parallelism too. Samples longer than a packed row are dropped before.

:class:`DeltaLLoss` takes the place of these losses for the options that they do not have.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from dl_norm._rollout import needs_sequences, rollout_of

from ._shared import (
    adapter_loss,
    check_scales_with_advantages,
    checked,
    clip_fraction,
    token_mean_factors,
)

try:
    from torchtitan.components.loss import BaseLoss, compute_logprobs
    from torchtitan.experiments.rl.components.batcher import Batcher
except ImportError as error:
    raise ImportError(
        "dl_norm.integrations.torchtitan needs torchtitan 0.3 with what its experiments/rl asks for"
    ) from error

_LOG_RATIO_CLAMP = 10.0  # torchtitan's


class DeltaLBatcher(Batcher):
    """torchtitan's batcher, whose samples' advantages carry the DeltaL weights of their step."""

    @dataclass(kw_only=True, slots=True)
    class Config(Batcher.Config):
        max_length: int
        """The constant M."""
        alpha: float = 1.0
        """As for :func:`dl_norm.sequence_weights`."""

    def __init__(self, config: Config, **kwargs: Any):
        super().__init__(config, **kwargs)
        self._weighting = {"alpha": config.alpha, "max_length": config.max_length}
        token_mean_factors([1], **self._weighting)  # bad values raise here

    def _take_groups(self):
        samples, *rest = super()._take_groups()
        factors = token_mean_factors([_length(sample) for sample in samples], **self._weighting)
        for sample, factor in zip(samples, factors, strict=True):
            sample.advantage = [factor * advantage for advantage in sample.advantage]
        return samples, *rest


def weighted(batcher: Any, *, alpha: float = 1.0, max_length: int) -> DeltaLBatcher.Config:
    """The configuration of a batcher of torchtitan's as that of a :class:`DeltaLBatcher`."""
    settings = {one.name: getattr(batcher, one.name) for one in fields(batcher)}
    return DeltaLBatcher.Config(**settings, alpha=alpha, max_length=max_length)


class DeltaLLoss(BaseLoss):
    """torchtitan's clipped loss by :func:`dl_norm.policy_loss`, with the options of that.

    A plain sum over the tokens divided by ``global_valid_tokens``, for a :class:`DeltaLBatcher`. It
    may be the ``loss_fn`` of ``ChunkedLossWrapper``. Where sequences begin is not known here, so a
    ``ratio_level`` of sequences raises ValueError.

    To torchtitan's losses the generator is the old policy. With a ``rollout_correction`` among the
    options it is the rollout, and the current policy is its own old one: the gradient is that of
    -A w log pi with the constant w = pi / pi_generator, truncated or masked by the correction (TIS,
    IcePop), whose level and rejections are of tokens.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        options: dict[str, Any] = field(default_factory=dict)
        """Of :func:`dl_norm.policy_loss`: ``eps_low``, ``eps_high``, ``surrogate``, ..."""

    def __init__(self, config: Config, *, compile_config: Any = None):
        options = {"log_ratio_clamp": _LOG_RATIO_CLAMP, **config.options}
        self.options = checked(options, rollout=True)
        check_scales_with_advantages(self.options)
        if self.options.get("ratio_level", "token") != "token":
            raise ValueError("torchtitan's loss sees no sequences: ratio_level must be 'token'")
        correction = rollout_of(self.options.get("rollout_correction"))
        if needs_sequences(correction):
            raise ValueError(
                "torchtitan's loss sees no sequences: a rollout_correction must have level='token' "
                "(or 'none') and reject over='token', without veto"
            )
        self.corrects = correction.level != "off"

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        global_valid_tokens: float | None = None,
        *,
        generator_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics (shares of the step's means) of a micro-batch or a chunk of one.

        Args:
            logits, labels: (B, T, V) and (B, T), or (N, V) and (N,); the others like ``labels``.
        """
        log_probs, entropy = compute_logprobs(logits, labels, return_entropy=True)
        mask = (loss_mask != 0) & torch.isfinite(generator_logprobs)
        tokens = 1 if global_valid_tokens is None else max(global_valid_tokens, 1)
        log_probs, generated, *others = (
            stream.reshape(1, -1) for stream in (log_probs, generator_logprobs, advantages, mask)
        )
        loss, seen = adapter_loss(
            log_probs,
            None if self.corrects else generated,
            *others,
            weights=1 / tokens,
            rollout_log_probs=generated if self.corrects else None,
            **self.options,
        )
        ratio, clipped = seen.ratio, clip_fraction(seen) * seen.tokens
        if seen.rollout is not None:  # of exp(d), by k1 = -d and k3 = exp(d) - 1 - d
            ratio = seen.tokens + seen.rollout.k3 - seen.rollout.k1
            clipped = seen.rollout.truncated + seen.rollout.masked
        return loss, {
            "loss/mean": loss.detach(),
            "loss/ratio_mean": ratio / tokens,
            "loss/ratio_clipped_frac": clipped / tokens,
            "trainer/entropy/mean": (entropy * mask).sum() / tokens,
        }


def _length(sample: Any) -> int:
    """Tokens that torchtitan's loss counts: the first one has no log-prob."""
    counted = zip(sample.loss_mask[1:], sample.logprobs[1:], strict=True)
    return sum(bool(mask) and math.isfinite(log_prob) for mask, log_prob in counted)
