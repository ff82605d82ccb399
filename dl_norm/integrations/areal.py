r"""DeltaL Normalization in AReaL, for an actor that calls ``engine.train_batch`` itself.

The hook is ``engine.train_batch(mb, loss_fn, loss_weight_fn)``, with ``loss_fn(logprobs, entropy,
input_data, vocab_min_logits=None, vocab_max_logits=None) -> loss`` and
``loss_weight_fn(input_data) -> Tensor``. What a user writes: README.md of this folder.

**Where the weights come from.** AReaL's engine itself: it multiplies the loss of micro-batch m by
w_m / sum_m w_m, summed over all micro-batches of all data-parallel ranks (and by their number,
against the averaging of gradients). With w_m = sum_{i in m} L_i^-alpha and the DeltaL loss of the
micro-batch alone,

    w_m / (sum_m w_m) * sum_{i in m} (1/M) L_i^-alpha / w_m * sum_t l_it,

w_m cancels and what is left is exactly sum_i x_i sum_t l_it over everything that one
``train_batch`` sees: an optimizer step. With ``ppo_n_minibatches=1`` that is the whole rollout;
with more each step has its own normaliser. Packed tokens go to the kernel with cu_seqlens, without
a loop over sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dl_norm
from dl_norm._rollout import token_weights

from . import rollout as settings_of
from ._shared import adapter_loss, checked, required


class DeltaLLoss:
    """Loss and loss weight of an AReaL micro-batch.

    Args:
        alpha, max_length: as for :func:`dl_norm.sequence_weights`.
        stats: AReaL's ``stats_tracker``, to log ``entropy``, ``importance_weight``, ``approx_kl``,
            ``clip_ratio``, ``new_logp`` and ``old_logp`` per token under its names, with a
            correction also ``behave_imp_weight`` and ``behave_approx_kl``, or None.
        rejection_sampling: the actor's setting of that name, for the decoupled loss. The weights
            exp(prox_logp - logprobs) and their bounds are computed in the kernel, by
            :func:`dl_norm.integrations.rollout.areal`. A rejected token keeps its place in the
            lengths L_i, as in AReaL's own denominators.
        **options: of :func:`dl_norm.policy_loss`: AReaL's eps_clip, eps_clip_higher and c_clip are
            ``eps_low``, ``eps_high`` (``eps_low`` if left out) and ``dual_clip``; also a
            ``rollout_correction`` in the place of ``rejection_sampling``.

    Raises:
        ValueError, TypeError: bad options; a ``rejection_sampling`` without a counterpart, or
            beside a ``rollout_correction``.
    """

    def __init__(
        self,
        *,
        max_length: int,
        alpha: float = 1.0,
        stats: Any = None,
        rejection_sampling: Any = None,
        **options: Any,
    ):
        if "eps_low" in options:
            options.setdefault("eps_high", options["eps_low"])
        if rejection_sampling is not None:
            if options.get("rollout_correction") is not None:
                raise ValueError("rejection_sampling beside rollout_correction: give one of them")
            options["rollout_correction"] = settings_of.areal(rejection_sampling)
        self.alpha, self.max_length, self.stats = alpha, max_length, stats
        self.correction = options.get("rollout_correction")
        self.options = checked(options, rollout=True)
        _check_level(self.options)
        self._weights(torch.ones(1, dtype=torch.int64))  # bad values raise here as well

    def __call__(
        self,
        logprobs: Tensor,
        entropy: Tensor,
        input_data: dict[str, Any],
        vocab_min_logits: Tensor | None = None,
        vocab_max_logits: Tensor | None = None,
    ) -> Tensor:
        """The DeltaL loss of this micro-batch alone; the engine makes it a part of the whole.

        Args:
            logprobs, entropy: (N,) packed, or (B, T).
            input_data: ``loss_mask``, ``advantages`` and ``logprobs`` of that shape, and
                ``prox_logp``, which then takes the place of ``logprobs`` as the old policy;
                ``cu_seqlens`` (G + 1,) if packed.

        Raises:
            ValueError: packed log-probs without cu_seqlens; a correction without ``prox_logp``.
        """
        mask, offsets = input_data["loss_mask"], _offsets(input_data)
        old = input_data.get("prox_logp")
        rollout = {}
        if self.correction is not None:
            remedy = "a rollout correction needs it: set actor.use_decoupled_loss=true"
            required(old, "prox_logp", remedy)
            rollout["rollout_log_probs"] = input_data["logprobs"]
        old = input_data["logprobs"] if old is None else old
        loss, _ = adapter_loss(
            logprobs,
            old,
            input_data["advantages"],
            mask,
            weights=self._weights(dl_norm.sequence_lengths(mask, offsets)),
            cu_seqlens=offsets,
            **rollout,
            **self.options,
        )
        if self.stats is not None:
            self._log(logprobs.detach(), old, entropy.detach(), input_data)
        return loss

    def weight(self, input_data: dict[str, Any]) -> Tensor:
        """``loss_weight_fn``: 0-dim float32 sum of L_i^-alpha over this micro-batch's sequences."""
        lengths = dl_norm.sequence_lengths(input_data["loss_mask"], _offsets(input_data))
        power = lengths.clamp(min=1).double() ** -self.alpha
        return power.masked_fill(lengths == 0, 0.0).sum().float()

    def _weights(self, lengths: Tensor) -> Tensor:
        return dl_norm.sequence_weights(
            lengths, alpha=self.alpha, max_length=self.max_length, group="local"
        )

    @torch.no_grad()
    def _log(self, log_probs: Tensor, old: Tensor, entropy: Tensor, data: dict[str, Any]) -> None:
        mask = data["loss_mask"].bool()
        log_ratio = (log_probs.float() - old.float()).masked_fill(~mask, 0.0)
        ratio, advantages = log_ratio.exp(), data["advantages"]
        low = (ratio < 1 - self.options.get("eps_low", 0.2)) & (advantages < 0)
        high = (ratio > 1 + self.options.get("eps_high", 0.2)) & (advantages > 0)
        self.stats.denominator(n_valid_tokens=mask)
        self.stats.stat(
            entropy=entropy.float(),
            importance_weight=ratio,
            approx_kl=log_ratio,
            clip_ratio=((low | high) & mask).float(),
            new_logp=log_probs.float(),
            old_logp=old.float(),
            denominator="n_valid_tokens",
        )
        if self.correction is not None:
            sampled = data["logprobs"]
            weight = token_weights(old, sampled, mask, self.correction, cu_seqlens=_offsets(data))
            kept = mask & (weight > 0)
            self.stats.denominator(unclipped_behave_tokens=kept)
            self.stats.stat(
                behave_imp_weight=weight,
                behave_approx_kl=(old.float() - sampled.float()).masked_fill(~kept, 0.0),
                denominator="unclipped_behave_tokens",
            )


def _check_level(options: dict[str, Any]) -> None:
    """AReaL's ratio of a sequence is that of the tokens which a correction has kept."""
    correction = options.get("rollout_correction")
    if correction is None or options.get("ratio_level", "token") == "token":
        return
    by_token = correction.level == "token" and correction.mode == "mask"
    if by_token or any(one.over == "token" for one in correction.reject):
        raise ValueError(
            f"ratio_level={options['ratio_level']!r} with a correction that drops single tokens is "
            "not supported here: AReaL leaves those out of a sequence's ratio, and "
            "dl_norm.policy_loss does not. Take ratio_level='token', truncated weights, or a "
            "correction by sequences"
        )


def _offsets(input_data: dict[str, Any]) -> Tensor | None:
    offsets = input_data.get("cu_seqlens")
    if offsets is None and input_data["loss_mask"].ndim != 2:
        raise ValueError(
            "packed data needs cu_seqlens, which AReaL's engines put into input_data; without it "
            "the micro-batch would count as one sequence"
        )
    return offsets
