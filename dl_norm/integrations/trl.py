"""TRL's GRPO trainer with the aggregations of this package.

``DeltaLGRPOTrainer`` is ``trl.GRPOTrainer`` with one thing replaced: how the token losses of a
batch become one number. TRL still generates, scores, computes advantages, log-probs, entropies and
the reference's log-probs, and logs the same metrics under the same names. Use it as the original:

    args = DeltaLGRPOConfig(output_dir="out", aggregation="delta_l", alpha=0.75)
    DeltaLGRPOTrainer(model=..., reward_funcs=..., args=args, train_dataset=...).train()

The weights of the sequences are computed once per generation batch, over all its sequences on all
processes, right after generation, and travel with the sequences through TRL's shuffling and
splitting. No micro-batch ever normalises by what it happens to see.

What TRL does beside the clipped token loss is kept: the KL term (with or without its bias
correction), asymmetric and two-sided clipping, vLLM's importance sampling correction, off-policy
sequence masking, the high-entropy token mask, a constant entropy bonus and the load-balancing loss
of mixtures of experts. What cannot be kept raises ValueError at construction.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections import defaultdict
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from packaging.version import Version

import dl_norm
from dl_norm.options import PolicyLossOptions
from dl_norm.weights import METHODS

_INSTALL = "pip install 'dl-norm[trl]'"
try:
    _TRL_VERSION = importlib.metadata.version("trl")
except importlib.metadata.PackageNotFoundError as error:
    raise ImportError(
        f"dl_norm.integrations.trl needs the trl package, which is not installed: {_INSTALL}"
    ) from error
# The trainer overrides two private methods, so the range is the versions that were read and tested.
if not Version("1.16") <= Version(_TRL_VERSION) < Version("1.17"):
    raise ImportError(
        f"dl_norm.integrations.trl needs trl>=1.16,<1.17, but trl {_TRL_VERSION} is installed: "
        f"{_INSTALL}"
    )

from trl.trainer.grpo_config import GRPOConfig  # noqa: E402  (after the version is checked)
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.utils import get_config_model_id  # noqa: E402

__all__ = ["DeltaLGRPOConfig", "DeltaLGRPOTrainer", "micro_batch_scale"]

SEQUENCE_WEIGHTS = "sequence_weights"  # key of the (B,) weights in TRL's batch dictionary

# Options that the loss here cannot follow, and what to do instead. Each must keep TRL's default.
_REFUSED = {
    "importance_sampling_level": (
        "the loss uses one ratio per token; use 'token', or GRPOTrainer for sequence-level ratios"
    ),
    "use_adaptive_entropy": (
        "the adaptive entropy controller is not supported; use a constant entropy_coef"
    ),
    **dict.fromkeys(
        ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        "it only steers the adaptive entropy controller, which is not supported; leave it unset",
    ),
    **dict.fromkeys(
        ("sapo_temperature_neg", "sapo_temperature_pos"),
        "it belongs to the token loss of SAPO; use GRPOTrainer with loss_type='sapo'",
    ),
    **dict.fromkeys(
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        "it belongs to the token loss of VESPO; use GRPOTrainer with loss_type='vespo'",
    ),
}


@dataclass
class DeltaLGRPOConfig(GRPOConfig):
    r"""``trl.GRPOConfig`` with the choice of how token losses are aggregated.

    Args:
        aggregation: "delta_l" (default), "grpo", "dapo" or "dr_grpo". The last three give the loss
            and the gradients of TRL's ``loss_type`` of that name.
        alpha: exponent of "delta_l", x_i = (1/M) L_i^-alpha / sum_j L_j^-alpha, with
            M = ``max_completion_length``. 1 has the least variance, 0 is Dr. GRPO; the paper uses
            1 and 0.75.
        loss_type: leave it unset (None). ``aggregation`` takes its place; a value that disagrees
            with it raises.

    Raises:
        ValueError: an option that the loss cannot follow, saying which, why and what to do.
    """

    aggregation: str = field(
        default="delta_l",
        metadata={
            "help": "How token losses become one loss: 'delta_l', 'grpo', 'dapo' or 'dr_grpo'."
        },
    )
    alpha: float = field(
        default=1.0,
        metadata={"help": "Exponent of aggregation 'delta_l': weights proportional to L^-alpha."},
    )
    loss_type: str | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        metadata={"help": "Not used: `aggregation` takes its place. Raises when they disagree."},
    )

    def __post_init__(self):
        super().__post_init__()
        _check_options(self)


def _check_options(args: DeltaLGRPOConfig) -> None:
    if args.aggregation not in METHODS:
        raise ValueError(
            f"aggregation must be one of {', '.join(METHODS)}; got {args.aggregation!r}"
        )
    if not (math.isfinite(args.alpha) and args.alpha >= 0):
        raise ValueError(f"alpha must be a finite number >= 0; got {args.alpha!r}")
    if args.aggregation != "delta_l" and args.alpha != 1.0:
        raise ValueError(
            f"alpha={args.alpha!r} has no meaning for aggregation={args.aggregation!r}; leave it "
            "unset, or use aggregation='delta_l'"
        )
    if args.loss_type is not None and args.loss_type != args.aggregation:
        raise ValueError(
            f"loss_type={args.loss_type!r} disagrees with aggregation={args.aggregation!r}, which "
            "takes its place: leave loss_type unset and set aggregation to one of "
            f"{', '.join(METHODS)}; for any other loss_type use trl's GRPOTrainer"
        )
    if not args.max_completion_length and args.aggregation in ("delta_l", "dr_grpo"):
        raise ValueError(
            f"max_completion_length={args.max_completion_length!r}, but aggregation="
            f"{args.aggregation!r} divides by it (the M of the formula): set max_completion_length"
        )
    try:
        PolicyLossOptions(
            eps_low=args.epsilon,
            eps_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
            delta=args.delta,
            beta=args.beta,
        )
    except ValueError as error:
        raise ValueError(
            f"epsilon, epsilon_high, delta or beta is out of range: {error}"
        ) from error
    defaults = {f.name: f.default for f in fields(GRPOConfig) if f.default is not MISSING}
    for name, reason in _REFUSED.items():
        value = getattr(args, name)
        if value != defaults[name]:
            raise ValueError(f"{name}={value!r} is not supported: {reason}")


def micro_batch_scale(
    num_processes: int, steps_per_generation: int, accumulation_steps: int
) -> float:
    r"""Factor on a micro-batch's weighted sum of token losses, so that an optimizer step is right.

    P processes generate G sequences and split them into S = ``steps_per_generation`` micro-batches
    of b sequences on each process: G = P S b. The weights x_i belong to the generation batch, whose
    loss is L = sum_{i=1..G} x_i sum_t l_it. An optimizer step sees a window of
    A = ``accumulation_steps`` micro-batches per process, that is P A b sequences, and what the
    trainer does to the loss l_pm of micro-batch m on process p is

        gradient of the step = (1/P) sum_p sum_{m in window} grad l_pm

    (1/P because gradients are averaged over processes; no 1/A, because GRPOTrainer sets
    ``loss_is_scaled_for_ga`` and accelerate is given one accumulation step). With

        l_pm = P (S/A) sum_{i in micro-batch} x_i sum_t l_it

    the step's gradient is (S/A) sum_{i in window} x_i grad sum_t l_it. For A = S that is exactly
    grad L. Otherwise S/A turns the window's share into an estimate of the whole: the average over
    the S/A steps that use up one generation batch (S > A) is grad L, and a window of several
    generation batches (S < A) has the average of their A/S gradients. At the end of an epoch A is
    the number of micro-batches left. An evaluation batch is used up where it is generated:
    S = A = 1.

    With x_i = 1/(G L_i), 1/(G M) and 1/sum_j L_j, l_pm is 1/(A b L_i), 1/(A b M) and
    P S/(A sum_j L_j) times the token losses: TRL's ``loss_type`` "grpo", "dr_grpo" and "dapo", for
    every P, S, A and b, since TRL's micro-batches all have b sequences.
    """
    return num_processes * steps_per_generation / accumulation_steps


def _loss_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """(B, T) integer mask of the tokens that count: completion tokens that the policy wrote."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _generation_batch_weights(
    lengths: torch.Tensor, aggregation: str, alpha: float, max_length: int | None
) -> torch.Tensor:
    """(G,) weights of all sequences of a generation batch from their (G,) lengths.

    ``dl_norm.sequence_weights`` leaves empty sequences (fully masked, as by
    ``mask_truncated_completions``) out of G; TRL's "grpo" and "dr_grpo" divide by all sequences, so
    for these two the weights shrink by the share of sequences that are not empty.
    """
    if aggregation == "delta_l":
        return dl_norm.sequence_weights(lengths, alpha=alpha, max_length=max_length)
    if aggregation == "dapo":
        return dl_norm.sequence_weights(lengths, "dapo")
    share = (lengths > 0).float().mean()
    max_length = max_length if aggregation == "dr_grpo" else None
    return share * dl_norm.sequence_weights(lengths, aggregation, max_length=max_length)


