r"""DeltaL Normalization in NeMo-RL, as a loss function of ``grpo_train``.

The hook is ``LossFunction.__call__(next_token_logprobs, data, global_valid_seqs,
global_valid_toks) -> (loss, metrics)``. What a user writes: README.md of this folder.

**Where the weights come from.** 1/G from ``global_valid_seqs``, the samples of the step on all
ranks, and the rest rides on the advantages: NeMo-RL's driver computes them for the whole rollout,
and :func:`weight_advantages` multiplies them by f_i = B L_i^-alpha / sum_j L_j^-alpha, B the
samples that are not masked out (``dl_norm.reweight_advantages``). The loss is sum_i f_i sum_t l_it
/ (G M); NeMo-RL undoes its averaging over ranks and Megatron's over micro-batches itself. With
several steps on one rollout G is a step's share of B and the mean of the steps is sum_i x_i grad
sum_t l_it.

NeMo-RL's split trainers pass ``global_valid_seqs = 1`` and rescale afterwards by what ``loss_type``
names: it is SEQUENCE_LEVEL here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dl_norm
from dl_norm._checks import check_number

from . import rollout as settings_of
from ._shared import adapter_loss, checked, needed, on_host, refuse, required
from .log_probs import shard_log_probs

# Fields of ClippedPGLossConfig that have no counterpart here.
_REFUSED = (
    "disable_ppo_ratio",
    "sequence_level_importance_ratios",
    "use_cispo",
    "positive_example_nll_weight",
)


class DeltaLLossFn:
    """NeMo-RL's clipped policy loss under DeltaL weights, by :func:`dl_norm.policy_loss`.

    Args:
        cfg: ``ClippedPGLossConfig`` or a mapping with its fields. Followed: ``ratio_clip_min``,
            ``ratio_clip_max``, ``ratio_clip_c``, ``force_on_policy_ratio``,
            ``use_importance_sampling_correction`` with ``truncated_importance_sampling_type``,
            ``..._ratio`` and ``..._ratio_min``, in the kernel: a token without a rollout log-prob
            weighs 1 (NeMo-RL drops it).
        max_length: the constant M.
        use_fused_linear_logprobs: as for ``ClippedPGLossFn``.
        **options: of :func:`dl_norm.policy_loss`, over those of ``cfg``.

    Raises:
        ImportError: NeMo-RL is not installed.
        ValueError: a field that cannot be followed, a bad option.
    """

    def __init__(
        self,
        cfg: Any,
        *,
        max_length: float,
        use_fused_linear_logprobs: bool = False,
        **options: Any,
    ):
        interfaces = needed("nemo_rl.algorithms.loss.interfaces", "NeMo-RL, from its repository")
        check_number(max_length, "max_length", "max_length > 0", lambda m: m > 0)

        def field(name: str, default: Any) -> Any:
            if isinstance(cfg, dict):
                return cfg.get(name, default)
            return getattr(cfg, name, default)

        beta = field("reference_policy_kl_penalty", 0.01)
        refuse(
            "NeMo-RL",
            {name: field(name, False) for name in _REFUSED}
            | {"reference_policy_kl_penalty": 0 if field("use_kl_in_reward", False) else beta},
            "set it to its neutral value (0, false or null), or keep ClippedPGLossFn",
        )
        self.input_type = interfaces.LossInputType.LOGPROB
        self.loss_type = interfaces.LossType.SEQUENCE_LEVEL
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.reference_policy_kl_penalty = 0  # read by NeMo-RL's input preparation
        self.max_length = max_length
        self.on_policy = field("force_on_policy_ratio", False)
        self.clip = {
            "eps_low": field("ratio_clip_min", 0.2),
            "eps_high": field("ratio_clip_max", 0.2),
            "dual_clip": field("ratio_clip_c", None),
        }
        correction = {"rollout_correction": settings_of.nemo_rl(cfg)}
        # NeMo-RL clamps nothing.
        self.options = checked({"log_ratio_clamp": None, **correction, **options}, rollout=True)
        if hasattr(interfaces, "MetricNormalizer"):  # after 0.7.0
            self.metric_normalizations = _metric_normalizations(interfaces.MetricNormalizer)

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of a micro-batch.

        Args:
            next_token_logprobs: (B, S - 1).
            data: ``token_mask``, ``advantages``, ``prev_logprobs`` and ``generation_logprobs``
                (B, S), ``sample_mask`` (B,).
            global_valid_seqs, global_valid_toks: 0-dim, over the step on all ranks.

        Returns:
            (loss, metrics). NeMo-RL's drivers add metrics up with numpy, so they are Python
            floats: one host sync. Means are divided by ``global_valid_toks``, for their sum to be
            the mean.

        Raises:
            ValueError: one of the global counts is None.
        """
        remedy = "DeltaL needs the counts of the whole step; a micro-batch's own would be wrong"
        required(global_valid_seqs, "global_valid_seqs", remedy)
        required(global_valid_toks, "global_valid_toks", remedy)
        mask = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]) != 0
        generated = data["generation_logprobs"][:, 1:]
        previous = next_token_logprobs.detach() if self.on_policy else data["prev_logprobs"][:, 1:]
        mismatch = (previous - generated).masked_fill(~mask, 0.0)
        sequences = torch.as_tensor(global_valid_seqs, device=mask.device).clamp(min=1)
        loss, seen = adapter_loss(
            next_token_logprobs,
            None if self.on_policy else previous,
            data["advantages"][:, 1:],
            mask,
            weights=1 / (sequences * self.max_length),
            rollout_log_probs=None if self.options["rollout_correction"] is None else generated,
            clip=self.clip,
            **self.options,
        )
        values = {
            "probs_ratio": seen.ratio,
            "clip_ratio_low": seen.clipped_low,
            "clip_ratio_high": seen.clipped_high,
            "kl_old": seen.kl_old_k1,
            "token_mult_prob_error": (mismatch.abs().exp() * mask).sum(),
            "gen_kl_error": (mismatch.exp() - mismatch - 1).sum(),
        }
        tokens = torch.as_tensor(global_valid_toks, device=mask.device).clamp(min=1)
        values = {name: value / tokens for name, value in values.items()}
        values["probs_ratio_max"] = seen.ratio_max
        values["num_valid_samples"] = data["sample_mask"].sum()
        values["loss"] = loss.detach()
        return loss, on_host(values)


