"""``trl.GRPOTrainer`` with the loss of this package: weights, hand-over, metrics."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import get_config_model_id

import dl_norm
from dl_norm._aggregations import AGGREGATIONS, Method

from ..rollout import trl as trl_correction
from . import entropy
from .config import DeltaLGRPOConfig, check_options, policy_loss_options, warnings_of
from .fused_head import add_loss_head, loss_of_gradient
from .metrics import MetricRecords, loss_record, vespo_old_log_probs

logger = get_logger(__name__)

# Keys in TRL's batch dictionary
SEQUENCE_WEIGHTS = "sequence_weights"  # (B,) weights
KEPT = "kept_sequences"  # (B,) bool, with drop_zero_advantage_groups
LOSS_TOKENS = "loss_tokens"  # int, how many tokens of the micro-batch count


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    """(B, T) integer mask of the tokens that count: completion tokens that the policy wrote."""
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    return mask * inputs[KEPT][:, None] if KEPT in inputs else mask


def _of_sequences(advantages: Tensor) -> Tensor:
    """(B,) one number a sequence: the sum, where TRL's subclasses have one per token."""
    return advantages.sum(1) if advantages.dim() == 2 else advantages


def _without_dim_of_one(values: Tensor) -> Tensor:
    """(B,) if TRL's values are one per sequence, (B,) or (B, 1); (B, T) if they are per token."""
    return values.squeeze(1) if values.dim() == 2 and values.size(1) == 1 else values


def _generation_batch_weights(lengths: Tensor, aggregation: Method, **known: Any) -> Tensor:
    """(G,) weights of all sequences of a generation batch from their (G,) lengths.

    ``known``: what any method may ask for. ``dl_norm.sequence_weights`` leaves empty sequences
    (fully masked, as by ``mask_truncated_completions``) out of G; TRL's "grpo", "dr_grpo" and
    "luspo" divide by all sequences, so for these the weights shrink by the share of sequences that
    are not empty.
    """
    row = AGGREGATIONS[aggregation]
    asked_for = {
        "alpha": row.takes_alpha, "max_length": row.takes_max_length, "groups": row.takes_groups,
        "advantages": row.takes_advantages, "keep": True,
    }  # fmt: skip
    known = {name: known[name] for name, asked in asked_for.items() if asked}
    weights = dl_norm.sequence_weights(lengths, aggregation, group="local", **known)
    if aggregation in ("grpo", "dr_grpo", "luspo"):
        counted = lengths > 0 if known["keep"] is None else (lengths > 0) | ~known["keep"]
        weights = weights * counted.float().mean()
    return weights


