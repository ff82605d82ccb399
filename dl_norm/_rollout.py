"""Weights for tokens that another policy sampled than the old one: rollout correction.

Its device functions, of the same names, are in kernels/rollout.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._batch import Batch, unweighted_batch
from ._checks import REAL_DTYPES, check_bound, check_choice, check_tensor
from .weights.group_sums import Group, sum_over

LEVELS = ("token", "sequence", "geometric", "none")
MODES = ("truncate", "mask")
STATISTICS = ("k1", "k2", "k3")
OVER = ("token", "sum", "mean", "max")
# exp is taken of a log-ratio within +-LOG_BOUND; a sum of log-ratios is of those within +-FINITE.
LOG_BOUND, FINITE = 20.0, 1e6
# Low and high of the log-ratio, high of k2 and of k3.
UNBOUNDED = (-math.inf, math.inf, math.inf, math.inf)


@dataclass(frozen=True)
class Reject:
    """A condition on which :class:`RolloutCorrection` gives tokens or sequences weight 0.

    With d = old_log_probs - rollout_log_probs of a token, and its

    - statistic: "k1", the ratio exp(d); "k2", d^2 / 2; "k3", exp(d) - 1 - d, both of d clamped to
      +-20,
    - over: "token", a token is dropped by its own; or a whole sequence by the "sum", the "mean" or
      the "max" over its tokens. Of k1 the sum and the mean are those of d, so exp of them are the
      product and the geometric mean of the ratios; "max" is the veto of a single token.

    What is outside [low, high] is dropped. For k1 both bound the ratio (and verl's, of the inverse
    ratio, are (1 / high, 1 / low) of these); k2 and k3 have a ``high`` alone, in nats.
    """

    statistic: str
    over: str = "token"
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self):
        check_choice(self.statistic, "the statistic of a Reject", STATISTICS)
        check_choice(self.over, "over of a Reject", OVER)
        _check_interval(self, "a Reject")
        if self.statistic != "k1" and self.low > 0:
            raise ValueError(
                f"low={self.low} of a Reject by {self.statistic!r}: that is a divergence, 0 where "
                "the policies agree; it has a high alone"
            )
        if (self.low, self.high) == (0.0, math.inf):
            raise ValueError("a Reject without low and high rejects nothing: give one of them")
        if self.statistic == "k1" and not self.low <= 1 <= self.high:
            raise ValueError(
                f"a Reject of ratios outside [{self.low}, {self.high}] rejects policies that "
                "agree: the interval must hold 1"
            )


@dataclass(frozen=True)
class RolloutCorrection:
    """How :func:`dl_norm.policy_loss` weights the policy term by w = pi_old / pi_rollout.

    The inference engine that sampled is not quite the old policy, so a token's policy term is
    multiplied by a constant weight, computed of ``old_log_probs`` and ``rollout_log_probs``. With
    d = old_log_probs - rollout_log_probs (of ``log_probs``, without gradient, where old_log_probs
    is None) and sums over the counted tokens of a sequence,

    - level: "token", w = exp(d); "sequence", w = exp(sum d) for each token of it; "geometric",
      w = exp(mean d); "none", w = 1.
    - mode: "truncate", w clamped to [low, high] (TIS); "mask", 0 outside (MIS, IcePop).
    - low, high: bounds of w.
    - reject: :class:`Reject`, one or several in a tuple: w = 0 where any of them says so.
      "The geometric mean decides, the token weighs" (NeMo-RL's ``seq-mask-tis``) is level="token"
      with Reject("k1", "mean", low, high).
    - veto: a sequence with any token of exp(d) < veto has w = 0: Reject("k1", "max", low=veto).
    - unscored: a value of ``rollout_log_probs`` that says that the token was not scored. NaN (or
      None in what vLLM returns) says it always: the token has d = 0, and at level "token" w = 1.

    d is clamped to +-20 for exp. Source: arXiv:2510.18855 (IcePop),
    https://fengyao.notion.site/off-policy-rl (TIS), https://richardli.xyz/rl-collapse (sequence
    and geometric, masks, veto), verl's ``rollout_corr_helper``.
    """

    level: str = "token"
    mode: str = "truncate"
    low: float = 0.0
    high: float = math.inf
    reject: Reject | tuple[Reject, ...] = ()
    veto: float = 0.0
    unscored: float | None = None

    def __post_init__(self):
        check_choice(self.level, "the level of a RolloutCorrection", LEVELS)
        check_choice(self.mode, "the mode of a RolloutCorrection", MODES)
        _check_interval(self, "a RolloutCorrection")
        if self.level == "none" and (self.low, self.high) != (0.0, math.inf):
            raise ValueError(
                "low and high of a RolloutCorrection bound its weight, and level='none' has none: "
                "drop them, or reject by them: Reject('k1', low=..., high=...)"
            )
        reject = (self.reject,) if isinstance(self.reject, Reject) else self.reject
        if not (isinstance(reject, (tuple, list)) and all(isinstance(r, Reject) for r in reject)):
            raise TypeError(f"reject must be a dl_norm.Reject or a tuple of them, got {reject!r}")
        object.__setattr__(self, "reject", tuple(reject))
        veto = float(check_bound(self.veto, "veto of a RolloutCorrection"))
        if not 0 <= veto <= 1:
            raise ValueError(f"veto of a RolloutCorrection must be in [0, 1], got {veto}")
        object.__setattr__(self, "veto", veto)
        if self.unscored is not None:
            unscored = float(check_bound(self.unscored, "unscored of a RolloutCorrection"))
            # NaN is unscored whatever this says, and is equal to nothing.
            object.__setattr__(self, "unscored", None if math.isnan(unscored) else unscored)

    def terms(self) -> Rollout:
        """As the implementations take it: the bounds of several rejections are the narrowest."""
        bounds = {over: UNBOUNDED for over in OVER}
        rejects = [*self.reject]  # type: ignore
        if self.veto > 0:
            rejects.append(Reject("k1", "max", low=self.veto))
        for reject in rejects:
            low, high, k2, k3 = bounds[reject.over]
            if reject.statistic == "k1":
                low, high = max(low, _log(reject.low)), min(high, _log(reject.high))
            elif reject.statistic == "k2":
                k2 = min(k2, reject.high)
            else:
                k3 = min(k3, reject.high)
            bounds[reject.over] = (low, high, k2, k3)
        of_token = bounds.pop("token")
        of_sequence = bounds["sum"] + bounds["mean"] + bounds["max"]
        return Rollout(
            self.level, self.mode, (self.low, self.high),
            () if of_token == UNBOUNDED else of_token,
            () if of_sequence == 3 * UNBOUNDED else of_sequence,
            self.unscored,
        )  # fmt: skip


class Rollout(NamedTuple):
    """A :class:`RolloutCorrection` as names and numbers. Of each kind of statistic the bounds are
    as in ``UNBOUNDED``; of sequences those of sum, mean and max one after the other."""

    level: str  # "off": there is no correction
    mode: str = "truncate"
    bounds: tuple[float, ...] = ()  # low and high of the weights
    token_bounds: tuple[float, ...] = ()  # empty: no token is rejected
    sequence_bounds: tuple[float, ...] = ()
    unscored: float | None = None


NO_ROLLOUT = Rollout("off")


def rollout_of(correction: RolloutCorrection | None) -> Rollout:
    """What an option means."""
    if correction is None:
        return NO_ROLLOUT
    if not isinstance(correction, RolloutCorrection):
        raise TypeError(
            f"rollout_correction must be a dl_norm.RolloutCorrection, got {correction!r}"
        )
    return correction.terms()


def needs_sequences(rollout: Rollout) -> bool:
    """Whether the weight of a token depends on others of its sequence."""
    return rollout.level in ("sequence", "geometric") or len(rollout.sequence_bounds) > 0


def needs_tokens(rollout: Rollout) -> bool:
    """Whether the weights of a sequence's tokens may differ."""
    return rollout.level == "token" or len(rollout.token_bounds) > 0


