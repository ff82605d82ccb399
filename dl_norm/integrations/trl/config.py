"""The options of DeltaLGRPOTrainer: which it follows, and which raise."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from dl_norm.options import SURROGATES, PolicyLossOptions
from dl_norm.weights import METHODS

# Options that the loss here cannot follow, and what to do instead. Each must keep TRL's default.
REFUSED = {
    "use_adaptive_entropy": (
        "the adaptive entropy controller is not supported; use a constant entropy_coef"
    ),
    **dict.fromkeys(
        ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        "it only steers the adaptive entropy controller, which is not supported; leave it unset",
    ),
    **dict.fromkeys(
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        "it belongs to the token loss of VESPO; use GRPOTrainer with loss_type='vespo'",
    ),
}
# TRL's loss_type as aggregation and surrogate. "bnpo" normalises by what a micro-batch happens to
# hold, and "vespo" is a token loss of its own: both are not here.
LOSS_TYPES = {
    "grpo": ("grpo", "clip"),
    "dapo": ("dapo", "clip"),
    "dr_grpo": ("dr_grpo", "clip"),
    "luspo": ("luspo", "clip"),
    "cispo": ("dapo", "cispo"),
    "sapo": ("grpo", "sapo"),
}


@dataclass
class DeltaLGRPOConfig(GRPOConfig):
    r"""``trl.GRPOConfig`` with the choice of how token losses are aggregated.

    Args:
        aggregation: "delta_l" (default), "grpo", "dapo", "dr_grpo" or "luspo". With the last four a
            step has the loss and the gradients of TRL's ``loss_type`` of that name.
        alpha: exponent of "delta_l", x_i = (1/M) L_i^-alpha / sum_j L_j^-alpha, with
            M = ``max_completion_length``. 1 has the least variance, 0 is Dr. GRPO; the paper uses
            1 and 0.75.
        surrogate: the token loss, "clip" (default), "cispo" or "sapo". TRL's ``loss_type="cispo"``
            is aggregation "dapo" with "cispo", ``loss_type="sapo"`` is "grpo" with "sapo". For
            "cispo", ``epsilon_high`` is the upper bound of the ratio itself, as in TRL, and has to
            be set.
        importance_sampling_level: "token", or "sequence" for GSPO, as in TRL.
        fused_lm_head: compute the loss and its gradient from the last hidden states, a chunk of
            tokens at a time, so that there are never full logits (``dl_norm.linear_policy_loss``).
        fused_lm_head_chunk_size: tokens in a chunk; None: 4096 on a GPU, 192 on a CPU.
        loss_type: leave it unset (None). ``aggregation`` and ``surrogate`` take its place; a value
            that disagrees with them raises.

    Raises:
        ValueError: an option that the loss cannot follow, saying which, why and what to do.
    """

    aggregation: str = field(
        default="delta_l",
        metadata={"help": f"How token losses become one loss: {', '.join(METHODS)}."},
    )
    alpha: float = field(
        default=1.0,
        metadata={"help": "Exponent of aggregation 'delta_l': weights proportional to L^-alpha."},
    )
    surrogate: str = field(
        default="clip",
        metadata={"help": f"The token loss: {', '.join(SURROGATES)}."},
    )
    fused_lm_head: bool = field(
        default=False,
        metadata={"help": "Compute the loss from the last hidden states, without full logits."},
    )
    fused_lm_head_chunk_size: int | None = field(
        default=None,
        metadata={"help": "Tokens whose logits `fused_lm_head` holds at a time; None: by device."},
    )
    loss_type: str | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        metadata={"help": "Not used: `aggregation` takes its place. Raises when they disagree."},
    )

    def __post_init__(self):
        super().__post_init__()
        check_options(self)


def policy_loss_options(args: DeltaLGRPOConfig) -> dict[str, Any]:
    """The options of ``dl_norm.policy_loss`` that TRL's come down to."""
    eps_low = args.epsilon
    eps_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.surrogate == "cispo":  # TRL's bound is that of the ratio, with none below
        eps_low, eps_high = 1.0, eps_high - 1.0
    return {
        "eps_low": eps_low,
        "eps_high": eps_high,
        "delta": args.delta,
        "beta": args.beta,
        "ratio_level": args.importance_sampling_level,
        "surrogate": args.surrogate,
        "sapo_temperature_pos": args.sapo_temperature_pos,
        "sapo_temperature_neg": args.sapo_temperature_neg,
        "bias_corrected_kl": args.beta != 0.0 and args.use_bias_correction_kl,
    }


