"""The fused loss of slime and Miles: a micro-batch's lists of tensors, one tensor a response."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import dl_norm
from dl_norm._metrics import PolicyLossMetrics

from . import rollout as settings_of
from ._shared import adapter_loss, clip_fraction, offsets, required
from .log_probs import spread_over


def packed_loss(
    args: Any, batch: dict[str, Any], logits: Tensor, log_probs: list[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of a micro-batch from the log-probs of its responses."""
    lengths, new = batch["response_lengths"], torch.cat(log_probs)
    if new.shape[0] != sum(lengths):
        raise ValueError("tokens are cut over context-parallel ranks: use the reducer instead")
    streams = _Streams(args, batch, torch.cat)
    cu_seqlens = offsets(lengths, new.device)
    loss, seen = adapter_loss(new, *streams.of_the_loss, cu_seqlens=cu_seqlens, **streams.options)
    if new.numel() == 0:
        loss = loss + 0 * logits.sum()  # every rank runs backward
    return loss, streams.metrics(loss, seen, new.detach(), len(lengths))


class _Streams:
    """A micro-batch's lists of tensors, one a response, put together by ``place``."""

    def __init__(self, args: Any, batch: dict[str, Any], place: Callable[[list[Tensor]], Tensor]):
        rollout = batch.get("rollout_log_probs")
        recomputed = not getattr(args, "skip_actor_forward_only", False)
        old = batch.get("log_probs") if recomputed else None
        old = rollout if args.use_rollout_logprobs else old
        advantages = required(batch.get("advantages"), "advantages", "they are computed before")
        correction = settings_of.slime(args)
        if correction is not None:
            required(rollout or None, "rollout_log_probs", "--use-tis needs them in the batch")
        self.args = args
        self.old, self.rollout = (place(stream) if stream else None for stream in (old, rollout))
        self.mask = place(batch["loss_masks"])
        self.of_the_loss = self.old, place(advantages), self.mask
        self.options = {
            "clip": {
                "eps_low": args.eps_clip,
                "eps_high": args.eps_clip_high,
                "dual_clip": getattr(args, "eps_clip_c", None),
            },
            "rollout_log_probs": None if correction is None else self.rollout,
            "rollout_correction": correction,
            **({"rollout_mean_weight": _made_before(args)} if normalises(args) else {}),
            **(getattr(args, "delta_l_options", None) or {}),
        }

    def metrics(
        self, loss: Tensor, seen: PolicyLossMetrics, new: Tensor, samples: int
    ) -> dict[str, Tensor]:
        """slime's, of ``new`` log-probs: sums over samples of what are means over tokens here."""
        tokens = seen.tokens.clamp(min=1)
        means = {"pg_clipfrac": clip_fraction(seen), "ppo_kl": seen.kl_old_k1 / tokens}
        if self.rollout is not None:
            # slime's comparison: of the current policy where the rollout is the old one.
            ahead = new if self.old is None or self.args.use_rollout_logprobs else self.old
            gap = torch.where(self.mask != 0, ahead - self.rollout, 0.0).nan_to_num(0.0)
            means["train_rollout_logprob_abs_diff"] = gap.abs().sum() / tokens
            if seen.rollout is not None:
                means["tis_abs"] = gap.expm1().abs().sum() / tokens
                means |= _correction_means(seen)
                path = getattr(self.args, "custom_tis_function_path", None) or ""
                if "mis" in path.split("."):
                    means |= _mis_means(seen)
        return {
            "loss": loss.detach(),
            "pg_loss": loss.detach(),
            **{name: mean * samples for name, mean in means.items()},
        }


def _correction_means(seen: PolicyLossMetrics) -> dict[str, Tensor]:
    """Means over tokens, of the sums of k1 = -d and k3 = exp(d) - 1 - d."""
    rollout, tokens = seen.rollout, seen.tokens.clamp(min=1)
    assert rollout is not None
    return {
        "ois": seen.ratio / tokens,
        "tis": (seen.tokens + rollout.k3 - rollout.k1) / tokens,
        "tis_clipfrac": (rollout.truncated + rollout.masked) / tokens,
    }


def _mis_means(seen: PolicyLossMetrics) -> dict[str, Tensor]:
    """What of slime's MIS metrics the kernel has collected."""
    rollout, tokens = seen.rollout, seen.tokens.clamp(min=1)
    assert rollout is not None
    return {
        "mis_kl": rollout.k1 / tokens,
        "mis_k3_kl": rollout.k3 / tokens,
        "mis_rs_catastrophic_seq_fraction": rollout.vetoed / tokens,
    }


def loss_of_logits(
    args: Any, batch: dict[str, Any], logits: Tensor, mpu: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of logits (1, T, V_local), prompts and padding included, whose rows are not read."""
    if mpu.get_context_parallel_world_size() > 1 or getattr(args, "rollout_top_p", 1.0) != 1.0:
        raise ValueError(
            "delta_l_from_logits takes whole sequences and all of the vocabulary: leave it out "
            "with context parallelism and with --rollout-top-p"
        )
    totals, lengths = batch["total_lengths"], batch["response_lengths"]
    if any(total <= length for total, length in zip(totals, lengths, strict=True)):
        raise ValueError("a response without a prompt: its first token has no logits")
    padding = logits.shape[1] - sum(totals)

    def at_rows(parts: list[Tensor]) -> Tensor:
        """The row before a token predicts it."""
        placed = [
            pad(part, (total - part.shape[0] - 1, 1))
            for part, total in zip(parts, totals, strict=True)
        ]
        return pad(torch.cat(placed), (0, padding))

    streams = _Streams(args, batch, at_rows)
    loss_of = functools.partial(
        dl_norm.logits_policy_loss,
        temperature=getattr(args, "rollout_temperature", 1.0),
        tp_group=spread_over(mpu.get_tensor_model_parallel_group()),
        return_log_probs=True,
    )
    token_ids = at_rows([tokens[1:] for tokens in batch["unconcat_tokens"]])
    cu_seqlens = offsets([*totals, padding], logits.device)
    loss, seen = adapter_loss(
        logits[0], token_ids, *streams.of_the_loss, of=loss_of, cu_seqlens=cu_seqlens,
        **streams.options,
    )  # fmt: skip
    return loss, streams.metrics(loss, seen.metrics, seen.log_probs, len(lengths))


def normalises(args: Any) -> bool:
    """Whether the correction is to have a mean weight of 1; the reducer leaves that to slime."""
    return settings_of.slime_normalises(args) and getattr(args, "loss_type", "") != "policy_loss"


def _made_before(args: Any) -> Tensor:
    return required(
        getattr(args, "delta_l_mean_weight", None),
        "delta_l_mean_weight",
        "tis_batch_normalize needs the whole rollout, which dl_norm.integrations.slime.advantages "
        "sees and Miles has no hook for: set that, or tis_batch_normalize: false",
    )


def mean_weight(args: Any, rollout_data: dict[str, Any], group: Any) -> Tensor:
    old, rollout = (
        required(
            rollout_data.get(name) or None, name, "tis_batch_normalize needs it in the rollout"
        )
        for name in ("log_probs", "rollout_log_probs")
    )
    lengths, mask = rollout_data["response_lengths"], torch.cat(rollout_data["loss_masks"])
    correction = required(settings_of.slime(args), "rollout_correction", "set --use-tis")
    return dl_norm.rollout_mean_weight(
        torch.cat(old), torch.cat(rollout), mask, correction,
        cu_seqlens=offsets(lengths, mask.device), group=group,
    )  # fmt: skip