def _metric_normalizations(normalizer: Any) -> dict[str, Any]:
    """Which global count each metric is divided by, for trainers that rescale them."""
    tokens = ("probs_ratio", "clip_ratio_low", "clip_ratio_high", "kl_old")
    errors = ("token_mult_prob_error", "gen_kl_error")
    return {
        "loss": normalizer.SEQUENCES,
        "num_valid_samples": normalizer.NONE,
        "probs_ratio_max": normalizer.NONE,
        **dict.fromkeys((*tokens, *errors), normalizer.TOKENS),
    }


class WeightedEstimator:
    """A NeMo-RL advantage estimator whose (B, S) advantages carry the DeltaL weights."""

    def __init__(self, estimator: Any, *, alpha: float = 1.0):
        self.estimator, self.alpha = estimator, alpha

    def compute_advantage(self, prompt_ids, rewards, mask, **kwargs):
        advantages = self.estimator.compute_advantage(
            prompt_ids=prompt_ids, rewards=rewards, mask=mask, **kwargs
        )
        # The loss sees positions 1..S-1. A sample that is masked out has no token.
        lengths = (mask[:, 1:] != 0).sum(-1)
        return dl_norm.reweight_advantages(advantages, lengths, alpha=self.alpha, group="local")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.estimator, name)


def weight_advantages(grpo: Any, *, alpha: float = 1.0) -> None:
    """Make ``grpo`` (the module ``nemo_rl.algorithms.grpo``) weight the advantages it computes."""
    create = grpo._create_advantage_estimator

    def create_weighted(master_config):
        return WeightedEstimator(create(master_config), alpha=alpha)

    grpo._create_advantage_estimator = create_weighted


def use_kernels(model_utils: Any) -> None:
    """Make NeMo-RL's log-probs of vocabulary-parallel logits by dl-norm.

    In the policy workers, DTensor's and Megatron's: of this rank's shard, without a float32 softmax
    of it, whatever ``logprob_chunk_size`` is. Values and gradients are NeMo-RL's. Top-k and top-p
    go by other functions of NeMo-RL's, which stay.

    Args:
        model_utils: the module ``nemo_rl.distributed.model_utils``.
    """

    class Logprob:
        @staticmethod
        def apply(logits, target, vocab_start, vocab_end, group, inference_only=False):
            here = group.rank() * logits.shape[-1]
            if (vocab_start, vocab_end) != (here, here + logits.shape[-1]):
                raise ValueError(
                    f"rank {group.rank()} has the ids [{vocab_start}, {vocab_end}) of the "
                    f"vocabulary, not {logits.shape[-1]} from {here} on: dl-norm takes even shards"
                )
            return shard_log_probs(logits, target, group, entropy=False)[0]

    class ChunkedLogprob:
        @staticmethod
        def apply(logits, target, start, end, chunk_size, group, inference_only=False):
            return Logprob.apply(logits, target, start, end, group, inference_only)

    model_utils.DistributedLogprob = Logprob
    model_utils.ChunkedDistributedLogprob = ChunkedLogprob
