r"""DeltaL Normalization in Megatron-RL (``megatron/rl`` of Megatron-LM, ``train_rl.py``).

Megatron-RL has no hook for the loss: its advantages are weighted where it computes them. What a
user writes: README.md of this folder.

**Where the weights come from.** They ride on the advantages. ``compute_group_stats`` sees all
rollouts on every rank, and :func:`weight_advantages` multiplies the advantages it returns by x_i N,
with L_i the tokens of rollout i that the loss will count and N = sum_i L_i. With
``--calculate-per-token-loss`` Megatron divides the sum of all token losses of a step by N, so the
step's gradient is sum_i x_i grad sum_t l_it, packed or not. The KL and entropy terms stay
Megatron's token means.

Two limits of Megatron's: it keeps advantages in the training dtype (bfloat16: a relative error of
up to 2^-8 in each), and it counts a micro-batch of padding alone as one token, which makes the step
smaller by the share of such micro-batches in N.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ._shared import token_mean_factors


def weight_advantages(rl_utils: Any, *, alpha: float = 1.0, max_length: int) -> None:
    """Make ``rl_utils`` (the module ``megatron.rl.rl_utils``) weight the advantages it computes.

    Args:
        alpha, max_length: as for :func:`dl_norm.sequence_weights`.

    Raises:
        ValueError: when training starts, without ``--calculate-per-token-loss``, with several
            optimizer steps on one rollout (each would divide by tokens of its own), and for
            rollouts without a ``generation_mask``.
    """
    token_mean_factors([1], alpha=alpha, max_length=max_length)  # bad values raise here
    compute = rl_utils.compute_group_stats

    def compute_weighted(rollouts, tokenizer, seq_len, request_ledger):
        args = rl_utils.get_args()
        _check(args)
        stats = compute(rollouts, tokenizer, seq_len, request_ledger)
        packed = args.rl_use_sequence_packing
        lengths = [
            sum(_counted(*row, tokenizer.pad, packed) for row in _rows(rl_utils, rollout))
            for group in rollouts
            for rollout in group
        ]
        factors = token_mean_factors(lengths, alpha=alpha, max_length=max_length)
        stats.advantages = [a * f for a, f in zip(stats.advantages, factors, strict=True)]
        return stats

    rl_utils.compute_group_stats = compute_weighted


def _check(args: Any) -> None:
    if not args.calculate_per_token_loss:
        raise ValueError(
            "without --calculate-per-token-loss Megatron averages over each micro-batch's own "
            "tokens: set it"
        )
    collected = args.grpo_prompts_per_step * args.grpo_group_size
    if args.global_batch_size != collected:
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} cuts the {collected} rollouts of a "
            "collection into several steps, each divided by its own tokens: set it to "
            f"{collected}"
        )


def _rows(rl_utils: Any, rollout: Any) -> Iterator[tuple[list[int], list[bool]]]:
    """Tokens and mask of the rows that Megatron trains a rollout as: one, or one a turn."""
    turns = [rl_utils._to_list(turn) for turn in rollout.trajectory]
    if turns and rollout.generation_mask is None:
        raise ValueError("a rollout has no generation_mask: DeltaL needs the tokens it generated")
    masks = [rl_utils._to_list(mask) for mask in rollout.generation_mask or []]
    if len(turns) > 1 and rl_utils._is_collapsible_rollout(rollout):
        width = len(turns[-1])
        padded = (mask + [False] * (width - len(mask)) for mask in masks)
        turns, masks = turns[-1:], [list(map(any, zip(*padded, strict=True)))]
    yield from zip(turns, masks, strict=True)


def _counted(tokens: list[int], mask: list[bool], pad: int, packed: bool) -> int:
    """Tokens of a row in Megatron's loss mask: not the first, no padding.

    A generated token may be the padding token where that is the end of a text. Packed rows lose it
    at their end alone.
    """
    end = len(tokens)
    while packed and end and tokens[end - 1] == pad:
        end -= 1
    return sum(
        bool(m) and (packed or token != pad)
        for token, m in zip(tokens[1:end], mask[1:end], strict=True)
    )