class DeltaLGRPOTrainer(GRPOTrainer):
    """``trl.GRPOTrainer`` whose loss is the weighted sum of ``dl_norm.policy_loss``.

    Takes the arguments of ``GRPOTrainer``; ``args`` is a ``DeltaLGRPOConfig``. Metrics keep TRL's
    names and meaning; they stay on the device until they are logged.

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
        _check_options(args)  # again: fields may have been changed since the config was built
        self._gathered: dict[str, list[dict[tuple[str, str], torch.Tensor]]] = defaultdict(list)
        super().__init__(model, reward_funcs, args, *more, **options)

    def _generate_and_score_completions(self, inputs):
        """TRL's batch plus the (B,) weights of its sequences, out of all processes' sequences."""
        batch = super()._generate_and_score_completions(inputs)
        local = _loss_mask(batch).sum(dim=1)
        weights = _generation_batch_weights(
            self.accelerator.gather(local),
            self.args.aggregation,
            self.args.alpha,
            self.max_completion_length,
        )
        start = self.accelerator.process_index * local.numel()
        batch[SEQUENCE_WEIGHTS] = weights[start : start + local.numel()]
        return batch

    def _compute_loss(self, model, inputs):
        if SEQUENCE_WEIGHTS not in inputs:
            raise ValueError(
                f"the batch has no {SEQUENCE_WEIGHTS!r}: weights need the whole generation batch, "
                "so an override of _generate_and_score_completions must call super()"
            )
        train = self.model.training
        accumulation_steps = self.current_gradient_accumulation_steps if train else 1
        steps_per_generation = self.args.steps_per_generation if train else 1
        assert steps_per_generation is not None  # GRPOConfig always sets it
        weights = inputs[SEQUENCE_WEIGHTS] * micro_batch_scale(
            self.accelerator.num_processes, steps_per_generation, accumulation_steps
        )
        mask = _loss_mask(inputs)
        log_probs, entropies, aux_loss = self._score(model, inputs)
        old_log_probs = inputs.get("old_per_token_logps")  # None: on-policy, the ratio is 1
        entropy_mask = (
            self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)
            if self.top_entropy_quantile < 1.0
            else None
        )

        # The bias-corrected KL is multiplied by the differentiable ratio: a term of its own.
        corrected = self.beta != 0.0 and self.args.use_bias_correction_kl
        loss: Any = dl_norm.policy_loss(
            log_probs,
            old_log_probs,
            inputs["advantages"],
            mask,
            weights,
            eps_low=self.epsilon_low,
            eps_high=self.epsilon_high,
            delta=self.args.delta,
            ref_log_probs=None if corrected else inputs.get("ref_per_token_logps"),
            beta=0.0 if corrected else self.beta,
            rollout_weights=self._rollout_weights(log_probs, inputs, mask, entropy_mask),
        )
        kl = self._token_kl(log_probs, inputs, mask) if self.beta != 0.0 else None
        if corrected:
            loss = loss + self.beta * (weights.unsqueeze(1) * kl).sum()

        record = self._clip_statistics(log_probs.detach(), inputs, mask)
        record["token_mean", "entropy"] = (entropies.detach() * mask).sum()
        if kl is not None:
            record["token_mean", "kl"] = kl.detach().sum()
        if self._entropy_bonus_enabled:
            # TRL logs the policy part without the division by accumulation_steps, "dapo" with it.
            undo = 1 if self.args.aggregation == "dapo" else accumulation_steps
            record["mean", "policy_loss"] = loss.detach() * undo
            active = mask if entropy_mask is None else mask * entropy_mask
            entropy = (entropies * active).sum() / active.sum().clamp(min=1.0)
            loss = loss - self.entropy_coef * entropy / accumulation_steps
            if train and self.accelerator.sync_gradients:
                self._metrics["train"]["entropy_coef"].append(self.entropy_coef)
        if self.aux_loss_enabled:
            record["mean", "aux_loss"] = aux_loss.detach()
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation_steps
        # One gather per micro-batch, and none in `log`, which a callback may call on one process.
        everywhere = self.accelerator.gather(
            torch.stack([value.float() for value in record.values()]).unsqueeze(0)
        )
        self._gathered["train" if train else "eval"].append(
            dict(zip(record, everywhere.unbind(dim=1), strict=True))
        )
        return loss

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

    def _rollout_weights(self, log_probs, inputs, mask, entropy_mask) -> torch.Tensor | None:
        """Product of what TRL multiplies the clipped token loss with: (B,), (B, T) or None."""
        factors = []
        if self.off_policy_mask_threshold is not None:
            advantages = inputs["advantages"]
            old_log_probs = inputs.get("old_per_token_logps", log_probs.detach())
            factors.append(
                self.get_off_policy_mask(
                    advantages=advantages.unsqueeze(1) if advantages.dim() == 1 else advantages,
                    per_token_logps=log_probs,
                    sampling_per_token_logps=inputs.get("sampling_per_token_logps", old_log_probs),
                    mask=mask,
                    off_policy_threshold=self.off_policy_mask_threshold,
                )
            )
        if entropy_mask is not None:
            factors.append(entropy_mask)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            factors.append(inputs["importance_sampling_ratio"])
        if not factors:
            return None
        product = math.prod(factors[1:], start=factors[0].float())
        return product.squeeze(1) if product.size(1) == 1 else product

    def _token_kl(self, log_probs, inputs, mask) -> torch.Tensor:
        """(B, T) k3 estimate of the KL to the reference, 0 where masked.

        With TRL's bias correction it is times the ratio, and both factors have a gradient.
        """
        log_probs = log_probs if self.args.use_bias_correction_kl else log_probs.detach()
        difference = inputs["ref_per_token_logps"] - log_probs
        difference = difference.masked_fill(mask == 0, 0.0)
        kl = torch.exp(difference) - difference - 1
        if not self.args.use_bias_correction_kl:
            return kl
        return kl * torch.exp(self._log_ratio(log_probs, inputs, mask))

    def _log_ratio(self, log_probs, inputs, mask) -> torch.Tensor:
        old_log_probs = inputs.get("old_per_token_logps")
        if old_log_probs is None:
            old_log_probs = log_probs.detach()
        return (log_probs - old_log_probs).masked_fill(mask == 0, 0.0)

    def _clip_statistics(self, log_probs, inputs, mask) -> dict[tuple[str, str], torch.Tensor]:
        """Sums and extremes of this micro-batch behind TRL's clip metrics, on the device."""
        ratio = torch.exp(self._log_ratio(log_probs, inputs, mask))
        if self.args.delta is not None:
            ratio = ratio.clamp(max=self.args.delta)
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        low = ((ratio < 1 - self.epsilon_low) & (advantages < 0)) * mask
        high = ((ratio > 1 + self.epsilon_high) & (advantages > 0)) * mask
        lengths = mask.sum(dim=1)
        low_counts, high_counts = low.sum(dim=1), high.sum(dim=1)
        empty = lengths == 0  # have no clip ratio: left out of minimum and maximum
        lowest = (low_counts / lengths).masked_fill(empty, torch.inf).amin()
        highest = (high_counts / lengths).masked_fill(empty, -torch.inf).amax()
        return {
            ("sum", "tokens"): lengths.sum(),
            ("token_mean", "clip_ratio/low_mean"): low_counts.sum(),
            ("token_mean", "clip_ratio/high_mean"): high_counts.sum(),
            ("token_mean", "clip_ratio/region_mean"): low_counts.sum() + high_counts.sum(),
            ("min", "clip_ratio/low_min"): lowest,
            ("max", "clip_ratio/high_max"): highest,
        }

    def _reduce_metrics(self, mode: str) -> None:
        """Put the metrics of the micro-batches since the last log where TRL logs them from.

        One copy to the host for all of them; each record holds one value per process.
        """
        records = self._gathered.pop(mode, [])
        if not records:
            return
        columns = {key: torch.stack([r[key] for r in records], dim=1) for key in records[0]}
        tokens = columns.pop(("sum", "tokens")).sum(dim=0).clamp(min=1.0)
        reduce = {
            "token_mean": lambda values: values.sum(dim=0) / tokens,
            "mean": lambda values: values.nanmean(dim=0),
            "min": lambda values: values.amin(dim=0),
            "max": lambda values: values.amax(dim=0),
        }
        reduced = torch.stack([reduce[kind](values) for (kind, _), values in columns.items()])
        for (_, name), values in zip(columns, reduced.tolist(), strict=True):
            # infinite: no process had a token. TRL's log leaves NaN out of its averages.
            self._metrics[mode][name] += [v if math.isfinite(v) else math.nan for v in values]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._reduce_metrics("train" if self.model.training else "eval")
        super().log(logs, start_time)
