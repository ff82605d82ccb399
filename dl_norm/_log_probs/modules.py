"""The loss as a module, for trainers that build theirs from a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import check_flag
from .._keywords import Impl, TensorOptions, TokenLossOptions
from .._metrics import PolicyLossMetrics
from .._options import make_token_loss
from ..weights.group_sums import Group
from .loss import delta_l_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of typing from Python 3.11 on


class DeltaLLoss(torch.nn.Module):
    """:func:`dl_norm.delta_l_loss` with its settings fixed, and checked, at construction.

    Args:
        alpha, max_length, group: as for :func:`dl_norm.sequence_weights`.
        impl, return_metrics, **options: as for :func:`dl_norm.policy_loss`; its options that are
            tensors are arguments of the call.
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        max_length: float,
        group: Group = None,
        impl: Impl | None = None,
        return_metrics: bool = False,
        **options: Unpack[TokenLossOptions],
    ):
        super().__init__()
        make_token_loss(**options)
        check_flag(return_metrics, "return_metrics")
        self.settings: dict[str, Any] = dict(
            alpha=alpha, max_length=max_length, group=group, impl=impl,
            return_metrics=return_metrics, **options,
        )  # fmt: skip

    def forward(
        self, *tensors: Any, **others: Unpack[TensorOptions]
    ) -> Tensor | tuple[Tensor, PolicyLossMetrics]:
        """As :func:`dl_norm.delta_l_loss`: log_probs, old_log_probs, advantages, mask, ..."""
        if torch.compiler.is_exporting():
            raise RuntimeError(
                "DeltaLLoss cannot be exported: its gradient is made by its own kernels in the "
                "forward pass. Export the model, and compute the loss outside of it"
            )
        return delta_l_loss(*tensors, **others, **self.settings)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items())