class Correction(NamedTuple):
    """The weights of a batch, per token or (G, 1), and what the metrics count of them."""

    weights: Tensor
    truncated: Tensor  # bool, these three per token or (G, 1)
    masked: Tensor
    vetoed: Tensor
    unscored: Tensor  # bool, these two per token
    log_ratio: Tensor  # 0 where unscored or not counted


@torch.no_grad()
def correct(batch: Batch, rollout: Rollout) -> Correction:
    """The weights in PyTorch operations."""
    assert batch.rollout_log_probs is not None
    old = batch.log_probs if batch.old_log_probs is None else batch.old_log_probs
    log_ratio = old.float() - batch.rollout_log_probs.float()
    unscored = log_ratio.isnan()
    if rollout.unscored is not None:
        unscored = unscored | (batch.rollout_log_probs == rollout.unscored)
    scored = batch.counted() & ~unscored
    log_ratio = torch.where(scored, log_ratio.clamp(-FINITE, FINITE), 0.0)
    like_sequences = batch.weights[:, None].float()

    weights = torch.ones_like(like_sequences)
    truncated = masked = vetoed = torch.zeros_like(like_sequences, dtype=torch.bool)
    if rollout.level == "token":
        weights, truncated, masked = _bounded(rollout, log_ratio)
        weights = weights.masked_fill(unscored, 1.0)
        truncated, masked = truncated & scored, masked & scored
    elif rollout.level == "sequence":
        total = batch.sequence_sums(log_ratio).float()[:, None]
        weights, truncated, masked = _bounded(rollout, total)
    elif rollout.level == "geometric":
        weights, truncated, masked = _bounded(rollout, batch.sequence_means(log_ratio))

    if rollout.token_bounds:
        rejected = _outside(rollout.token_bounds, log_ratio, *_divergences(log_ratio))
        weights = torch.where(rejected, 0.0, batch.per_token(weights))
        masked = batch.per_token(masked) | rejected
    if rollout.sequence_bounds:
        rejected, vetoed = _rejected_sequences(batch, rollout.sequence_bounds, log_ratio)
        dropped = rejected | vetoed
        if batch.is_per_token(weights):
            rejected, dropped = batch.per_token(rejected), batch.per_token(dropped)
        weights, masked = torch.where(dropped, 0.0, weights), masked | rejected
    return Correction(weights, truncated, masked, vetoed, unscored, log_ratio)