def check_options(args: DeltaLGRPOConfig) -> None:
    """Raises ValueError for what the loss cannot follow."""
    _check_aggregation(args)
    _check_token_loss(args)
    _check_fused_head(args)
    defaults = {f.name: f.default for f in fields(GRPOConfig) if f.default is not MISSING}
    for name, reason in REFUSED.items():
        value = getattr(args, name)
        if value != defaults[name]:
            raise ValueError(f"{name}={value!r} is not supported: {reason}")


def _check_aggregation(args: DeltaLGRPOConfig) -> None:
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
    if not args.max_completion_length and args.aggregation in ("delta_l", "dr_grpo"):
        raise ValueError(
            f"max_completion_length={args.max_completion_length!r}, but aggregation="
            f"{args.aggregation!r} divides by it (the M of the formula): set max_completion_length"
        )
    chosen = (args.aggregation, args.surrogate)
    if args.loss_type is not None and LOSS_TYPES.get(args.loss_type) != chosen:
        advice = "for this loss_type use trl's GRPOTrainer"
        if args.loss_type in LOSS_TYPES:
            aggregation, surrogate = LOSS_TYPES[args.loss_type]
            advice = f"TRL's is aggregation={aggregation!r} with surrogate={surrogate!r}"
        raise ValueError(
            f"loss_type={args.loss_type!r} disagrees with aggregation={args.aggregation!r} and "
            f"surrogate={args.surrogate!r}, which take its place: leave loss_type unset; {advice}"
        )


def _check_token_loss(args: DeltaLGRPOConfig) -> None:
    if args.importance_sampling_level not in ("token", "sequence"):
        raise ValueError(
            "importance_sampling_level must be 'token' or 'sequence'; got "
            f"{args.importance_sampling_level!r}"
        )
    if args.surrogate == "cispo":
        if args.epsilon_high is None:
            raise ValueError(
                "surrogate='cispo' needs epsilon_high, the upper bound of the ratio itself, such "
                "as 5.0: with None TRL would take epsilon"
            )
        if args.epsilon != GRPOConfig.epsilon:
            raise ValueError(
                f"epsilon={args.epsilon!r} has no effect with surrogate='cispo', which has no "
                "lower bound here: leave it unset"
            )
    try:
        PolicyLossOptions(**policy_loss_options(args))
    except ValueError as error:
        raise ValueError(
            "epsilon, epsilon_high (eps_low and eps_high below), delta, beta or an option of the "
            f"surrogate is out of range or without effect: {error}"
        ) from error


def _check_fused_head(args: DeltaLGRPOConfig) -> None:
    if args.fused_lm_head and args.entropy_coef != 0.0:
        raise ValueError(
            f"entropy_coef={args.entropy_coef!r} needs the gradient of the entropy, which "
            "fused_lm_head=True does not compute: set entropy_coef=0.0 or fused_lm_head=False"
        )
    chunk_size = args.fused_lm_head_chunk_size
    if chunk_size is not None and not (args.fused_lm_head and chunk_size > 0):
        raise ValueError(
            f"fused_lm_head_chunk_size={chunk_size!r} must be a positive int together with "
            f"fused_lm_head=True, or None; fused_lm_head is {args.fused_lm_head}"
        )
