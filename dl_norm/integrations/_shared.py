r"""What the adapters share: weights on the advantages, the loss for them, and what they refuse.

In most trainers the loss sees one micro-batch and nothing more, while the weights x_i of
:func:`dl_norm.sequence_weights` need the whole rollout. A factor f_i > 0 may move from the loss
into the advantage, because every clip is positively homogeneous in A, so the weights travel with
the advantages:

    where the rollout is whole      A_i <- f_i A_i,  f_i = x_i D
    in the loss                     sum over the micro-batch of (1/c) sum_t l_it(f_i A_i)

with D what the trainer divides by in the end and c what the loss itself divides by, so that the
step's gradient is sum_i x_i grad sum_t l_it. KL and entropy terms are not reweighted. A token loss
that is not homogeneous in A, such as one with a term that does not read it, is refused there.

**A user's own options** (``surrogate``, ``delta``, ``ratio_level``, ...) go through one function,
:func:`adapter_loss`, and are checked by :func:`dl_norm.policy_loss` itself. An adapter only says
what its trainer's clip settings are; an option that the loss learns needs no change here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import dl_norm
from dl_norm._call import token_options
from dl_norm._metrics import PolicyLossMetrics
from dl_norm._options import TokenLoss, kind_of, token_loss_of
from dl_norm.weights.group_sums import Group, sum_over


def row_factors(
    lengths: Tensor, *, alpha: float = 1.0, group: Group = "local", rows: Tensor | None = None
) -> Tensor:
    r"""(B,) float32 factors f_i = B L_i^-alpha / sum_j L_j^-alpha, 0 where L_i = 0.

    For a trainer that divides the sum of all token losses by its number of rows and by a constant
    M: f_i / (B M) = x_i, the DeltaL weight over the whole rollout. B counts the empty rows too,
    since the trainer's division does. If the trainer takes S steps with B / S rows each, every
    step's division is by B / S, and the mean of the S gradients is the rollout's.

    Args:
        lengths: (B,) integers, tokens that count in each row of the **whole** rollout, or in this
            rank's part of it with ``group`` (two all-reduces of one number).
        alpha, group: as for :func:`dl_norm.sequence_weights`.
        rows: this rank's part of B as a 0-dim tensor, where the trainer counts something else than
            rows.
    """
    if rows is None:
        rows = torch.tensor(lengths.shape[0], device=lengths.device)
    weights = dl_norm.sequence_weights(lengths, alpha=alpha, max_length=1, group=group)
    return weights * sum_over(rows, group)


def token_mean_factors(lengths: list[int], *, alpha: float = 1.0, max_length: int) -> list[float]:
    """f_i = x_i N for a trainer that divides the sum of all token losses by N = sum_j L_j.

    Args:
        lengths: tokens that count in each sequence of the **whole** step, on all ranks.
        alpha, max_length: as for :func:`dl_norm.sequence_weights`.
    """
    counts = torch.tensor(lengths, dtype=torch.int64)
    weights = dl_norm.sequence_weights(counts, alpha=alpha, max_length=max_length, group="local")
    return (weights.double() * counts.sum()).tolist()


def adapter_loss(
    *streams: Tensor | None,
    weights: float | Tensor = 1.0,
    clip: dict[str, Any] | None = None,
    unweighted_terms: bool = False,
    of: Callable[..., Any] | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """:func:`dl_norm.policy_loss` and its metrics, as an adapter calls it.

    Args:
        *streams: log-probs, old ones, advantages and mask, as the loss takes them. A mask of None
            counts every token of a padded batch.
        weights: of the sequences: (G,), or one number for all of them, such as 1 where the
            advantages carry the weights. A 0-dim tensor is not read on the host.
        clip: the trainer's clip settings. Left out if ``options`` name a surrogate other than
            "clip": it brings its own.
        unweighted_terms: the trainer's own loss has a term without the advantage, which stays
            without the weights that the advantages carry.
        of: another loss, :func:`dl_norm.logits_policy_loss`, whose first tensors come first and
            whose outputs take the place of the metrics.
        **options: the user's, over ``clip``; and what else :func:`dl_norm.policy_loss` takes.
    """
    log_probs, *others, mask = streams
    assert log_probs is not None
    cu_seqlens = options.get("cu_seqlens")
    if mask is None and cu_seqlens is None:
        mask = torch.ones_like(log_probs, dtype=torch.bool)
    sequences = log_probs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if clip and options.get("surrogate", "clip") == "clip":
        options = {**clip, **options}
    on_advantages = not (isinstance(weights, Tensor) and weights.ndim)
    # Who compiles it checks before.
    if on_advantages and not unweighted_terms and not torch.compiler.is_compiling():
        check_scales_with_advantages(options)
    of_sequences = torch.ones(sequences, device=log_probs.device) * weights
    loss: Any = of or dl_norm.policy_loss
    return loss(log_probs, *others, mask, of_sequences, return_metrics=True, **options)


def checked(options: dict[str, Any], *, rollout: bool = False) -> dict[str, Any]:
    """``options``, if the loss of one token takes them: bad ones raise at construction.

    ``rollout``: the trainer hands over the log-probs that a ``rollout_correction`` needs.
    """
    token, settings = torch.ones(1, 1), {**options, "impl": "torch"}
    if rollout and options.get("rollout_correction") is not None:
        settings["rollout_log_probs"] = token
    dl_norm.policy_loss(token, token, token, token.bool(), token[0], **settings)
    return options


def check_scales_with_advantages(options: dict[str, Any]) -> None:
    """Raises unless weights on the advantages weight the whole loss of a token."""
    given = {name: value for name, value in token_options(options).items() if name != "impl"}
    if not _doubles(token_loss_of(given)):
        raise ValueError(
            f"surrogate={options['surrogate']!r} is not twice as large at twice the advantage, but "
            "this trainer has the weights of the sequences on the advantages: what does not scale "
            "with them would not be weighted. Take a loss without that term, or an adapter that "
            "has the weights in the loss (TRL, AReaL, ROLL)"
        )


@functools.lru_cache(maxsize=64)
def _doubles(terms: TokenLoss) -> bool:
    random = torch.Generator("cpu").manual_seed(0)
    log_prob, ratio, advantage = torch.randn(3, 256, generator=random, dtype=torch.float64)
    log_prob, ratio = -log_prob.abs(), ratio.exp()
    once, twice = (
        kind_of(terms).closed_form(log_prob, ratio, a, *terms.settings)[:3]
        for a in (advantage, 2 * advantage)
    )
    zeros = torch.zeros_like(ratio)
    return all(
        torch.allclose(2 * one + zeros, two + zeros) for one, two in zip(once, twice, strict=True)
    )


def offsets(lengths: list[int] | Tensor, device: torch.device) -> Tensor:
    """(G + 1,) int64 cu_seqlens of sequences laid end to end. One copy to the device, no sync."""
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, non_blocking=True)


def clip_fraction(metrics: PolicyLossMetrics) -> Tensor:
    """0-dim share of the tokens whose ratio is cut off by eps_low or eps_high."""
    return (metrics.clipped_low + metrics.clipped_high) / metrics.tokens.clamp(min=1)


def on_host(values: dict[str, Tensor]) -> dict[str, float]:
    """0-dim tensors as floats, by one host sync: for trainers whose metrics are Python floats."""
    numbers = torch.stack([value.double() for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))


def needed(module: str, trainer: str) -> Any:
    """The trainer's ``module``, or an ImportError that says what is needed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this adapter needs {trainer}: {module} cannot be imported ({error}). The versions "
            "that were checked are in dl_norm/integrations/README.md of the repository"
        ) from error


def required(value: Any, name: str, remedy: str) -> Any:
    """``value``, or a ValueError when it is None: nothing falls back to the micro-batch."""
    if value is None:
        raise ValueError(f"{name} is missing: {remedy}")
    return value


def setting(config: Any, name: str, default: Any) -> Any:
    """A trainer's setting, of an object or a mapping."""
    if isinstance(config, Mapping):
        return config.get(name, default)
    return getattr(config, name, default)


def refuse(trainer: str, options: dict[str, Any], remedy: str) -> None:
    """ValueError for every option (name -> value) that is set and that the loss cannot follow."""
    for name, value in options.items():
        if value:
            raise ValueError(f"{trainer}'s {name}={value!r} is not supported here: {remedy}")
