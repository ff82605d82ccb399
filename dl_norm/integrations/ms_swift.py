r"""DeltaL Normalization in ms-swift, as its GRPO trainer with weighted advantages.

ms-swift has no hook for the loss; its trainer class is a name in ``TrainerFactory``, and an
``--external_plugins`` file can put another there. What a user writes: README.md of this folder.

**Where the weights come from.** They ride on the advantages, which ms-swift computes for the whole
generation batch of B rows on all processes. With ``--loss_type dr_grpo`` a micro-batch's loss is
the sum of its token losses over its rows and M = ``max_completion_length``; ms-swift averages over
micro-batches and processes, all of one size. So the factor is f_i = B L_i^-alpha / sum_j L_j^-alpha
and the mean of the generation batch's steps is sum_i x_i grad sum_t l_it. (ms-swift logs the
weighted advantages.) The KL term and a teacher's are not re-weighted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._shared import refuse, row_factors


class DeltaLAdvantages:
    """Mixin before ms-swift's ``GRPOTrainer``: DeltaL weights on the advantages.

    Raises ValueError for another ``loss_type`` than dr_grpo and for what changes the rows of a
    micro-batch: sequence parallelism, a number of samples that varies, Liger's loss.
    """

    alpha: float = 1.0
    accelerator: Any
    args: Any
    template: Any
    dynamic_num_samples: bool
    use_liger_loss: bool
    overlong_filter: bool

    def _compute_advantages(self, samples, rewards_per_func, batch_encoded_inputs) -> Tensor:
        loss_type = self.args.loss_type
        if loss_type != "dr_grpo":
            raise ValueError(
                f"loss_type={loss_type!r} divides by tokens of its own: set --loss_type dr_grpo, "
                "whose token loss is the clipped one over the constant max_completion_length"
            )
        refuse(
            "ms-swift",
            {
                "dynamic_num_samples": self.dynamic_num_samples,
                "sequence_parallel_size": self.template.sequence_parallel_size > 1,
                "use_liger_loss": self.use_liger_loss,
            },
            "its micro-batches are not rows of one size divided by max_completion_length; turn it "
            "off",
        )
        advantages = super()._compute_advantages(  # pyright: ignore[reportAttributeAccessIssue]
            samples, rewards_per_func, batch_encoded_inputs
        )
        lengths = [self._counted(inputs["grpo_batch"]) for inputs in batch_encoded_inputs]
        lengths = self.accelerator.gather(torch.cat(lengths))
        return advantages * row_factors(lengths, alpha=self.alpha).to(advantages.device)

    def _counted(self, batch: Any) -> Tensor:
        """(B,) tokens that the loss counts in each row of a micro-batch."""
        lengths = (batch.completion_mask != 0).sum(1)
        if self.overlong_filter:
            lengths = lengths.masked_fill(batch.truncated_mask != 0, 0)
        return lengths
