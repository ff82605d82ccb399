r"""DeltaL Normalization in slime, by its function-path options.

Read: slime 0.3.1 and main (624b824a). What a user adds to the training command::

    --custom-advantage-function-path dl_norm.integrations.slime.advantages
    --custom-pg-loss-reducer-function-path dl_norm.integrations.slime.pg_loss_reducer
    --custom-config-path delta_l.yaml        # delta_l_alpha: 0.75, delta_l_max_length: 3072

The reducer keeps all of slime's loss (KL, entropy, TIS, metrics) and only changes how token losses
become one number. For the fused kernel on the packed tokens instead of the reducer::

    --loss-type custom_loss --custom-loss-function-path dl_norm.integrations.slime.policy_loss

**Where the weights come from.** They ride on the advantages. :func:`advantages` sees this rank's
share of the whole rollout and sums over the data-parallel group; the reducer and the loss are
plain masked sums. slime multiplies the loss by num_microbatches * dp_size / G (Megatron undoes the
first two), with G the number of rollouts of a step, so the factor is f_i = (1/M) B L_i^-alpha /
sum_j L_j^-alpha with B the samples of the rollout, and f_i / G = x_i B / G: the mean of the B / G
steps is the whole. One sample per rollout is assumed (slime counts siblings as one).

``--calculate-per-token-loss`` divides by tokens instead and raises; so do
``--normalize-advantages`` and ``--use-opd``, which would act on the weights too.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dl_norm

from .carried import carried_loss, clip_fraction, offsets, refuse, required, row_factors

_INSTALL = "needs slime with its Megatron backend, from its repository"


def advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """slime's GRPO advantages times the DeltaL factors, as ``--custom-advantage-function-path``.

    Args:
        args: ``delta_l_alpha`` (1 if left out); M is ``delta_l_max_length``, or
            ``rollout_max_response_len``.
        rollout_data: this rank's samples: ``rewards``, ``response_lengths``, ``loss_masks`` and
            ``kl`` (slime puts it there before the call). Sets ``advantages`` and ``returns``.
    """
    refuse(
        "slime",
        {name: getattr(args, name, False) for name in ("normalize_advantages", "use_opd")},
        "it would act on the advantages after they carry the DeltaL weights; turn it off",
    )
    _check_reduction(args.calculate_per_token_loss)
    max_length = getattr(args, "delta_l_max_length", None) or required(
        getattr(args, "rollout_max_response_len", None),
        "delta_l_max_length",
        "put the constant M into --custom-config-path, or set --rollout-max-response-len",
    )
    masks = rollout_data["loss_masks"]
    lengths = dl_norm.sequence_lengths(
        torch.cat(masks), offsets(rollout_data["response_lengths"], masks[0].device)
    )
    factors = row_factors(
        lengths, alpha=getattr(args, "delta_l_alpha", 1.0), group=_data_parallel_group()
    )
    rewards = torch.tensor(rollout_data["rewards"], dtype=torch.float32, device=factors.device)
    weighted = (rewards * factors / max_length).unbind()
    rollout_data["advantages"] = [
        torch.full_like(kl, 1.0) * value
        for kl, value in zip(rollout_data["kl"], weighted, strict=True)
    ]
    rollout_data["returns"] = rollout_data["advantages"]


def pg_loss_reducer(
    total_lengths: list[int],
    response_lengths: list[int],
    loss_masks: list[Tensor],
    calculate_per_token_loss: bool = False,
) -> Callable[[Tensor], Tensor]:
    """The masked sum of a micro-batch's token losses, as
    ``--custom-pg-loss-reducer-function-path``.

    Without context parallelism one sum over the packed tokens. With it slime's own sum of tokens,
    which knows how sequences are cut.
    """
    _check_reduction(calculate_per_token_loss)

    def reduce(pg_loss: Tensor) -> Tensor:
        if pg_loss.shape[0] == sum(response_lengths):
            mask = torch.cat(loss_masks)
            return (pg_loss.masked_fill(mask == 0, 0.0) * mask).sum()
        try:
            from slime.backends.megatron_utils.cp_utils import get_sum_of_sample_mean
        except ImportError as error:
            raise ImportError(f"tokens cut over context-parallel ranks: {_INSTALL}") from error
        return get_sum_of_sample_mean(total_lengths, response_lengths, loss_masks, None, True)(
            pg_loss
        )

    return reduce


def policy_loss(
    args: Any,
    batch: dict[str, Any],
    logits: Tensor,
    sum_of_sample_mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's clipped policy loss by the fused kernel, as ``--custom-loss-function-path``.

    The packed (N,) response tokens go to :func:`dl_norm.policy_loss` with cu_seqlens, without a
    loop over samples. ``sum_of_sample_mean`` is not used.

    Returns:
        (loss, metrics), metrics 0-dim tensors under slime's names. slime divides metrics by the
        number of samples of the step, so means over tokens are multiplied by the micro-batch's
        samples.

    Raises:
        ValueError: an option that this loss cannot follow (the reducer keeps them all), a missing
            field of the batch, tokens cut over context-parallel ranks.
    """
    names = ("use_kl_loss", "entropy_coef", "use_tis", "get_mismatch_metrics", "use_opsm")
    refuse(
        "slime",
        {name: getattr(args, name, False) for name in names},
        "use --custom-pg-loss-reducer-function-path dl_norm.integrations.slime.pg_loss_reducer",
    )
    if getattr(args, "advantage_estimator", "grpo") in ("gspo", "cispo"):
        raise ValueError("slime's gspo and cispo need its own loss: use the reducer")
    _check_reduction(args.calculate_per_token_loss)
    try:
        from slime.backends.megatron_utils.loss import (
            get_log_probs_and_entropy,
            get_rollout_top_p_logprob_kwargs,
        )
    except ImportError as error:
        raise ImportError(f"dl_norm.integrations.slime.policy_loss {_INSTALL}") from error
    _, streams = get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=False,
        **get_rollout_top_p_logprob_kwargs(args, batch),
    )
    log_probs = torch.cat(streams["log_probs"])
    lengths = batch["response_lengths"]
    if log_probs.shape[0] != sum(lengths):
        raise ValueError("tokens are cut over context-parallel ranks: use the reducer instead")
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    loss, seen = carried_loss(
        log_probs,
        torch.cat(old) if old else None,
        torch.cat(required(batch.get("advantages"), "advantages", "slime computes them before")),
        torch.cat(batch["loss_masks"]),
        cu_seqlens=offsets(lengths, log_probs.device),
        eps_low=args.eps_clip,
        eps_high=args.eps_clip_high,
        dual_clip=args.eps_clip_c,
    )
    if log_probs.numel() == 0:
        loss = loss + 0 * logits.sum()  # every rank runs backward
    samples = len(lengths)
    return loss, {
        "loss": loss.detach(),
        "pg_loss": loss.detach(),
        "pg_clipfrac": clip_fraction(seen) * samples,
        "ppo_kl": seen.kl_old_k1 / seen.tokens.clamp(min=1) * samples,
    }


def _check_reduction(calculate_per_token_loss: bool) -> None:
    if calculate_per_token_loss:
        raise ValueError(
            "--calculate-per-token-loss divides by the tokens of the step; DeltaL needs the number "
            "of samples: leave it out"
        )


def _data_parallel_group():
    try:
        from megatron.core import mpu  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"dl_norm.integrations.slime.advantages {_INSTALL}") from error
    return mpu.get_data_parallel_group()
