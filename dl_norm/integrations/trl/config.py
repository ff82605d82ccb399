"""The options of DeltaLGRPOTrainer: which it follows, and which raise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from dl_norm._aggregations import AGGREGATIONS
from dl_norm._options import make_token_loss
from dl_norm.surrogates import SURROGATES, Vespo, load

# TRL's loss_type as aggregation and surrogate
LOSS_TYPES = {
    "grpo": ("grpo", "clip"),
    "dapo": ("dapo", "clip"),
    "dr_grpo": ("dr_grpo", "clip"),
    "luspo": ("luspo", "clip"),
    "cispo": ("dapo", "cispo"),
    "sapo": ("grpo", "sapo"),
    "vespo": ("dapo", "vespo"),
}
OTHER_LOSS_TYPES = {
    "delta_l": (
        "here it is called aggregation='delta_l', which is the default: leave loss_type unset"
    ),
    "bnpo": (
        "it divides by the tokens of a micro-batch, so a step depends on how its batch is cut: use "
        "aggregation='dapo', which divides by the tokens of the whole generation batch, with "
        "loss_type unset; or trl's GRPOTrainer"
    ),
}
_SAPO = "sapo_temperature_pos", "sapo_temperature_neg"
_VESPO = "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"
# The surrogates that have options of TRL's, and those that belong to others
WITHOUT_EFFECT = {
    "clip": (*_SAPO, *_VESPO),
    "cispo": ("epsilon", "delta", *_SAPO, *_VESPO),
    "sapo": ("epsilon", "epsilon_high", "delta", *_VESPO),
    "vespo": ("epsilon", "epsilon_high", "delta", *_SAPO),
}
OF_SURROGATES = tuple(
    dict.fromkeys(sum(WITHOUT_EFFECT.values(), ()))
)  # without effect on one's own


@dataclass
class DeltaLGRPOConfig(GRPOConfig):
    r"""``trl.GRPOConfig`` with the choice of how token losses are aggregated.

    Args:
        aggregation: "delta_l" (default), "grpo", "dapo", "dr_grpo" or "luspo". With the last four a
            step has the loss and the gradients of TRL's ``loss_type`` of that name. Or, over the
            completions of a prompt, "grpo_per_prompt", "prompt_mean" or "balanced" (see
            ``dl_norm.sequence_weights``).
        alpha: exponent of "delta_l", x_i = (1/M) L_i^-alpha / sum_j L_j^-alpha, with
            M = ``max_completion_length``; from 0 to 16. 1 has the least variance, 0 is Dr. GRPO;
            the paper uses 1 and 0.75.
        drop_zero_advantage_groups: leave prompts whose completions all have advantage 0 out of the
            loss, its KL term and every count that its weights divide by.
        surrogate: the token loss, "clip" (default), "cispo", "sapo" or "vespo", which have TRL's
            options; another of the table of ``dl_norm.surrogates``, with its own options, such as
            "dppo_tv(delta_high=0.15) + drift(tau=0.002)"; or the import path of one of your own,
            "my_package.losses:my_loss" (see ``dl_norm.surrogate``). TRL's ``loss_type="cispo"`` is
            aggregation "dapo" with "cispo", "sapo" is "grpo" with "sapo", "vespo" is "dapo" with
            "vespo", its GMPOTrainer "grpo" with "gmpo(eps_low, eps_high)" and
            ``importance_sampling_level="sequence"``. For "cispo", ``epsilon_high`` is the upper
            bound of the ratio itself, as in TRL, and has to be set.
        importance_sampling_level: "token", or "sequence" for GSPO, as in TRL; "token" for "vespo",
            which takes the product of a sequence's ratios.
        fused_lm_head: compute the loss and its gradient from the last hidden states, a chunk of
            tokens at a time, so that there are never full logits (``dl_norm.linear_policy_loss``).
        fused_lm_head_chunk_size: tokens in a chunk; None: 4096 on a GPU, 192 on a CPU.
        loss_type: leave it unset (None). ``aggregation`` and ``surrogate`` take its place; a value
            that disagrees with them raises.

    Raises:
        TypeError: an option of another type than it has here.
        ValueError: an option that the loss cannot follow, saying which, why and what to do.
    """

    aggregation: str = field(
        default="delta_l",
        metadata={"help": f"How token losses become one loss: {', '.join(AGGREGATIONS)}."},
    )
    alpha: float = field(
        default=1.0,
        metadata={"help": "Exponent of aggregation 'delta_l': weights proportional to L^-alpha."},
    )
    drop_zero_advantage_groups: bool = field(
        default=False,
        metadata={"help": "Leave prompts whose advantages are all 0 out of every count."},
    )
    surrogate: str = field(
        default="clip",
        metadata={"help": f"The token loss: {', '.join(SURROGATES)}, or an import path."},
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


DEFAULTS = {f.name: f.default for f in fields(DeltaLGRPOConfig)}
OF_ENTROPY_CONTROLLER = (
    "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target",
)  # fmt: skip
# TRL's numbers in the loss
NUMBERS = (
    *OF_ENTROPY_CONTROLLER,
    "beta", "epsilon", "epsilon_high", "delta", *_SAPO, *_VESPO, "entropy_coef",
    "off_policy_mask_threshold", "top_entropy_quantile",
)  # fmt: skip


def policy_loss_options(args: DeltaLGRPOConfig) -> dict[str, Any]:
    """The options of ``dl_norm.policy_loss`` that TRL's come down to."""
    options: dict[str, Any] = {
        "beta": args.beta,
        "bias_corrected_kl": args.beta != 0.0 and args.use_bias_correction_kl,
    }
    if args.surrogate == "vespo":
        vespo = Vespo(*(float(getattr(args, name)) for name in _VESPO))
        return options | {"surrogate": vespo, "ratio_level": "sequence_sum"}
    eps_low, eps_high = args.epsilon, args.epsilon
    if args.epsilon_high is not None:
        eps_high = args.epsilon_high
    if args.surrogate == "cispo":  # TRL's bound is that of the ratio, with none below
        eps_low, eps_high = 1.0, eps_high - 1.0
    options |= {name: getattr(args, name) for name in ("surrogate", "delta", *_SAPO)}
    return options | {
        "eps_low": eps_low, "eps_high": eps_high, "ratio_level": args.importance_sampling_level
    }  # fmt: skip


