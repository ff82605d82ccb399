"""The trainers' settings for the gap between rollout and training, as a RolloutCorrection.

One function a trainer, of the trainer's own settings (an object or a mapping). Each says what of
them has no counterpart, and raises for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._rollout import Reject, RolloutCorrection


def trl(args: Any) -> RolloutCorrection | None:
    """Of TRL's ``GRPOConfig``: ``vllm_importance_sampling_mode``, ``..._clip_min`` and
    ``..._clip_max``.

    None where ``use_vllm`` or ``vllm_importance_sampling_correction`` is off. A token that vLLM has
    not scored is not clamped to the bounds: it weighs 1.
    """
    if not (args.use_vllm and args.vllm_importance_sampling_correction):
        return None
    level, _, mode = args.vllm_importance_sampling_mode.partition("_")
    return RolloutCorrection(
        level, mode, *_bounds(
            args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
        )
    )  # fmt: skip


def verl(config: Any) -> RolloutCorrection:
    """Of verl's ``algorithm.rollout_correction``: ``rollout_is``, ``rollout_is_threshold``,
    ``rollout_rs``, ``rollout_rs_threshold``.

    ``rollout_is_batch_normalize`` is :func:`dl_norm.rollout_mean_weight` of the whole batch. In
    bypass mode ``old_log_probs`` is None, as the weights are those of the current policy.
    """
    level, mode, low, high = _get(config, "rollout_is", None), "truncate", 0.0, math.inf
    if level is not None:
        threshold = str(_get(config, "rollout_is_threshold", 2.0)).strip()
        if "_" in threshold:
            mode, (low, high) = "mask", map(float, threshold.split("_", 1))
        else:
            high = float(threshold)
    return RolloutCorrection(level or "none", mode, low, high, reject=_verl_rejects(config))


def _verl_rejects(config: Any) -> tuple[Reject, ...]:
    names = [name.strip() for name in (_get(config, "rollout_rs", None) or "").split(",")]
    names = list(dict.fromkeys(filter(None, names)))
    if not names:
        return ()
    given = _get(config, "rollout_rs_threshold", None)
    if given is None:
        raise ValueError(f"verl's rollout_rs={','.join(names)} needs rollout_rs_threshold")
    thresholds = [part.strip() for part in str(given).split(",") if part.strip()]
    if len(thresholds) == 1:
        thresholds *= len(names)
    rejects = []
    for name, threshold in zip(names, thresholds, strict=True):
        over, _, statistic = name.removeprefix("seq_").rpartition("_")
        if statistic == "k1":
            # Its k1 is -d: bounds of the inverse ratio.
            lower, _, upper = threshold.rpartition("_")
            high = float(upper)
            low = float(lower) if lower else 1.0 / high
            rejects.append(Reject("k1", over, 1.0 / high, 1.0 / low))
        else:
            rejects.append(Reject(statistic, over, high=float(threshold)))
    return tuple(rejects)


def skyrl(config: Any) -> RolloutCorrection:
    """Of SkyRL's ``trainer.algorithm.off_policy_correction``.

    Raises:
        ValueError: a token mask beside a weight or a mask of sequences: SkyRL leaves the masked
            tokens out of the sequence's sum.
    """
    level = _get(config, "tis_ratio_type", None)
    metric = _get(config, "sequence_mask_metric", None)
    high = math.inf if level is None else _get(config, f"{level}_tis_ratio_clip_high", None)
    rejects = []
    outliers = _pair(config, "outlier_token_is_threshold")
    if outliers != (None, None):
        rejects.append(Reject("k1", "max", *_bounds(*outliers)))
    tokens = _pair(config, "token_mask_is_threshold")
    if None not in tokens:
        if level == "sequence" or metric is not None:
            raise ValueError(
                "SkyRL's token_mask_is_threshold_* beside tis_ratio_type='sequence' or "
                "sequence_mask_metric leaves the masked tokens out of the sequence's ratio, which "
                "dl_norm.RolloutCorrection does not: use one of them"
            )
        rejects.append(Reject("k1", "token", *tokens))
    if metric is not None:
        over, bounds = {"geometric": ("mean", "geo_mask"), "product": ("sum", "product_mask")}[
            metric
        ]
        rejects.append(Reject("k1", over, *_pair(config, bounds)))
    return RolloutCorrection(level or "none", high=high, reject=tuple(rejects))


def slime(args: Any) -> RolloutCorrection | None:
    """Of slime's and Miles' arguments: ``use_tis`` with ``tis_clip_low`` and ``tis_clip``, and by
    ``custom_tis_function_path`` their IcePop, or their example ``train_infer_mismatch_helper``
    (MIS) with its ``tis_*`` and ``rs_*``.

    None where ``use_tis`` is off. ``tis_batch_normalize`` is :func:`dl_norm.rollout_mean_weight` of
    the whole rollout (slime's is that of a micro-batch).

    Raises:
        ValueError: a function of one's own, ``use_rollout_logprobs``.
    """
    if not _get(args, "use_tis", False):
        return None
    if _get(args, "use_rollout_logprobs", False):
        raise ValueError(
            "use_rollout_logprobs takes the rollout for the old policy, so use_tis has nothing to "
            "correct: leave one of them out"
        )
    path = _get(args, "custom_tis_function_path", None)
    if path is None or path in _SLIME_TIS:
        mode = "truncate" if path is None else _SLIME_TIS[path]
        bounds = _bounds(_get(args, "tis_clip_low", None), _get(args, "tis_clip", None))
        return RolloutCorrection("token", mode, *bounds)
    if not _SLIME_MIS.search(path):
        raise ValueError(
            f"custom_tis_function_path={path!r} is a function that dl_norm cannot read as settings;"
            f" it knows {', '.join(_SLIME_TIS)} and train_infer_mismatch_helper.mis. Use the "
            "reducer, which keeps the trainer's own loss"
        )
    return _slime_mis(args)


def slime_normalises(args: Any) -> bool:
    """Whether slime's settings ask for a mean weight of 1: its MIS with ``tis_batch_normalize``."""
    path = _get(args, "custom_tis_function_path", None) or ""
    asked = _get(args, "use_tis", False) and _get(args, "tis_batch_normalize", False)
    return bool(asked and _SLIME_MIS.search(path))


_SLIME_MIS = re.compile(r"(^|\.)train_infer_mismatch_helper\.mis\.compute_mis_weights\w*$")
_SLIME_TIS = {
    f"{module}.{function}": mode
    for module in (
        "slime.backends.megatron_utils.loss", "miles.backends.training_utils.loss_hub.corrections"
    )
    for function, mode in {"vanilla_tis_function": "truncate", "icepop_function": "mask"}.items()
}  # fmt: skip


def _slime_mis(args: Any) -> RolloutCorrection:
    if _get(args, "tis_batch_normalize", False) and (
        _get(args, "tis_mode", "truncate") == "mask"
        or _get(args, "tis_level", "token") not in ("token", "sequence")
    ):
        raise ValueError(
            "tis_batch_normalize has a counterpart at the levels token and sequence with tis_mode "
            "truncate or clip: set tis_batch_normalize: false"
        )
    kind = _get(args, "tis_mode", "truncate")
    upper = _get(args, "tis_upper_bound", None)
    if upper is None:
        raise ValueError("train_infer_mismatch_helper needs tis_upper_bound: set it")
    lower = _get(args, "tis_lower_bound", None)
    lower = 1.0 / upper if lower is None else lower
    mode = {"truncate": "truncate", "clip": "truncate", "mask": "mask"}[kind]
    reject, veto = (), None
    if _get(args, "use_rs", False):
        over = {"token": "token", "sequence": "sum", "geometric": "mean"}[
            _get(args, "rs_level", "token")
        ]
        low, high = _get(args, "rs_lower_bound", None), _get(args, "rs_upper_bound", None)
        low, high = lower if low is None else low, upper if high is None else high
        reject = Reject("k1", over, low, high)
        veto = _get(args, "rs_veto_threshold", None)
    return RolloutCorrection(
        _get(args, "tis_level", "token"), mode, 0.0 if kind == "truncate" else lower, upper,
        reject=reject, veto=veto or 0.0,
    )  # fmt: skip


def nemo_rl(config: Any) -> RolloutCorrection | None:
    """Of NeMo-RL's ``ClippedPGLossConfig``: ``use_importance_sampling_correction``,
    ``truncated_importance_sampling_type``, ``..._ratio``, ``..._ratio_min``,
    ``sequence_level_importance_ratios``.

    None where the correction is off. A token without a rollout log-prob (NaN) weighs 1 here and 0
    there.
    """
    if not _get(config, "use_importance_sampling_correction", False):
        return None
    level = "sequence" if _get(config, "sequence_level_importance_ratios", False) else "token"
    kind = _get(config, "truncated_importance_sampling_type", None)
    prefix = "truncated_importance_sampling_ratio"
    low, high = _bounds(_get(config, f"{prefix}_min", None), _get(config, prefix, None))
    if high == math.inf or kind is None:
        return RolloutCorrection(level)
    if kind == "seq-mask-tis":
        return RolloutCorrection(level, reject=Reject("k1", "mean", low, high))
    return RolloutCorrection(level, {"tis": "truncate", "icepop": "mask"}[kind], low, high)


def areal(config: Any) -> RolloutCorrection | None:
    """Of AReaL's ``RejectionSamplingConfig``, the actor's ``rejection_sampling``: ``level``,
    ``action``, ``metric``, ``agg``, ``upper``, ``lower``.

    None where ``config`` is None. old_log_probs are AReaL's ``prox_logp``, the rollout's its
    ``logprobs``.

    Raises:
        ValueError: what has no counterpart: at level "sequence" the sum or the mean of "kl_k3",
            which is AReaL's KL of the other direction, a lower bound of the largest ratio or k1,
            and "clamp" decided by the sum or the max; a lower bound of "kl_k2" or "kl_k3".
    """
    if config is None:
        return None
    clamps = _get(config, "action", "mask") == "clamp"
    metric, lower, upper = (_get(config, name, None) for name in ("metric", "lower", "upper"))
    over = _get(config, "agg", "mean") if _get(config, "level", "token") == "sequence" else "token"
    # The weights are the tokens' ratios, or with metric="ratio" the sequence's geometric mean.
    level = "geometric" if metric == "ratio" and over != "token" else "token"
    if metric == "ratio" and over in ("token", "mean"):
        return RolloutCorrection(level, "truncate" if clamps else "mask", *_bounds(lower, upper))
    reject = None if clamps else _areal_reject(metric, over, lower, upper)
    if reject is not None:
        return RolloutCorrection(level, reject=reject)
    names = ("level", "action", "metric", "agg", "lower", "upper")
    given = ", ".join(f"{name}={_get(config, name, None)!r}" for name in names)
    raise ValueError(
        f"AReaL's rejection_sampling with {given} has no counterpart among the settings of "
        "dl_norm.RolloutCorrection: take metric='ratio' with agg='mean', or 'kl_k2'"
    )


def _areal_reject(metric: str, over: str, lower: float | None, upper: float) -> Reject | None:
    """None if there is no such Reject."""
    bounded_below = lower is not None and (lower > 0 or metric == "kl_k1")
    if bounded_below and (over == "max" or metric in ("kl_k2", "kl_k3")):
        return None
    if metric == "ratio":
        return Reject("k1", over, *_bounds(lower, upper))
    if metric == "kl_k1":  # the log-ratio there
        return Reject("k1", over, 0.0 if lower is None else math.exp(lower), math.exp(upper))
    if metric == "kl_k2":
        return Reject("k2", over, high=upper)
    return Reject("k1", over, *_where_k3_is(upper)) if over in ("token", "max") else None


def _where_k3_is(bound: float) -> tuple[float, float]:
    """The ratios r below and above 1 at which 1 / r - 1 + log r, which falls up to 1 and rises
    from there, is ``bound``."""

    def root(outer: float) -> float:  # log r between 0, where it is 0, and where it is beyond
        inner = 0.0
        for _ in range(100):
            middle = (inner + outer) / 2
            beyond = math.expm1(-middle) + middle > bound
            inner, outer = (inner, middle) if beyond else (middle, outer)
        return inner

    return math.exp(root(-math.log1p(bound) - 2)), math.exp(min(root(bound + 1), 700.0))


def openrlhf(config: Any) -> RolloutCorrection | None:
    """Of OpenRLHF's ``algo.advantage`` (or its ``PolicyLoss``): ``is_correction_level``,
    ``is_correction_mode``, ``is_correction_gating``, ``is_correction_threshold``.

    None where the level is "off". TIS is level "token" with mode "clip", ICEPOP "token" with
    "mask", seq-mask-tis "seq" with "mask".

    Raises:
        ValueError: the gates "binary_kl" and "tv"; a ``PolicyLoss`` of type "gspo", which takes
            its ratio to the rollout policy and no correction.
    """
    level = _get(config, "is_correction_level", "off")
    if level == "off":
        return None
    if _get(config, "policy_loss_type", "ppo") == "gspo":
        raise ValueError(
            "OpenRLHF's gspo with is_correction_level has no correction: its ratio is to the "
            "rollout policy, so hand its log-probs as old_log_probs, with ratio_level='sequence'"
        )
    low, high = map(float, _get(config, "is_correction_threshold", (0.5, 5.0)))
    gating = _get(config, "is_correction_gating", "ratio")
    if gating != "ratio":
        raise ValueError(
            f"OpenRLHF's is_correction_gating={gating!r} has no counterpart among the statistics "
            "of dl_norm.Reject: take 'ratio', or RolloutCorrection() with mask="
            "dl_norm.integrations.rollout.openrlhf_gate(...), the mask without what it drops"
        )
    if level == "seq":
        return RolloutCorrection(reject=Reject("k1", "mean", low, high))
    mode = {"clip": "truncate", "mask": "mask"}[_get(config, "is_correction_mode", "mask")]
    return RolloutCorrection("token", mode, low, high)


@torch.no_grad()
def openrlhf_gate(
    config: Any, old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor
) -> Tensor:
    """bool (B, T): ``mask`` without what OpenRLHF's gates "binary_kl" and "tv" drop.

    With p and q the token's probability under the rollout and the old policy, both kept within
    [1e-6, 1 - 1e-6], the gate drops tokens, or by their mean whole sequences (level "seq"), whose
    p log(p / q) + (1 - p) log((1 - p) / (1 - q)), or |p - q|, is above the threshold. What is left
    weighs exp(d): ``RolloutCorrection()``. A few operations, as this is no statistic of the
    kernels'. NaN is above every threshold.

    Args:
        config: as for :func:`openrlhf`, with one of these gates.
        old_log_probs, rollout_log_probs, mask: (B, T).

    Raises:
        ValueError: another gate.
    """
    gating = _get(config, "is_correction_gating", "ratio")
    if gating not in ("binary_kl", "tv"):
        raise ValueError(f"is_correction_gating={gating!r} is openrlhf(config): no mask is needed")
    counted = mask != 0
    p, q = (x.float().exp().clamp(1e-6, 1 - 1e-6) for x in (rollout_log_probs, old_log_probs))
    if gating == "tv":
        apart = (p - q).abs()
    else:
        apart = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    if _get(config, "is_correction_level", "off") == "seq":
        total = apart.masked_fill(~counted, 0.0).sum(-1, keepdim=True)
        apart = total / counted.sum(-1, keepdim=True).clamp(min=1)
    return counted & (apart <= float(_get(config, "is_correction_threshold", ())[1]))


def roll(config: Any) -> RolloutCorrection | None:
    """Of ROLL's ``train_infer_correction``: ``is_weight`` and ``filters``.

    None where all of it is off. ``detach`` changes nothing: what ROLL makes the weight of has no
    gradient.

    Raises:
        ValueError: level "segment", ``diff_enabled`` (differences of probabilities).
    """
    weight, level, high = config.is_weight, "none", None
    if weight.enabled:
        level, high = weight.weight_type, weight.upper_bound
    rejects = [_roll_reject(rule) for rule in _get(config, "filters", ()) if rule.enabled]
    rejects = tuple(reject for reject in rejects if reject is not None)
    if level == "segment":
        raise ValueError("ROLL's is_weight.weight_type='segment' has no counterpart")
    if level == "none" and not rejects:
        return None
    return RolloutCorrection(level, "truncate", *_bounds(None, high), reject=rejects)


def _roll_reject(rule: Any) -> Reject | None:
    over = {"token": "token", "geometric": "mean", "sequence": "sum"}.get(rule.agg_type)
    if over is None or rule.diff_enabled:
        raise ValueError(
            f"ROLL's filter with agg_type={rule.agg_type!r} and diff_enabled={rule.diff_enabled} "
            "has no counterpart: ratios of token, geometric and sequence have"
        )
    if not rule.ratio_enabled or (rule.ratio_low <= 0 and rule.ratio_high == math.inf):
        return None
    return Reject("k1", over, max(rule.ratio_low, 0.0), rule.ratio_high)


def _get(config: Any, name: str, default: Any) -> Any:
    if isinstance(config, Mapping):
        return config.get(name, default)
    return getattr(config, name, default)


def _pair(config: Any, prefix: str) -> tuple[Any, Any]:
    return _get(config, f"{prefix}_low", None), _get(config, f"{prefix}_high", None)


def _bounds(low: float | None, high: float | None) -> tuple[float, float]:
    return 0.0 if low is None else low, math.inf if high is None else high
