r"""DeltaL Normalization in ROLL, as the class of the training workers.

The hook is ``loss_func(self, data, output_tensor) -> (loss, metrics)`` of the actor worker. What a
user writes: README.md of this folder. M is ROLL's ``response_length`` if a subclass sets none.

**Where the weights come from.** Global lengths: ``train_step`` of a worker gets this data-parallel
rank's share of the whole rollout, so the weights over all ranks are computed there and travel with
the rows through ROLL's mini- and micro-batches. Every sequence is on world / dp ranks (tensor,
pipeline and context parallel), which divides out. ROLL's ``apply_loss_scale`` multiplies by
micro-batches and ranks what its engines divide by, so a step's gradient is the sum of its
micro-batches' losses; the weights are multiplied by the number of steps on one rollout, so that
their mean is sum_i x_i grad sum_t l_it.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import functools
import logging
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

import dl_norm
from dl_norm._metrics import PolicyLossMetrics
from dl_norm.weights import gradient_scale

from . import rollout as settings_of
from ._shared import adapter_loss, on_host, refuse, required

try:
    from roll.distributed.scheduler.decorator import Dispatch, register
    from roll.pipeline.rlvr.actor_worker import ActorWorker
    from roll.utils.train_infer_corrections import compute_train_infer_correction
except ImportError as error:
    raise ImportError(
        "dl_norm.integrations.roll needs ROLL 0.3, from its repository, in the training workers"
    ) from error

_logger = logging.getLogger(__name__)
SEQUENCE_WEIGHTS = "delta_l_weights"  # key of the (B,) weights in ROLL's batch


class DeltaLActorWorker(ActorWorker):
    """ROLL's RLVR actor whose loss is the weighted sum of :func:`dl_norm.policy_loss`.

    Followed: clip range, ``dual_clip_loss``, ``use_kl_loss`` (k3, under the sequence weights),
    ``rl_loss_coef``, the train-infer correction. Metrics keep ROLL's names.

    The correction is the kernel's (:func:`dl_norm.integrations.rollout.roll`). ROLL's own code
    makes it where it has done so on the driver (``enable_old_logprobs_recompute``), and, as the log
    says, for what has no counterpart: segments, differences of probabilities, filters beside
    ``use_kl_loss``, which take tokens out of the KL term too. A token that the kernel's filter
    drops still counts in the metrics of the ratio.
    """

    alpha: float = 1.0
    max_length: int | None = None
    options: ClassVar[dict[str, Any]] = {}  # of policy_loss, over ROLL's clip settings

    @register(
        dispatch_mode=Dispatch.DP_MP_DISPATCH_FIRST, trace=True, prefetch=False, to_remote=False
    )
    def train_step(self, data):
        config = self.pipeline_config
        refuse(
            "ROLL",
            {
                "difficulty_loss_weight": config.difficulty_loss_weight,
                "length_loss_weight": config.length_loss_weight,
                "entropy_loss_coef": config.entropy_loss_coef,
                "importance_sampling": config.importance_sampling != "token",
                "use_dynamic_batching_in_train": self.worker_config.use_dynamic_batching_in_train,
            },
            "set it to its neutral value, or use ROLL's own ActorWorker",
        )
        if not self.worker_config.apply_loss_scale:
            raise ValueError(
                "apply_loss_scale=False leaves the averaging over ranks and micro-batches in the "
                "gradient: set actor_train.apply_loss_scale=true"
            )
        data = self.strategy.get_data_input(data)  # ranks beside the first get the rows here
        args = self.worker_config.training_args
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        data.batch[SEQUENCE_WEIGHTS] = self._weights(_mask(data)) * gradient_scale(
            num_processes=1,  # ROLL multiplies by the ranks
            accumulation_steps=1,
            micro_batches_per_generation=max(len(data) // rows, 1),  # steps on one rollout
        )
        return super().train_step(data)

    def _weights(self, mask: Tensor) -> Tensor:
        max_length = required(
            self.max_length or getattr(self.pipeline_config, "response_length", None),
            "max_length",
            "set it in a subclass of DeltaLActorWorker, or response_length in ROLL's config",
        )
        lengths = dl_norm.sequence_lengths(mask)
        copies, group = 1, None
        if dist.is_available() and dist.is_initialized():
            copies = dist.get_world_size() / self.rank_info.dp_size
            group = dist.group.WORLD
        return copies * dl_norm.sequence_weights(
            lengths, alpha=self.alpha, max_length=max_length, group=group
        )

    def loss_func(self, data, output_tensor: Tensor):
        config = self.pipeline_config
        weights = required(
            data.batch.get(SEQUENCE_WEIGHTS, None),
            SEQUENCE_WEIGHTS,
            "train_step computes it from the whole rollout; an override must call super()",
        )
        tokens = required(
            data.meta_info.get("batch_num_tokens"), "batch_num_tokens", "ROLL's strategies set it"
        )
        mask = _mask(data)
        log_probs = self.strategy.op_compute_log_probs(
            logits=output_tensor,
            input_ids=data.batch["input_ids"],
            attention_mask=data.batch["response_mask"],
        )
        old = self.get_old_log_probs_with_cache(data, log_probs)
        low, high = (
            (config.pg_clip_low, config.pg_clip_high)
            if config.use_pg_clip_range
            else (config.pg_clip, config.pg_clip)
        )
        correction, mask, more = self._correction(data, old, mask)
        kl = {"ref_log_probs": data.batch["ref_log_probs"]} if self._beta() else {}
        options = {
            "log_ratio_clamp": None,  # ROLL clamps nothing
            "beta": self._beta(),
            **kl,
            **correction,
            **self.options,
        }
        loss, seen = adapter_loss(
            log_probs,
            old,
            data.batch["advantages"],
            mask,
            weights=weights,
            clip={
                "eps_low": low,
                "eps_high": high,
                "dual_clip": 1 + 2 * config.pg_clip if config.dual_clip_loss else None,
            },
            **options,
        )
        total = loss * config.rl_loss_coef
        count = torch.as_tensor(tokens.get("final_response_mask", tokens["response_mask"]))
        # "@sum": ROLL adds the micro-batches up, so each has its share of the global mean.
        values = {
            "actor/ppo_ratio_high_clipfrac@sum": seen.clipped_high / count,
            "actor/ppo_ratio_low_clipfrac@sum": seen.clipped_low / count,
            "actor/ppo_ratio_clipfrac@sum": (seen.clipped_high + seen.clipped_low) / count,
            "actor/ratio_mean@sum": seen.ratio / count,
            "actor/policykl@sum": seen.kl_old_k1 / count,
            "actor/kl_loss@sum": seen.kl_ref / count,
            "actor/ratio_max@max": seen.ratio_max,
            "actor/total_loss@sum": total.detach(),
        }
        if not self._beta():  # the kernel adds the KL term up with the rest
            values["actor/pg_loss@sum"] = loss.detach()
        if seen.rollout is not None:
            values |= _correction_means(seen, tokens["response_mask"])
        return total, {**on_host(values), **more}

    def _beta(self) -> float:
        config = self.pipeline_config
        return config.kl_loss_coef if config.use_kl_loss else 0.0

    def _correction(self, data, old: Tensor, mask: Tensor):
        """For the gap between trainer and sampler: options of the loss, mask, ROLL's metrics."""
        config = self.pipeline_config
        settings = config.train_infer_correction
        if config.enable_old_logprobs_recompute:
            weights = data.batch["train_infer_is_weight"] if settings.is_weight.enabled else None
            return {"rollout_weights": weights}, mask, {}
        sampled = data.batch.get("infer_logprobs", None)
        sampled = old if sampled is None or not len(sampled) else sampled
        try:
            correction = settings_of.roll(settings)
            if correction is not None and correction.reject and self._beta():
                raise ValueError("ROLL's filters take tokens out of use_kl_loss's term too")
        except ValueError as error:
            _say(f"{error}: ROLL's own compute_train_infer_correction runs")
            return self._own_correction(data, old, sampled, mask)
        if correction is None:
            return {}, mask, {}
        return {"rollout_correction": correction, "rollout_log_probs": sampled}, mask, {}

    def _own_correction(self, data, old: Tensor, sampled: Tensor, mask: Tensor):
        config = self.pipeline_config.train_infer_correction
        weights, keep, metrics = compute_train_infer_correction(
            cfg=config,
            response_mask=data.batch["response_mask"][:, 1:].long(),
            old_log_probs=old,
            infer_log_probs=sampled,
            global_valid_samples=data.meta_info["global_valid_samples"]["response_mask"],
            global_valid_tokens=data.meta_info["batch_num_tokens"]["response_mask"],
        )
        options = {"rollout_weights": weights} if config.is_weight.enabled else {}
        return options, mask * (keep != 0), metrics


@functools.cache
def _say(text: str) -> None:
    _logger.warning("dl_norm: %s", text)


def _correction_means(seen: PolicyLossMetrics, tokens: Any) -> dict[str, Tensor]:
    """Under ROLL's names; its means of ratios are over sequences, these over tokens."""
    rollout, tokens = seen.rollout, torch.as_tensor(tokens)
    assert rollout is not None
    return {
        "actor/train_infer_ratio_token_mean@sum": (seen.tokens + rollout.k3 - rollout.k1) / tokens,
        "actor/is_weight_clipfrac@sum": rollout.truncated / tokens,
        "actor/train_infer_final_mask_mean": 1 - rollout.masked / seen.tokens.clamp(min=1),
    }


def _mask(data: Any) -> Any:
    mask = data.batch.get("final_response_mask", None)
    return data.batch["response_mask"][:, 1:] != 0 if mask is None else mask != 0
