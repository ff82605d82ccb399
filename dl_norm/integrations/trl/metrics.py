"""TRL's metrics of the loss, kept on the device until they are logged."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (how values of micro-batches and processes become one, name) -> 0-dim tensor. "token_mean" and
# "row_mean" are sums to be divided by the number of tokens or sequences.
Record = dict[tuple[str, str], Tensor]


def clip_record(ratio: Tensor, advantages: Tensor, mask: Tensor, args: Any) -> Record:
    """What is behind TRL's clip metrics of a micro-batch, and the sizes that means need.

    ratio: (B, T), or (B, 1) where it is one of whole sequences; advantages: (B,) or (B, T).
    """
    lengths = mask.sum(dim=1)
    record: Record = {
        ("size", "tokens"): lengths.sum(),
        ("size", "rows"): lengths.new_tensor(len(lengths)),
    }
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.delta is not None:
        ratio = ratio.clamp(max=args.delta)

    def mean_of(clipped: Tensor) -> tuple[str, Tensor, Tensor]:
        """Kind of mean, its sum, and the mean of each sequence (NaN for one without tokens)."""
        if clipped.size(1) == 1:
            return "row_mean", clipped.sum(), clipped.squeeze(1).float()
        counts = (clipped * mask).sum(dim=1)
        return "token_mean", counts.sum(), counts / lengths

    if args.surrogate == "cispo":
        kind, total, _ = mean_of((ratio > epsilon_high) & (advantages > 0))
        record[kind, "cispo_clip_ratio"] = total
    elif args.surrogate == "clip":
        kind, low_total, low = mean_of((ratio < 1 - args.epsilon) & (advantages < 0))
        kind, high_total, high = mean_of((ratio > 1 + epsilon_high) & (advantages > 0))
        record[kind, "clip_ratio/low_mean"] = low_total
        record[kind, "clip_ratio/high_mean"] = high_total
        record[kind, "clip_ratio/region_mean"] = low_total + high_total
        record["min", "clip_ratio/low_min"] = low.nan_to_num(nan=math.inf).amin()
        record["max", "clip_ratio/high_max"] = high.nan_to_num(nan=-math.inf).amax()
    return record


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
        rows = columns.pop(("size", "rows")).sum(dim=0).clamp(min=1.0)
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