def _rejected_sequences(
    batch: Batch, bounds: tuple[float, ...], log_ratio: Tensor
) -> tuple[Tensor, Tensor]:
    """(G, 1): whether a sequence is rejected, whether it is vetoed."""
    by_sum, by_mean, by_max = bounds[:4], bounds[4:8], bounds[8:]
    per_token = (log_ratio, *_divergences(log_ratio))
    sums = [batch.sequence_sums(values)[:, None] for values in per_token]
    lengths = batch.sequence_sums(batch.counted()).clamp(min=1)[:, None]
    means = [values / lengths for values in sums]
    highest = [_sequence_max(batch, values) for values in per_token]
    lowest = -_sequence_max(batch, -log_ratio)
    rejected = _outside(by_sum, *sums) | _outside(by_mean, *means)
    rejected = rejected | (highest[1] > by_max[2]) | (highest[2] > by_max[3])
    return rejected, (lowest < by_max[0]) | (highest[0] > by_max[1])


def apply(batch: Batch, correction: Correction) -> Batch:
    """``batch`` with the weights folded into those of its policy term."""
    weights = correction.weights
    others = batch.policy_weights
    if others is not None:
        if batch.is_per_token(weights) != batch.is_per_token(others):
            weights, others = batch.per_token(weights), batch.per_token(others)
        weights = torch.where(others != 0, weights * others, 0.0)
    return batch._replace(policy_weights=weights, rollout_log_probs=None)


def correction_sums(batch: Batch, correction: Correction) -> Tensor:
    """The fields of RolloutMetrics, in their order; the last is a maximum."""
    counted = batch.counted()
    ones = counted.float()

    def at_tokens(values: Tensor) -> Tensor:
        return torch.where(counted, batch.per_token(values).float(), 0.0)

    weights = at_tokens(correction.weights)
    log_ratio = correction.log_ratio.clamp(-LOG_BOUND, LOG_BOUND)
    values = (
        weights, weights.square(), at_tokens(correction.truncated), at_tokens(correction.masked),
        at_tokens(correction.vetoed), at_tokens(correction.unscored), -log_ratio,
        _divergences(log_ratio)[1],
    )  # fmt: skip
    largest = weights.amax() if weights.numel() else ones.sum()
    return torch.stack([*(value.sum() for value in values), largest])


