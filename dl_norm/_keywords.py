"""The keywords of the losses, for type checkers.

The one explicit signature is that of :func:`dl_norm.policy_loss`; a test holds these equal to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict

from torch import Tensor

from ._kept.sets import KeptSets
from ._kl import KL
from ._rollout import RolloutCorrection
from .surrogates import Surrogate

if TYPE_CHECKING:
    from ._rows.shards import TensorParallelGroup

Impl = Literal["triton", "torch"]
RatioLevel = Literal["token", "sequence", "sequence_token", "sequence_sum"]
KLName = Literal["k1", "abs", "k2", "k3"]
SurrogateName = Literal[
    "clip", "cispo", "sapo", "policy_gradient", "importance_sampling", "dppo_tv", "dppo_kl", "ipo",
    "vespo", "gmpo", "drift", "abs_drift", "nll", "dro",
]  # fmt: skip


class TokenLossOptions(TypedDict, total=False):
    """The options that are no tensors."""

    eps_low: float
    eps_high: float
    dual_clip: float | None
    delta: float | None
    log_ratio_clamp: float | None
    beta: float
    kl: KLName | KL
    ratio_level: RatioLevel
    surrogate: SurrogateName | Surrogate
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    bias_corrected_kl: bool
    rollout_correction: RolloutCorrection | None


class TensorOptions(TypedDict, total=False):
    """The options that are."""

    cu_seqlens: Tensor | None
    ref_log_probs: Tensor | None
    rollout_weights: Tensor | None
    entropy_mask: Tensor | None
    sequence_mask: Tensor | None
    rollout_log_probs: Tensor | None
    rollout_mean_weight: Tensor | None


class LossOptions(TokenLossOptions, TensorOptions, total=False):
    """All of them."""


class CallOptions(LossOptions, total=False):
    """And which implementation computes the loss."""

    impl: Impl | None


class RowOptions(CallOptions, total=False):
    """And those of both losses over rows of logits."""

    temperature: float
    entropy_coef: float
    entropy_weights: Tensor | None
    tp_group: TensorParallelGroup | None
    vocab_size: int | None


class LogitsOptions(RowOptions, total=False):
    """And those of the loss over logits."""

    in_place: bool


class LinearOptions(RowOptions, total=False):
    """And those of the loss over hidden states."""

    bias: Tensor | None
    logit_softcap: float | None
    chunk_size: int | None
    fp32_logits: bool
    max_tokens: int | None
    compact: bool
    kept: KeptSets | None
    partial_hidden_grad: bool
