r"""DeltaL Normalization in slime, by its function-path options.

What a user adds to the training command: README.md of this folder. `miles.py` has the same for
slime's fork Miles.

:func:`pg_loss_reducer` keeps all of slime's loss (KL, entropy, TIS, metrics) and only changes how
token losses become one number. :func:`policy_loss` is the fused kernel on the packed tokens in the
place of that loss.

**Where the weights come from.** They ride on the advantages. :func:`advantages` sees this rank's
share of the whole rollout and sums over the data-parallel group; the reducer and the loss are
plain masked sums. slime multiplies the loss by num_microbatches * dp_size / G (Megatron undoes the
first two), with G the number of rollouts of a step (siblings of one count once), so the factor is
f_i = (1/M) B L_i^-alpha / sum_j L_j^-alpha with B the rollouts in all, and f_i / G = x_i B / G: the
mean of the B / G steps is the whole.

``--calculate-per-token-loss`` divides by tokens instead and raises; so do
``--normalize-advantages`` and ``--use-opd``, which would act on the weights too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dl_norm
from dl_norm import KeptSets

from . import rollout as settings_of
from ._shared import needed, offsets, refuse, required, row_factors
from .kept import listed_sets
from .log_probs import shard_log_probs
from .slime_loss import loss_of_logits, mean_weight, normalises, packed_loss

_NEEDS = "slime with its Megatron backend, from its repository"
_OWN_LOSS_ONLY = ("use_kl_loss", "entropy_coef", "get_mismatch_metrics", "use_opsm")


def advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """slime's GRPO advantages times the DeltaL factors, as ``--custom-advantage-function-path``.

    Args:
        args: ``delta_l_alpha`` (1 if left out); M is ``delta_l_max_length``, or
            ``rollout_max_response_len``.
        rollout_data: this rank's samples: ``rewards``, ``response_lengths``, ``loss_masks`` and
            ``kl`` (slime puts it there before the call), and ``rollout_mask_sums``, the counted
            tokens of a sample's whole rollout; without them each sample is a rollout. Sets
            ``advantages`` and ``returns``. With ``tis_batch_normalize`` the mean weight of the
            rollout, ``args.delta_l_mean_weight``, for :func:`policy_loss`.
    """
    check_args("slime", args)
    masks = rollout_data["loss_masks"]
    lengths = dl_norm.sequence_lengths(
        torch.cat(masks), offsets(rollout_data["response_lengths"], masks[0].device)
    )
    group = needed("megatron.core", _NEEDS).mpu.get_data_parallel_group()
    if normalises(args):
        args.delta_l_mean_weight = mean_weight(args, rollout_data, group)
    factors = row_factors(
        lengths,
        alpha=getattr(args, "delta_l_alpha", 1.0),
        group=group,
        rows=_rollouts(lengths, rollout_data.get("rollout_mask_sums")),
    )
    rewards = torch.tensor(rollout_data["rewards"], dtype=torch.float32, device=factors.device)
    weighted = (rewards * factors / max_length(args)).unbind()
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

    def own_sum() -> Callable[[Tensor], Tensor]:
        utils = needed("slime.backends.megatron_utils.cp_utils", _NEEDS)
        lengths = total_lengths, response_lengths
        return utils.get_sum_of_sample_mean(*lengths, loss_masks, None, True)

    return masked_sum(response_lengths, loss_masks, calculate_per_token_loss, own_sum)


def policy_loss(
    args: Any,
    batch: dict[str, Any],
    logits: Tensor,
    sum_of_sample_mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's clipped policy loss by the fused kernel, as ``--custom-loss-function-path``.

    The packed (N,) response tokens go to :func:`dl_norm.policy_loss` with cu_seqlens, without a
    loop over samples. ``sum_of_sample_mean`` is not used. ``args.delta_l_options``, a mapping in
    the custom configuration, has options of :func:`dl_norm.policy_loss`. With ``--use-tis`` the
    kernel weights the tokens (:func:`dl_norm.integrations.rollout.slime`). With
    ``args.delta_l_from_logits`` the loss goes from this tensor-parallel rank's logits to their
    gradient (:func:`dl_norm.logits_policy_loss`), and slime's log-probs are not computed.

    Returns:
        (loss, metrics), metrics 0-dim tensors under slime's names. slime divides metrics by the
        number of samples of the step, so means over tokens are multiplied by the micro-batch's
        samples.

    Raises:
        ValueError: an option that this loss cannot follow (the reducer keeps them all), a missing
            field of the batch, tokens cut over context-parallel ranks.
    """
    check_loss_args("slime", args)
    if getattr(args, "delta_l_from_logits", False):
        return loss_of_logits(args, batch, logits, needed("megatron.core", _NEEDS).mpu)
    module = needed("slime.backends.megatron_utils.loss", _NEEDS)
    _, streams = module.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=False,
        **module.get_rollout_top_p_logprob_kwargs(args, batch),
    )
    return packed_loss(args, batch, logits, streams["log_probs"])


def use_kernels(args: Any = None) -> None:
    """Make slime's log-probs and entropy by dl-norm, as ``--custom-megatron-init-path``.

    For every loss of slime's, and its passes for old and reference log-probs: of this
    tensor-parallel rank's shard of the vocabulary, without slime's float32 softmax of it. Values
    and gradients are slime's. With top-p sets (``--rollout-top-p``) slime's own code runs.
    """
    module = needed("slime.backends.megatron_utils.loss", _NEEDS)
    module.calculate_log_probs_and_entropy = with_kernels(
        module.calculate_log_probs_and_entropy,
        entropy_grad="with_entropy_grad",
        own_code=("log_prob_keep_mask",),
    )