def is_own(surrogate: str) -> bool:
    """Whether TRL has neither options nor metrics for it."""
    return surrogate not in WITHOUT_EFFECT


def check_options(args: DeltaLGRPOConfig) -> None:
    """Raises TypeError or ValueError for what the loss cannot follow."""
    _check_types(args)
    _check_choice("aggregation", args.aggregation, AGGREGATIONS)
    load(args.surrogate)
    _check_loss_type(args)
    _check_aggregation(args)
    _check_token_loss(args)
    _check_entropy(args)
    _check_fused_head(args)


def warnings_of(args: DeltaLGRPOConfig) -> list[str]:
    """What TRL warns of where its ``loss_type`` is set, for the settings that take its place."""
    if args.loss_type is not None:  # then TRL does
        return []
    warnings = []
    sequence_ratio = args.importance_sampling_level == "sequence"
    power = {"dapo": 1.0, "dr_grpo": 1.0, "delta_l": 1.0 - args.alpha}.get(args.aggregation, 0.0)
    if sequence_ratio and power:
        length = "its completion length" + (f" to the power {power:g}" if power != 1.0 else "")
        warnings.append(
            f"aggregation={args.aggregation!r} sums over the tokens of a sequence. With "
            "importance_sampling_level='sequence' they all have the ratio of the sequence, so that "
            f"the sum weights each sequence by {length}. For the GSPO paper's setup, in which all "
            "sequences weigh the same, use aggregation='grpo' (or 'delta_l' with alpha=1)."
        )
    if args.aggregation == "luspo" and not sequence_ratio:
        warnings.append(
            "aggregation='luspo' belongs to importance_sampling_level='sequence' in its paper; it "
            f"is {args.importance_sampling_level!r}."
        )
    return warnings


def _check_types(args: DeltaLGRPOConfig) -> None:
    for names, kind, what in (
        (("aggregation", "surrogate", "loss_type"), str, "a string"),
        (
            ("fused_lm_head", "drop_zero_advantage_groups", "use_adaptive_entropy"),
            bool,
            "True or False",
        ),
        (("alpha", *NUMBERS), (int, float), "a Python number"),
        (("fused_lm_head_chunk_size",), int, "an int"),
    ):
        for name in names:
            value = getattr(args, name)
            optional = DEFAULTS[name] is None
            if value is None and optional:
                continue
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise TypeError(
                    f"{name} must be {what}{' or None' * optional}; got {value!r}, a "
                    f"{type(value).__name__}"
                )


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _check_loss_type(args: DeltaLGRPOConfig) -> None:
    if args.loss_type is None or LOSS_TYPES.get(args.loss_type) == (
        args.aggregation,
        args.surrogate,
    ):
        return
    if args.loss_type in OTHER_LOSS_TYPES:
        raise ValueError(
            f"loss_type={args.loss_type!r} is not supported: {OTHER_LOSS_TYPES[args.loss_type]}"
        )
    _check_choice("loss_type", args.loss_type, LOSS_TYPES)
    raise ValueError(
        f"loss_type={args.loss_type!r} disagrees with aggregation={args.aggregation!r} and "
        f"surrogate={args.surrogate!r}, which take its place: leave loss_type unset, or for TRL's "
        f"loss of that name set {_settings_of(args.loss_type, args)}"
    )


