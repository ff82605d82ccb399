r"""DeltaL Normalization in open-instruct (``grpo_fast.py`` and ``grpo.py``).

open-instruct has no hook for the loss or the advantages, and computes these in a Ray actor, where a
patch from outside does not reach: one line is added to its ``data_loader.py``. Which: README.md of
this folder.

**Where the weights come from.** They ride on the advantages. ``DataPreparationActor`` has the whole
rollout in one place. With a constant ``--loss_denominator`` D the loss of a step is the sum of its
token losses over all ranks, divided by D (open-instruct undoes the averaging of gradients), so the
factor is f_i = x_i D S, with S = ``--num_mini_batches`` steps on one rollout: the mean of the steps
is sum_i x_i grad sum_t l_it. The KL term stays the sum over tokens divided by D.
"""

from __future__ import annotations

from typing import Any

import torch

import dl_norm


def weight_advantages(
    advantages: Any,
    packed_sequences: Any,
    *,
    alpha: float = 1.0,
    max_length: int,
    loss_denominator: float,
    num_mini_batches: int = 1,
) -> Any:
    """(B,) numpy advantages of a rollout times the DeltaL factors.

    Args:
        advantages: (B,) array.
        packed_sequences: open-instruct's ``PackedSequences``, whose ``response_masks`` still hold
            i + 1 at the tokens of response i. The loss counts them from position 1 of a row on.
        alpha, max_length: as for :func:`dl_norm.sequence_weights`.
        loss_denominator, num_mini_batches: open-instruct's options of that name. Any constant D
            gives the same policy loss; G M, with G the responses of a step, keeps the KL term at
            the scale of Dr. GRPO.

    Raises:
        ValueError: ``loss_denominator`` is "token" or not positive.
    """
    if loss_denominator == "token" or not float(loss_denominator) > 0:
        raise ValueError(
            f"loss_denominator={loss_denominator!r}: DeltaL needs a constant, set "
            "--loss_denominator to the responses of a step times max_length, say"
        )
    owners = torch.cat([mask[1:] for mask in packed_sequences.response_masks])
    lengths = torch.bincount(owners.long(), minlength=len(advantages) + 1)[1:]
    weights = dl_norm.sequence_weights(lengths, alpha=alpha, max_length=max_length, group="local")
    return advantages * (weights.double() * (float(loss_denominator) * num_mini_batches)).numpy()