def kept_sets(batch: dict[str, Any], device: torch.device) -> tuple[KeptSets, Tensor | None]:
    """slime's top-p sets of a micro-batch as those of its packed response tokens.

    slime's hook gets logits, so :func:`policy_loss` leaves the masking of these to slime. Who has
    hidden states hands the sets to :func:`dl_norm.integrations.kept.log_probs` or to
    :func:`dl_norm.linear_policy_loss`. slime keeps a token that is outside its set, which here is a
    ValueError, or NaN on a GPU; one behind the recorded sets is over the whole vocabulary.

    Args:
        batch: ``rollout_top_p_token_ids``, ``rollout_top_p_token_offsets``, ``response_lengths``.

    Returns:
        The sets and which tokens have one: :func:`dl_norm.integrations.kept.listed_sets`.
    """
    ids, offsets_of = (
        required(batch.get(f"rollout_top_p_token_{name}"), name, "--rollout-top-p below 1 sends it")
        for name in ("ids", "offsets")
    )
    return listed_sets(ids, offsets_of, batch["response_lengths"], device)


# -- for slime and Miles


def with_kernels(original: Any, *, entropy_grad: str, own_code: tuple[str, ...]) -> Any:
    """slime's or Miles' ``calculate_log_probs_and_entropy`` by dl-norm.

    Args:
        entropy_grad: its option that says whether the entropy has a gradient.
        own_code: options with which it has to run itself.
    """

    @functools.wraps(original)
    def calculate(logits, tokens, tp_group, with_entropy=False, **options):
        own = [options.get(name) for name in own_code]
        if logits.size(0) == 0 or any(not (o is None or o is False) for o in own):
            return original(logits, tokens, tp_group, with_entropy=with_entropy, **options)
        log_probs, entropy = shard_log_probs(
            logits,
            tokens,
            tp_group,
            entropy=with_entropy,
            entropy_grad=options.get(entropy_grad, True),
        )
        return log_probs[:, None], entropy

    return calculate


def max_length(args: Any) -> int:
    """The constant M of the run."""
    return getattr(args, "delta_l_max_length", None) or required(
        getattr(args, "rollout_max_response_len", None),
        "delta_l_max_length",
        "put the constant M into --custom-config-path, or set --rollout-max-response-len",
    )


def check_args(trainer: str, args: Any) -> None:
    """ValueError for what would divide or change the weighted advantages."""
    refuse(
        trainer,
        {name: getattr(args, name, False) for name in ("normalize_advantages", "use_opd")},
        "it would act on the advantages after they carry the DeltaL weights; turn it off",
    )
    _check_reduction(args.calculate_per_token_loss)
    for name in ("delta_l_options", "delta_l_from_logits"):
        if getattr(args, name, None) and getattr(args, "loss_type", None) == "policy_loss":
            raise ValueError(
                f"{name} is of the fused loss, and with --loss-type policy_loss {trainer}'s own "
                "runs: set --loss-type custom_loss and --custom-loss-function-path, or leave it out"
            )
    max_length(args)


def check_loss_args(trainer: str, args: Any) -> None:
    """ValueError for what the fused loss cannot follow and the trainer's own loss does."""
    refuse(
        trainer,
        {name: getattr(args, name, False) for name in _OWN_LOSS_ONLY},
        f"use the reducer, dl_norm.integrations.{trainer.lower()}.pg_loss_reducer",
    )
    settings_of.slime(args)
    if getattr(args, "advantage_estimator", "grpo") in ("gspo", "cispo"):
        raise ValueError(f"{trainer}'s gspo and cispo need its own loss: use the reducer")
    _check_reduction(args.calculate_per_token_loss)


def masked_sum(
    response_lengths: list[int],
    loss_masks: list[Tensor],
    calculate_per_token_loss: bool,
    own_sum: Callable[[], Callable[[Tensor], Tensor]],
) -> Callable[[Tensor], Tensor]:
    """Token losses -> their masked sum; the trainer's ``own_sum`` where sequences are cut."""
    _check_reduction(calculate_per_token_loss)

    def reduce(pg_loss: Tensor) -> Tensor:
        if pg_loss.shape[0] != sum(response_lengths):
            return own_sum()(pg_loss)
        mask = torch.cat(loss_masks)
        return (pg_loss.masked_fill(mask == 0, 0.0) * mask).sum()

    return reduce


def _rollouts(lengths: Tensor, of_rollouts: Any) -> Tensor:
    """0-dim number of rollouts: each sample is the share of its rollout's tokens that it holds."""
    if of_rollouts is None:
        return torch.tensor(lengths.shape[0], device=lengths.device)
    sums = torch.as_tensor(of_rollouts, device=lengths.device)
    return torch.where(sums > 0, lengths / sums.clamp(min=1), 1.0).sum()


def _check_reduction(calculate_per_token_loss: bool) -> None:
    if calculate_per_token_loss:
        raise ValueError(
            "--calculate-per-token-loss divides by the tokens of the step; DeltaL needs the number "
            "of samples: leave it out"
        )
