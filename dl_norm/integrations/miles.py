r"""DeltaL Normalization in Miles, a fork of slime, by its function-path options.

What a user adds to the training command: README.md of this folder. Miles has slime's hooks for the
loss and none for the advantages, so the weights get in one step earlier.

**Where the weights come from.** :func:`rewards` is ``--custom-reward-post-process-path``: the
rollout manager calls it with the samples of the whole rollout, before they are spread over ranks.
It takes Miles' own rewards, normalised by group, which become the advantages of GRPO, and
multiplies them by f_i = (1/M) B L_i^-alpha / sum_j L_j^-alpha. Miles divides a step by G, its
number of rollouts (siblings of one rollout count once), and B is the number of rollouts likewise:
f_i / G = x_i B / G, and the mean of the B / G steps is the whole. (The reward that Miles logs as
``rewards`` is the weighted one; ``raw_reward`` is as before.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dl_norm

from ._shared import needed, refuse
from .slime import check_args, check_loss_args, masked_sum, max_length, with_kernels
from .slime_loss import packed_loss

_NEEDS = "Miles, from its repository"


def rewards(args: Any, samples: list[Any]) -> tuple[list[float], list[float]]:
    """Miles' raw rewards, and its normalised rewards times the DeltaL factors.

    Args:
        args: ``delta_l_alpha`` (1 if left out); M is ``delta_l_max_length``, or
            ``rollout_max_response_len``.
        samples: the whole rollout. L_i are the tokens of ``loss_mask`` that are set, all
            ``response_length`` of them if there is no mask, none with ``remove_sample``.

    Raises:
        ValueError: another estimator than grpo or gspo, an option that acts on the weights too,
            several LoRA adapters.
    """
    check_args("Miles", args)
    if args.advantage_estimator not in ("grpo", "gspo"):
        raise ValueError(
            f"advantage_estimator={args.advantage_estimator!r} makes more of a reward than its "
            "factor: set --advantage-estimator grpo or gspo"
        )
    if any(getattr(sample, "adapter", None) is not None for sample in samples):
        raise ValueError("with several LoRA adapters Miles divides each by a batch of its own")
    conversion = needed("miles.ray.rollout.train_data_conversion", _NEEDS)
    raw, normalised = conversion._post_process_rewards(args, samples, None)
    weights = dl_norm.sequence_weights(
        torch.tensor([_length(sample) for sample in samples], dtype=torch.int64),
        alpha=getattr(args, "delta_l_alpha", 1.0),
        max_length=max_length(args),
        group="local",
    )
    rollouts = {s.index if s.rollout_id is None else s.rollout_id for s in samples}
    factors = (weights.double() * len(rollouts)).tolist()
    return raw, [r * f for r, f in zip(normalised, factors, strict=True)]


def pg_loss_reducer(
    total_lengths: list[int],
    response_lengths: list[int],
    loss_masks: list[Tensor],
    calculate_per_token_loss: bool = False,
) -> Callable[[Tensor], Tensor]:
    """As :func:`dl_norm.integrations.slime.pg_loss_reducer`."""

    def own_sum() -> Callable[[Tensor], Tensor]:
        utils = needed("miles.backends.training_utils.cp_utils", _NEEDS)
        return utils.get_sum_of_sample_mean(total_lengths, response_lengths, loss_masks, True)

    return masked_sum(response_lengths, loss_masks, calculate_per_token_loss, own_sum)


def policy_loss(
    args: Any,
    batch: dict[str, Any],
    logits: Tensor,
    sum_of_sample_mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """As :func:`dl_norm.integrations.slime.policy_loss`."""
    check_loss_args("Miles", args)
    refuse(
        "Miles",
        {"delta_l_from_logits": getattr(args, "delta_l_from_logits", False)},
        "its logits come in several forms; leave it out",
    )
    module = needed("miles.backends.training_utils.loss_hub.logit_processors", _NEEDS)
    streams = module.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        max_seq_lens=batch.get("max_seq_lens"),
    )
    return packed_loss(args, batch, logits, streams["log_probs"])


def use_kernels(args: Any = None) -> None:
    """As :func:`dl_norm.integrations.slime.use_kernels`, of Miles' Megatron backend.

    The gradient is float32; Megatron's fused cross-entropy rounds it to bfloat16. With
    ``--true-on-policy-mode`` Miles' own code runs.
    """
    module = needed("miles.backends.training_utils.loss_hub.logit_processors", _NEEDS)
    module.calculate_log_probs_and_entropy = with_kernels(
        module.calculate_log_probs_and_entropy,
        entropy_grad="entropy_requires_grad",
        own_code=("true_on_policy",),
    )


def _length(sample: Any) -> int:
    if sample.remove_sample:
        return 0
    return sample.response_length if sample.loss_mask is None else sum(map(bool, sample.loss_mask))
