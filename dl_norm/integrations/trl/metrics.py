"""TRL's metrics of the loss, kept on the device until they are logged."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dl_norm import PolicyLossMetrics
from dl_norm.surrogates import Vespo

from .config import is_own, policy_loss_options

# (how values of micro-batches and processes become one, name) -> 0-dim tensor. "token_mean" and
# "row_mean" are sums to be divided by the number of tokens or sequences.
Record = dict[tuple[str, str], Tensor]
_PHI = "row_mean", "vespo/phi_seq_mean"
# The minimum and the maximum over nothing
LIMITS = math.inf, -math.inf


def loss_record(
    metrics: PolicyLossMetrics, log_probs: Tensor, inputs: dict[str, Any], mask: Tensor, args: Any
) -> Record:
    """What is behind TRL's metrics of the loss of a micro-batch, and the sizes that means need.

    Sums over tokens are what the loss has counted on its way. TRL's extremes over sequences, and
    its shares where the ratio is one of whole sequences, are not among them.

    log_probs: (B, T) without gradient; inputs: TRL's batch; mask: (B, T); args: DeltaLGRPOConfig.
    """
    record: Record = {("size", "tokens"): metrics.tokens}
    if args.beta != 0.0:
        record["token_mean", "kl"] = metrics.kl_ref
    if args.surrogate == "vespo":
        phi = _vespo_phi(log_probs, inputs, mask, args)
        return record | {("size", "rows"): mask.new_tensor(len(mask)), _PHI: phi.sum()}
    if is_own(args.surrogate):
        if ":" not in args.surrogate:  # what the loss has dropped or clipped
            clipped = metrics.clipped_low + metrics.clipped_high + metrics.clipped_dual
            record["token_mean", "clip_ratio/region_mean"] = clipped
        return record | {("token_mean", name): value for name, value in metrics.extras.items()}
    if args.surrogate == "sapo":
        return record
    sequence_ratio = args.importance_sampling_level == "sequence"
    if args.surrogate == "cispo" and not sequence_ratio:
        record["token_mean", "cispo_clip_ratio"] = metrics.clipped_high
        return record
    old_log_probs = inputs.get("old_per_token_logps")
    log_ratio = None if old_log_probs is None else log_probs - old_log_probs
    advantages = inputs["advantages"]
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    if sequence_ratio:
        return record | _record_of_sequences(log_ratio, advantages, mask, args)
    _, high = _bounds(args)
    clipped_high = metrics.clipped_high if high < math.inf else torch.zeros_like(metrics.tokens)
    record |= _means("token_mean", metrics.clipped_low, clipped_high)
    if log_ratio is None:  # on-policy nothing is clipped
        zero = torch.zeros_like(metrics.tokens)
        low_min, high_max = (zero.where(metrics.tokens > 0, limit) for limit in LIMITS)
        return record | _extremes(low_min, high_max)
    lengths = mask.sum(dim=1)
    shares = (
        (clipped * mask).sum(dim=1) / lengths
        for clipped in _clipped(log_ratio.exp(), advantages, args)
    )
    return record | _extremes_of(*shares)


def vespo_old_log_probs(log_probs: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The old policy's log-probs less the logs of vLLM's ratios, which TRL's product contains."""
    old_log_probs = inputs.get("old_per_token_logps")
    old_log_probs = log_probs if old_log_probs is None else old_log_probs
    if "importance_sampling_ratio" not in inputs:
        return old_log_probs
    return old_log_probs - inputs["importance_sampling_ratio"].log().clamp(math.log(1e-8), 20.0)


def _vespo_phi(log_probs: Tensor, inputs: dict[str, Any], mask: Tensor, args: Any) -> Tensor:
    """VESPO's factor of each sequence, of each token if advantages are (B, T)."""
    log_ratio = log_probs - vespo_old_log_probs(log_probs, inputs)
    total = log_ratio.masked_fill(mask == 0, 0.0).sum(1, keepdim=True).clamp(max=20.0)
    advantages = inputs["advantages"]
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    settings = policy_loss_options(args)["surrogate"].settings()
    phi = Vespo.gamma(total.exp().expand_as(advantages), advantages, *settings)
    return phi


