r"""DeltaL Normalization in unsloth, by the per-completion weights that its GRPO loss takes.

unsloth's loss reads a key of TRL's batch, ``unsloth_sample_weight``, and is then
``(token_loss * mask * sample_weight).sum()``, multiplied by the number of processes (gradients are
averaged over them) and by ``steps_per_generation`` over the accumulation steps. What a user writes:
README.md of this folder.

**Where the weights come from.** Global lengths: the batch that ``_generate_and_score_completions``
returns is this process's share of the whole generation batch. The weights x_i over all processes
are put under that key as they are, and the mean of a generation batch's optimizer steps is
sum_i x_i grad sum_t l_it. The weights replace the normalisation of ``loss_type``; its token loss
(clip, cispo, sapo, vespo) stays. The KL term is inside of unsloth's token loss and weighted too.
"""

from __future__ import annotations

import inspect
from typing import Any

import dl_norm

KEY = "unsloth_sample_weight"


class DeltaLWeights:
    """Mixin before unsloth's ``GRPOTrainer``: DeltaL weights of the whole generation batch.

    M is ``max_length``, or ``max_completion_length`` of the arguments. Evaluation is unsloth's.

    Raises ValueError if the trainer does not read the weights, as without ``import unsloth`` before
    TRL, and if unsloth sets weights of its own.
    """

    alpha: float = 1.0
    max_length: int | None = None
    args: Any
    model: Any
    accelerator: Any

    def _generate_and_score_completions(self, inputs):
        _check_loss(type(self))
        training = self.model.training  # generation may switch it for a while
        output = super()._generate_and_score_completions(inputs)  # pyright: ignore[reportAttributeAccessIssue]
        if KEY in output:
            raise ValueError(
                f"unsloth sets {KEY} itself: unset UNSLOTH_GRPO_ZERO_VARIANCE_EXCLUDE and "
                "UNSLOTH_GRPO_LOSS_AGGREGATION"
            )
        if not training:
            return output
        mask = output["completion_mask"] != 0
        if output.get("tool_mask") is not None:
            mask = mask & (output["tool_mask"] != 0)
        lengths = mask.sum(1)
        weights = dl_norm.sequence_weights(
            self.accelerator.gather(lengths),
            alpha=self.alpha,
            max_length=self.max_length or self.args.max_completion_length,
            group="local",
        )
        output[KEY] = weights.split(len(lengths))[self.accelerator.process_index]
        return output


def _check_loss(trainer: type) -> None:
    """ValueError unless ``compute_loss`` names the key: TRL's own would pass over the weights."""
    loss = inspect.unwrap(trainer.compute_loss)  # pyright: ignore[reportAttributeAccessIssue]
    if KEY not in loss.__code__.co_consts:
        raise ValueError(
            f"compute_loss of {trainer.__name__} does not read {KEY!r}: import unsloth (2026.10 or "
            "later, on a GPU) before trl; for TRL itself there is dl_norm.integrations.trl"
        )