@torch.no_grad()
def rollout_mean_weight(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor | None,
    rollout_correction: RolloutCorrection,
    *,
    cu_seqlens: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    """The mean weight of a **whole** rollout batch, by which its correction is normalised.

    Computed once per rollout batch, before it is cut, and handed to :func:`dl_norm.policy_loss` of
    every slice of it as ``rollout_mean_weight``, which divides the weights by it: so the mean over
    the batch is 1 and the slices still add up. (The mean of a slice would give each slice another
    scale.)

    Args:
        old_log_probs, rollout_log_probs, mask, cu_seqlens: as for :func:`dl_norm.policy_loss`, of
            all sequences of this process.
        rollout_correction: :class:`RolloutCorrection`. The mean is that of w after ``mode`` and
            before ``reject`` and ``veto``: over the counted tokens at level "token", over the
            sequences that have any at the others.
        group: process group over which the batch is spread (one all-reduce of two numbers); as for
            :func:`dl_norm.sequence_weights`.

    Returns:
        0-dim float32, 1 where the mean is below 1e-8. No host sync.

    Raises:
        TypeError, ValueError: as :func:`dl_norm.policy_loss` and :func:`dl_norm.sequence_weights`.

    Source: verl's ``rollout_is_batch_normalize``.
    """
    rollout = rollout_of(rollout_correction)
    if rollout.level in ("off", "none"):
        raise ValueError("a correction without weights (level='none') has no mean to divide by")
    batch = unweighted_batch(
        old_log_probs, rollout_log_probs=rollout_log_probs, mask=mask, cu_seqlens=cu_seqlens
    )
    weights = correct(batch, rollout._replace(token_bounds=(), sequence_bounds=())).weights
    counts = batch.counted()
    if rollout.level != "token":
        counts = batch.sequence_sums(counts)[:, None] > 0
    pair = torch.stack([torch.where(counts, weights, 0.0).sum(), counts.sum()]).float()
    total, count = sum_over(pair, group)
    mean = total / count.clamp(min=1)
    return torch.where(mean > 1e-8, mean, 1.0)


def token_weights(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor | None,
    rollout_correction: RolloutCorrection,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The weight of every token, in the shape of ``old_log_probs``, for adapters that need them
    apart from the loss. Arguments as for :func:`rollout_mean_weight`, of any sequences."""
    check_tensor("old_log_probs", old_log_probs, REAL_DTYPES)
    check_tensor("rollout_log_probs", rollout_log_probs, REAL_DTYPES)
    batch = unweighted_batch(
        old_log_probs, rollout_log_probs=rollout_log_probs, mask=mask, cu_seqlens=cu_seqlens
    )
    weights = correct(batch, rollout_of(rollout_correction)).weights
    return batch.per_token(weights).expand_as(old_log_probs)


def _bounded(rollout: Rollout, log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, whether truncated, whether masked."""
    raw = log_weight.clamp(-LOG_BOUND, LOG_BOUND).exp()
    low, high = rollout.bounds
    outside = (raw < low) | (raw > high)
    never = torch.zeros_like(outside)
    if rollout.mode == "truncate":
        return raw.clamp(low, high), outside, never
    return raw.masked_fill(outside, 0.0), never, outside


def _divergences(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """k2 and k3 of KL(rollout || old)."""
    bounded = log_ratio.clamp(-LOG_BOUND, LOG_BOUND)
    return 0.5 * bounded.square(), bounded.exp() - 1.0 - bounded


def _outside(bounds: tuple[float, ...], k1: Tensor, k2: Tensor, k3: Tensor) -> Tensor:
    low, high, k2_high, k3_high = bounds
    return (k1 < low) | (k1 > high) | (k2 > k2_high) | (k3 > k3_high)


def _sequence_max(batch: Batch, values: Tensor) -> Tensor:
    """(G, 1) largest of the values and 0."""
    if batch.cu_seqlens is None:
        return F.pad(values, (1, 0)).amax(-1, keepdim=True)
    lengths = batch.cu_seqlens.diff().long()
    return torch.segment_reduce(values, "max", lengths=lengths, unsafe=True, initial=0.0)[:, None]


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf


def _check_interval(owner: Reject | RolloutCorrection, what: str) -> None:
    for name in ("low", "high"):
        value = check_bound(getattr(owner, name), f"{name} of {what}")
        object.__setattr__(owner, name, float(value))
    if not 0 <= owner.low < owner.high:
        raise ValueError(
            f"low and high of {what} must be 0 <= low < high (inf: no bound), got low={owner.low}, "
            f"high={owner.high}"
        )