def _bounds(args: Any) -> tuple[float, float]:
    """What TRL counts as clipped: below the first at A < 0, above the second at A > 0."""
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.surrogate == "cispo":
        return -math.inf, epsilon_high
    low, high = 1 - args.epsilon, 1 + epsilon_high
    # TRL first cuts the ratio off at delta.
    return low, math.inf if args.delta is not None and args.delta <= high else high


def _clipped(ratio: Tensor, advantages: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Bool tensors of the broadcast shape of both. What is masked may hold anything."""
    low, high = _bounds(args)
    return (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)


def _record_of_sequences(
    log_ratio: Tensor | None, advantages: Tensor, mask: Tensor, args: Any
) -> Record:
    """Shares of all sequences, empty ones included; of tokens if advantages are (B, T)."""
    lengths = mask.sum(dim=1, keepdim=True)
    if log_ratio is None:
        ratio = torch.ones_like(lengths, dtype=torch.float32)
    else:
        log_ratio = log_ratio.masked_fill(mask == 0, 0.0)
        ratio = (log_ratio.sum(dim=1, keepdim=True) / lengths.clamp(min=1)).exp()
    low, high = _clipped(ratio, advantages, args)
    if high.size(1) == 1:
        kind, shares = "row_mean", (low.squeeze(1).float(), high.squeeze(1).float())
        totals = [share.sum() for share in shares]
    else:
        counts = [(clipped * mask).sum(dim=1) for clipped in (low, high)]
        kind, shares = "token_mean", [count / lengths.squeeze(1) for count in counts]
        totals = [count.sum() for count in counts]
    record: Record = {("size", "rows"): lengths.new_tensor(len(lengths))}
    if args.surrogate == "cispo":
        record[kind, "cispo_clip_ratio"] = totals[1]
        return record
    return record | _means(kind, *totals) | _extremes_of(*shares)


def _means(kind: str, low: Tensor, high: Tensor) -> Record:
    return {
        (kind, "clip_ratio/low_mean"): low,
        (kind, "clip_ratio/high_mean"): high,
        (kind, "clip_ratio/region_mean"): low + high,
    }


def _extremes_of(low: Tensor, high: Tensor) -> Record:
    """Of (B,) shares, NaN for a sequence without tokens."""
    at_most, at_least = LIMITS
    return _extremes(low.nan_to_num(nan=at_most).amin(), high.nan_to_num(nan=at_least).amax())


def _extremes(low: Tensor, high: Tensor) -> Record:
    return {("min", "clip_ratio/low_min"): low, ("max", "clip_ratio/high_max"): high}


class MetricRecords:
    """Records of the micro-batches since the last log, of all processes, per mode."""

    def __init__(self):
        self._records: dict[str, list[Record]] = defaultdict(list)

    def add(self, mode: str, record: Record, gather: Callable) -> None:
        """One gather per micro-batch, and none when logging: a callback may log on one process."""
        everywhere = gather(torch.stack([value.float() for value in record.values()]).unsqueeze(0))
        self._records[mode].append(dict(zip(record, everywhere.unbind(dim=1), strict=True)))

    def pop(self, mode: str) -> dict[str, list[float]]:
        """One value for each micro-batch; one copy to the host for all of them."""
        records = self._records.pop(mode, [])
        if not records:
            return {}
        columns = {key: torch.stack([r[key] for r in records], dim=1) for key in records[0]}
        tokens = columns.pop(("size", "tokens")).sum(dim=0).clamp(min=1.0)
        rows = columns.pop(("size", "rows"), tokens).sum(dim=0).clamp(min=1.0)
        reduce = {
            "token_mean": lambda values: values.sum(dim=0) / tokens,
            "row_mean": lambda values: values.sum(dim=0) / rows,
            "mean": lambda values: values.nanmean(dim=0),
            "min": lambda values: values.amin(dim=0),
            "max": lambda values: values.amax(dim=0),
        }
        reduced = torch.stack([reduce[kind](values) for (kind, _), values in columns.items()])
        # Infinite: no process had a token. TRL's log leaves NaN out of its averages.
        return {
            name: [v if math.isfinite(v) else math.nan for v in values]
            for (_, name), values in zip(columns, reduced.tolist(), strict=True)
        }