def _settings_of(loss_type: str, args: DeltaLGRPOConfig) -> str:
    """All that has to change in ``args`` to have TRL's loss of this type."""
    aggregation, surrogate = LOSS_TYPES[loss_type]
    changes = [f"aggregation={aggregation!r}", f"surrogate={surrogate!r}"]
    if surrogate == "cispo" and args.epsilon_high is None:
        changes.append("epsilon_high=5.0 (or another upper bound of the ratio itself)")
    others = [name for name in WITHOUT_EFFECT[surrogate] if getattr(args, name) != DEFAULTS[name]]
    if aggregation != "delta_l" and args.alpha != DEFAULTS["alpha"]:
        others.append("alpha")
    settings = ", ".join(changes)
    return f"{settings}, and leave {', '.join(others)} unset" if others else settings


def _check_aggregation(args: DeltaLGRPOConfig) -> None:
    if not 0 <= args.alpha <= 16:
        raise ValueError(f"alpha must be a number from 0 to 16; got {args.alpha!r}")
    if args.aggregation != "delta_l" and args.alpha != 1.0:
        raise ValueError(
            f"alpha={args.alpha!r} has no meaning for aggregation={args.aggregation!r}; leave it "
            "unset, or use aggregation='delta_l'"
        )
    row = AGGREGATIONS[args.aggregation]  # type: ignore[index]
    if not args.max_completion_length and row.takes_max_length:
        raise ValueError(
            f"max_completion_length={args.max_completion_length!r}, but aggregation="
            f"{args.aggregation!r} divides by it (the M of the formula): set max_completion_length"
        )


def _check_token_loss(args: DeltaLGRPOConfig) -> None:
    _check_choice(
        "importance_sampling_level", args.importance_sampling_level, ("token", "sequence")
    )
    if args.surrogate == "cispo" and args.epsilon_high is None:
        raise ValueError(
            "surrogate='cispo' needs epsilon_high, the upper bound of the ratio itself, such "
            "as 5.0: with None TRL would take epsilon"
        )
    if args.surrogate == "vespo":
        _check_vespo(args)
    for name in WITHOUT_EFFECT.get(args.surrogate, OF_SURROGATES):
        value = getattr(args, name)
        if value != DEFAULTS[name]:
            raise ValueError(
                f"{name}={value!r} has no effect with surrogate={args.surrogate!r}: leave it unset"
            )
    try:
        make_token_loss(**policy_loss_options(args))
    except ValueError as error:
        raise ValueError(
            "epsilon, epsilon_high (eps_low and eps_high below), delta, beta, "
            "importance_sampling_level (ratio_level below) or an option of the surrogate is out of "
            f"range: {error}"
        ) from error


def _check_vespo(args: DeltaLGRPOConfig) -> None:
    if args.importance_sampling_level != "token":
        raise ValueError(
            f"importance_sampling_level={args.importance_sampling_level!r} has no effect with "
            "surrogate='vespo', which takes the product of the ratios of a sequence: leave it unset"
        )
    mode = args.vllm_importance_sampling_mode
    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    if corrected and mode not in ("token_truncate", "token_mask"):
        raise ValueError(
            f"surrogate='vespo' multiplies the ratios of the tokens, those of vLLM among them: set "
            f"vllm_importance_sampling_mode to 'token_truncate' or 'token_mask'; it is {mode!r}"
        )


def _check_entropy(args: DeltaLGRPOConfig) -> None:
    for name in OF_ENTROPY_CONTROLLER:
        value = getattr(args, name)
        if value != DEFAULTS[name] and not args.use_adaptive_entropy:
            raise ValueError(
                f"{name}={value!r} has no effect with use_adaptive_entropy=False: leave it unset"
            )


def _check_fused_head(args: DeltaLGRPOConfig) -> None:
    chunk_size = args.fused_lm_head_chunk_size
    if chunk_size is not None and not (args.fused_lm_head and chunk_size > 0):
        raise ValueError(
            f"fused_lm_head_chunk_size={chunk_size!r} must be a positive int together with "
            f"fused_lm_head=True, or None; fused_lm_head is {args.fused_lm_head}"
        )