class DeltaLGRPOTrainer(GRPOTrainer):
    """``trl.GRPOTrainer`` whose loss is the weighted sum of ``dl_norm.policy_loss``.

    Takes the arguments of ``GRPOTrainer``; ``args`` is a ``DeltaLGRPOConfig``. Metrics keep TRL's
    names and meaning; they stay on the device until they are logged. A callback with a method
    ``on_policy_loss(trainer, log_probs, mask, inputs)`` sees every micro-batch that is trained on.

    The log-ratio is clamped to +-20 as in ``dl_norm.policy_loss``: a ratio beyond e^20, where TRL's
    loss is about to overflow, gets no gradient.

    Raises:
        TypeError: ``args`` is not a ``DeltaLGRPOConfig``.
        ValueError: an option that the loss cannot follow (see ``DeltaLGRPOConfig``).
    """

    _tag_names = [*GRPOTrainer._tag_names, "dl-norm"]  # noqa: RUF012  (as in TRL)

    args: DeltaLGRPOConfig
    model: Any
    accelerator: Any

    def __init__(self, model, reward_funcs=None, args=None, *more, **options):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = DeltaLGRPOConfig(f"{name.split('/')[-1]}-GRPO")
        if not isinstance(args, DeltaLGRPOConfig):
            raise TypeError(
                f"args must be a DeltaLGRPOConfig; got {type(args).__name__}: build "
                "DeltaLGRPOConfig with the same options, without loss_type"
            )
        check_options(args)  # again: fields may have been changed since the config was built
        self._records = MetricRecords()
        super().__init__(model, reward_funcs, args, *more, **options)
        if args.aggregation == "delta_l":
            logger.warning_once(
                "The loss is aggregated by DeltaL Normalization: aggregation='delta_l' with "
                f"alpha={args.alpha:g} and M=max_completion_length={args.max_completion_length}. "
                f"For TRL's default loss set aggregation={GRPOConfig.loss_type!r}."
            )
        for warning in warnings_of(args):
            logger.warning(warning)
        if args.fused_lm_head:
            self._fuse_head()

    def _fuse_head(self) -> None:
        refused = {
            "images or other non-text inputs": self._is_vlm,
            "DeepSpeed ZeRO stage 3 (use FSDP2)": is_deepspeed_zero3_enabled(),
        }
        for what, present in refused.items():
            if present:
                raise ValueError(
                    f"fused_lm_head=True does not support {what}; or use fused_lm_head=False"
                )
        for model in filter(None, (self.model, self.ref_model)):
            model = self.accelerator.unwrap_model(model)
            model = model.get_base_model() if is_peft_model(model) else model
            add_loss_head(model, self.temperature, self.args.cast_lm_head_to_fp32)

    def _generate_and_score_completions(self, inputs):
        """TRL's batch plus the (B,) weights of its sequences, out of all processes' sequences."""
        batch = super()._generate_and_score_completions(inputs)
        local = _loss_mask(batch).sum(dim=1)
        lengths = self.accelerator.gather(local)
        advantages = self.accelerator.gather(_of_sequences(batch["advantages"]))
        # The sequences of a prompt stand together.
        size = self.num_generations if self.model.training else self.num_generations_eval
        assert size is not None
        keep = None
        if self.args.drop_zero_advantage_groups:
            # Of each token, where there is one: those of a sequence may add up to 0.
            signal = batch["advantages"].reshape(len(local), -1).ne(0).any(1)
            signal = self.accelerator.gather(signal)
            keep = signal.view(-1, size).any(1).repeat_interleave(size)
        weights = _generation_batch_weights(
            lengths,
            cast(Method, self.args.aggregation),
            alpha=self.args.alpha,
            max_length=self.max_completion_length,
            groups=torch.arange(lengths.numel(), device=lengths.device) // size,
            advantages=advantages,
            keep=keep,
        )
        start = self.accelerator.process_index * local.numel()
        own = slice(start, start + local.numel())
        batch[SEQUENCE_WEIGHTS] = weights[own]
        if keep is not None:
            batch[KEPT] = keep[own]
        return batch

    def _prepare_inputs(self, generation_batch):
        """TRL's micro-batch; with the fused head its token count too, as a number on the host.

        Counted for all micro-batches of a generation at once, when generation has just ended and
        nothing waits on the device: the head can then leave out masked tokens without a sync.
        """
        inputs = super()._prepare_inputs(generation_batch)
        if self.args.fused_lm_head and LOSS_TOKENS not in inputs:
            micro_batches: Any = self._buffered_inputs if self.model.training else [inputs]
            counts = torch.stack([_loss_mask(batch).sum() for batch in micro_batches]).tolist()
            for batch, count in zip(micro_batches, counts, strict=True):
                batch[LOSS_TOKENS] = int(count)
        return inputs

    def _compute_loss(self, model, inputs):
        if SEQUENCE_WEIGHTS not in inputs:
            raise ValueError(
                f"the batch has no {SEQUENCE_WEIGHTS!r}: weights need the whole generation batch, "
                "so an override of _generate_and_score_completions must call super()"
            )
        train = self.model.training
        accumulation_steps = self.current_gradient_accumulation_steps if train else 1
        # Gradients are averaged over processes and nobody divides by the accumulation steps:
        # GRPOTrainer sets `loss_is_scaled_for_ga`. An evaluation batch is used where it was made.
        weights = inputs[SEQUENCE_WEIGHTS] * dl_norm.gradient_scale(
            num_processes=self.accelerator.num_processes,
            accumulation_steps=accumulation_steps,
            micro_batches_per_generation=self.args.steps_per_generation if train else 1,
        )
        mask = _loss_mask(inputs)
        coef = entropy.applied_coef(self) / accumulation_steps
        if self.args.fused_lm_head:
            loss, metrics, log_probs, entropies, aux_loss = self._fused_loss(
                model, inputs, mask, weights, coef
            )
        else:
            log_probs, entropies, aux_loss = self._score(model, inputs)
            loss, metrics = self._loss_of_log_probs(log_probs, entropies, inputs, mask, weights)
        log_probs = log_probs.detach()
        if train:
            self._show_callbacks(log_probs, mask, inputs)
        record = loss_record(metrics, log_probs, inputs, mask, self.args)
        record["token_mean", "entropy"] = (entropies.detach() * mask).sum()
        if self._entropy_bonus_enabled:
            # TRL logs the policy part without the division by accumulation_steps, "dapo" with it.
            undo = 1 if self.args.aggregation == "dapo" else accumulation_steps
            record["mean", "policy_loss"] = loss.detach() * undo
            active = entropy.acts_on(mask, self._entropy_mask(entropies, mask))
            # The fused head has given the loss its gradient, so there the entropies have none.
            loss = loss - coef * (entropies * active).sum() / active.sum().clamp(min=1.0)
            if train and self.use_adaptive_entropy:
                entropy.adapt(self, entropies, active)
            if train and self.accelerator.sync_gradients:
                self._metrics["train"]["entropy_coef"].append(self.entropy_coef)
        if aux_loss is not None:
            record["mean", "aux_loss"] = aux_loss.detach()
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation_steps
        self._records.add("train" if train else "eval", record, self.accelerator.gather)
        return loss

    def _show_callbacks(self, log_probs, mask, inputs) -> None:
        """``callback.on_policy_loss(trainer, log_probs, mask, inputs)``, of those that have it."""
        for callback in self.callback_handler.callbacks:
            if show := getattr(callback, "on_policy_loss", None):
                show(self, log_probs, mask, inputs)

    def _loss_of_log_probs(
        self, log_probs, entropies, inputs, mask, weights
    ) -> tuple[Tensor, dl_norm.PolicyLossMetrics]:
        """0-dim loss of (B, T) log-probs, the part of it that TRL calls policy; its metrics."""
        arguments = self._loss_arguments(inputs, mask, weights)
        if self.args.surrogate == "vespo" and arguments.pop("rollout_correction", None):
            # Of the product, and no factor beside it.
            del arguments["rollout_log_probs"]
            arguments["old_log_probs"] = vespo_old_log_probs(log_probs.detach(), inputs)
        return dl_norm.policy_loss(
            log_probs,
            **arguments,
            **self._drop_masks(log_probs.detach(), entropies, inputs, mask),
            return_metrics=True,
        )

    def _loss_arguments(self, inputs, mask, weights) -> dict[str, Any]:
        """What ``policy_loss`` and ``linear_policy_loss`` are told before log-probs are known."""
        correction = trl_correction(self)
        rollout: dict[str, Any] = {}
        if correction is not None:
            # What TRL has made of these, inputs["importance_sampling_ratio"], is not read.
            rollout["rollout_log_probs"] = inputs["sampling_per_token_logps"]
            rollout["rollout_correction"] = correction
        return {
            "old_log_probs": inputs.get("old_per_token_logps"),  # None: on-policy, the ratio is 1
            "advantages": _without_dim_of_one(inputs["advantages"]),
            "mask": mask,
            "weights": weights,
            "ref_log_probs": inputs.get("ref_per_token_logps"),
            **rollout,
            **policy_loss_options(self.args),
        }

    def _drop_masks(self, log_probs, entropies, inputs, mask) -> dict[str, Any]:
        """Masks of ``policy_loss`` that depend on the current policy; what is 0 keeps its KL."""
        masks: dict[str, Any] = {
            "entropy_mask": self._entropy_mask(entropies, mask),
            "sequence_mask": None,
        }
        if self.off_policy_mask_threshold is not None:
            advantages = _without_dim_of_one(inputs["advantages"])
            per_sequence = advantages.dim() == 1
            old_log_probs = inputs.get("old_per_token_logps")
            old_log_probs = log_probs if old_log_probs is None else old_log_probs
            keep = self.get_off_policy_mask(
                advantages=advantages.unsqueeze(1) if per_sequence else advantages,
                per_token_logps=log_probs,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", old_log_probs),
                mask=mask,
                off_policy_threshold=self.off_policy_mask_threshold,
            )
            if per_sequence:
                masks["sequence_mask"] = keep.squeeze(1)
            else:
                high = masks["entropy_mask"]
                masks["entropy_mask"] = keep if high is None else keep * high
        return masks

    def _entropy_mask(self, entropies, mask) -> Tensor | None:
        """(B, T) bool: the tokens of highest entropy, on all processes; None: all tokens."""
        if self.top_entropy_quantile == 1.0:
            return None
        return self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)

    def _fused_loss(
        self, model, inputs, mask, weights, entropy_coef=0.0
    ) -> tuple[Tensor, dl_norm.PolicyLossMetrics, Tensor, Tensor, Tensor | None]:
        """The loss from the last hidden states; its metrics; detached log-probs and entropies,
        (B, T) each; the load-balancing loss of experts, or None. The entropy bonus is in the
        gradient of the loss and not in its value.

        Where an option needs the current policy's log-probs or entropies before the loss of any
        token is known, the head's logits are computed twice: four matrix products, as elsewhere.
        """
        ids = inputs["completion_ids"]
        rows = slice(-ids.size(1) - 1, -1)  # position t predicts token t + 1
        outputs: list[Any] = []
        size = {
            "chunk_size": self.args.fused_lm_head_chunk_size,
            "max_tokens": inputs.get(LOSS_TOKENS),
        }

        def one_pass(hidden, weight, **head) -> Tensor:
            bonus = entropy.bonus_options(entropy_coef, mask)
            result: Any = dl_norm.linear_policy_loss(
                hidden[:, rows], weight, ids,
                **self._loss_arguments(inputs, mask, weights),
                **head, **size, **bonus, entropy=True, return_log_probs=True, return_metrics=True,
            )  # fmt: skip
            loss, seen = result
            of_policy = loss.detach()
            if entropy_coef:
                mean = (bonus["entropy_weights"] * seen.entropy).sum()
                of_policy = of_policy + bonus["entropy_coef"] * mean
            outputs.extend([of_policy, seen.metrics, seen.log_probs, seen.entropy])
            return loss

        def two_passes(hidden, weight, **head) -> Tensor:
            log_probs, entropies = dl_norm.token_log_probs(
                hidden[:, rows], ids, weight, mask=mask, **head, **size, entropy=True
            )
            leaf = log_probs.detach().requires_grad_(torch.is_grad_enabled())
            loss, metrics = self._loss_of_log_probs(leaf, entropies, inputs, mask, weights)
            outputs.extend([loss.detach(), metrics, log_probs, entropies])
            if not torch.is_grad_enabled():
                return loss
            (grad,) = torch.autograd.grad(loss, leaf)
            active = entropy.acts_on(mask, self._entropy_mask(entropies, mask))
            bonus = entropy.bonus_options(entropy_coef, active)
            return loss_of_gradient(
                hidden[:, rows], weight, ids, grad, mask, **head, **size, **bonus
            )

        loss_head = two_passes if self._needs_log_probs_first() else one_pass
        result = self._run_model(
            model,
            torch.cat([inputs["prompt_ids"], ids], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            loss_head=loss_head,
            **({"output_router_logits": True} if self.aux_loss_enabled else {}),
        )
        loss, aux_loss = result if self.aux_loss_enabled else (result, None)
        value, metrics, log_probs, entropies = outputs
        # The value in float32, whatever mixed precision makes of the output of a module.
        return loss + (value - loss).detach(), metrics, log_probs, entropies, aux_loss

    def _needs_log_probs_first(self) -> bool:
        return (
            self.off_policy_mask_threshold is not None
            or self.top_entropy_quantile < 1.0
            or self.args.importance_sampling_level == "sequence"
            or self.args.surrogate == "vespo"
        )

    def _run_model(self, model, input_ids, attention_mask, **options) -> Any:
        with self.accelerator.autocast():
            return model(input_ids=input_ids, attention_mask=attention_mask, **options)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, *more, **options
    ):
        """TRL's; without gradient and with the fused head, by the code that the loss uses.

        So the old policy's log-probs are those that the loss compares them with.
        """
        if not self.args.fused_lm_head or torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, *more, **options
            )
        outputs = []
        rows = slice(-logits_to_keep - 1, -1)
        for ids, attended in zip(
            input_ids.split(batch_size or len(input_ids)),
            attention_mask.split(batch_size or len(input_ids)),
            strict=True,
        ):

            def score(hidden, weight, *, ids=ids, attended=attended, **head) -> Tensor:
                log_probs, entropies = dl_norm.token_log_probs(
                    hidden[:, rows], ids[:, -logits_to_keep:], weight, entropy=True, **head,
                    mask=attended[:, -logits_to_keep:], compact=True,
                    chunk_size=self.args.fused_lm_head_chunk_size,
                )  # fmt: skip
                outputs.append((log_probs, entropies))
                return log_probs

            self._run_model(model, ids, attended, loss_head=score)
        log_probs, entropies = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        return log_probs, entropies, None

    def _score(self, model, inputs):
        """TRL's per-token log-probs (B, T), entropies (B, T) and auxiliary loss (or None)."""
        completion_ids = inputs["completion_ids"]
        multimodal = (
            "pixel_values",
            "image_grid_thw",
            "num_images",
            "pixel_attention_mask",
            "spatial_shapes",
            "num_tiles",
            "image_sizes",
            "token_type_ids",
            "mm_token_type_ids",
            "image_position_ids",
        )
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], completion_ids], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            completion_ids.size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs.get(name) for name in multimodal},
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        for name, values in self._records.pop(mode).items():
            self._metrics[mode][name] += values
        super().log(logs, start_time)
