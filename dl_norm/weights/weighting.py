"""Loss aggregation as one weight per sequence, known before the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .._aggregations import Aggregation, Method, aggregation
from .._checks import check_number, values_are_free
from .cells import make_cells
from .group_sums import Group, gather_over, sum_over
from .lengths import check_lengths

_NEEDED = {
    "groups": "the (G,) ids of the prompts that the sequences answer",
    "advantages": "one per sequence, (G,), for their sign",
}


def sequence_weights(
    lengths: Tensor,
    method: Method = "delta_l",
    *,
    alpha: float = 1.0,
    max_length: float | None = None,
    groups: Tensor | None = None,
    advantages: Tensor | None = None,
    keep: Tensor | None = None,
    group: Group = None,
) -> Tensor:
    r"""Weights x with ``loss = sum_i x_i * sum_t loss_it`` for a rollout batch of G sequences.

    With L_i the number of tokens of sequence i that count, sums over the sequences with L_i > 0:

    - ``"delta_l"``: x_i = L_i^-alpha / (M * sum(L_j^-alpha)). Unbiased up to the constant M; of
      least variance at alpha = 1 when a sequence's gradient variance grows like L_i.
    - ``"grpo"``: x_i = 1 / (G * L_i), the mean over sequences of the mean over tokens.
    - ``"dapo"``: x_i = 1 / sum(L_j), the mean over tokens.
    - ``"dr_grpo"``: x_i = 1 / (G * M), the same as ``"delta_l"`` with alpha = 0.
    - ``"luspo"``: x_i = 1 / G, the mean over sequences of the sum over tokens; its paper pairs it
      with ``ratio_level="sequence"``.

    With P prompts, and sums over the sequences of i's own prompt (``groups``), or of those whose
    advantage has i's sign (``advantages``):

    - ``"grpo_per_prompt"``: x_i = 1 / (P * G_prompt * L_i), the mean over prompts of ``"grpo"``.
      Another weight than ``"grpo"`` only where prompts have unequally many sequences.
    - ``"prompt_mean"``: x_i = 1 / (P * sum_prompt(L_j)), the mean over prompts of the mean over
      tokens (ScaleRL).
    - ``"balanced"``: x_i = G_sign / (G * sum_sign(L_j)), the mean over the tokens of each sign,
      joined by the number of sequences (Balanced Aggregation). Sequences of advantage 0 are a
      sign of their own. The weights depend on the rewards here, not on the lengths alone.

    Call it where the whole rollout batch is visible, before the batch is cut into micro-batches,
    and hand each slice its own weights: the loss is then the same however the batch is cut.

    Args:
        lengths: (G,) integer tensor, tokens that count in each sequence, e.g. ``mask.sum(-1)``.
            A sequence of length 0 gets weight 0 and is left out of every sum, of G and of P.
        method: one of ``dl_norm._aggregations.AGGREGATIONS``.
        alpha: exponent of ``"delta_l"``, 0 <= alpha <= 16. Must be left at 1 for other methods.
        max_length: the constant M > 0, in tokens, usually the maximum response length. Required
            for ``"delta_l"`` and ``"dr_grpo"``, refused for the others. Never read off padding.
            With :func:`reference_length` the loss keeps the scale of another method.
        groups: (G,) integer tensor of prompt ids, any integers, equal for the sequences of one
            prompt. Required for the last three methods, refused for the others.
        advantages: (G,) tensor whose sign counts. Required for ``"balanced"``, else refused.
        keep: (G,) bool tensor. A sequence that is not kept is treated as one of length 0: to leave
            prompts whose rewards are all the same out of every count, say.
        group: process group over which the batch is spread. The other tensors are then this
            rank's and the sums run over the group: one all-reduce of one number. With ``groups``
            ids are those of the whole batch, and a prompt may be spread over ranks: all ranks
            gather the lengths, ids and signs, and must have equally many sequences (fill up with
            length 0). None: this process alone; in a program of several it raises. ``"local"``:
            this process has the whole batch.

    Returns:
        (G,) float32 tensor on the device of ``lengths``. No host sync.

    Raises:
        TypeError: a tensor of the wrong kind, such as ``lengths`` that are not integers.
        ValueError: wrong shape or device, unknown method, alpha or max_length out of range; an
            argument that the method lacks or that has no effect on it; on the CPU a negative
            length (elsewhere it counts as 0) or an advantage that is NaN; ranks that disagree on
            the number of sequences (on a CUDA device this is an assertion of the device).

    Source: He et al., arXiv:2509.07558, section 3; DAPO arXiv:2503.14476; Dr. GRPO
    arXiv:2503.20783; LUSPO arXiv:2602.05261; ScaleRL arXiv:2510.13786; Balanced Aggregation
    arXiv:2605.04077.
    """
    lengths = check_lengths(lengths)
    row = aggregation(method)
    p, q = row.exponents(_alpha_of(row, method, alpha))
    constant = _constant_of(row, method, max_length)
    given = {"groups": (groups, row.takes_groups), "advantages": (advantages, row.takes_advantages)}
    for name, (tensor, taken) in given.items():
        if taken and tensor is None:
            raise ValueError(f"method={method!r} needs {name}: {_NEEDED[name]}")
        if not taken and tensor is not None:
            raise ValueError(f"{name} have no effect on method={method!r}; omit them")
    if keep is not None:
        lengths = torch.where(_checked_keep(keep, lengths), lengths, 0)
    if groups is None:
        numerator = _power(lengths, p)
        denominator = sum_over(_power(lengths, q).sum(-1), group) * constant
        return _divide(numerator, denominator).float()

    columns = [lengths, _checked_groups(groups, lengths)]
    if advantages is not None:
        columns.append(_signs(advantages, lengths))
    whole, own = gather_over(torch.stack(columns), group)
    return (_cell_weights(whole, row, p, q)[own] / constant).float()


def reference_length(
    lengths: Tensor,
    like: Method = "grpo",
    *,
    groups: Tensor | None = None,
    advantages: Tensor | None = None,
    keep: Tensor | None = None,
    group: Group = None,
) -> float:
    r"""The constant M with which ``"delta_l"`` has the scale of another method at these lengths.

    ``max_length=M`` in :func:`sequence_weights` makes the expected gradient 1/M times the true one.
    Under ``"grpo"`` it is mean_i(1/L_i) times the true one and under ``"dapo"`` 1/mean_i(L_i): so M
    is the harmonic mean of the lengths for ``like="grpo"``, their mean for ``"dapo"``, and
    1 / sum_i x_i for any method. A learning rate, ``max_grad_norm`` and every other setting that
    goes with the size of the gradient then carry over:

        M = dl_norm.reference_length(lengths, like="grpo")  # once, of a typical batch
        weights = dl_norm.sequence_weights(lengths, alpha=1.0, max_length=M)  # in every step

    **Once**: M must be one number for the whole run, kept in its settings and its checkpoints. An M
    of each batch would bring the bias back that DeltaL removes: with alpha = 1 and
    ``like="grpo"`` the weights would be GRPO's own. As the lengths drift from those M was taken
    from, GRPO's scale drifts and this one stays: that is the difference between the two.

    Args:
        lengths: (G,) integer tensor of typical responses: a batch, or what a run has logged.
        like: the method whose scale to keep; not one that has an M of its own.
        groups, advantages, keep, group: as for :func:`sequence_weights`. With a process group every
            rank gets the same number.

    Returns:
        A Python float, in tokens. It is read from the device: the one function here that waits.

    Raises:
        TypeError, ValueError: as :func:`sequence_weights`; ValueError if no sequence has a token.
    """
    if aggregation(like).takes_max_length:
        raise ValueError(
            f"like={like!r} has a max_length, so its scale is 1 / max_length already: pass the "
            "same max_length to sequence_weights"
        )
    weights = sequence_weights(
        lengths, like, groups=groups, advantages=advantages, keep=keep, group=group
    )
    scale = float(sum_over(weights.to(_wide(weights)).sum(), group))
    if scale == 0:
        raise ValueError("lengths have no token: a reference needs sequences of typical length")
    return 1 / scale


def reweight_advantages(
    advantages: Tensor,
    lengths: Tensor,
    *,
    alpha: float = 1.0,
    group: Group = None,
) -> Tensor:
    r"""Advantages times r_i = L_i^-alpha / mean_j L_j^-alpha, for a trainer that sums token losses.

    The factors have mean 1 over the sequences with L_i > 0 and are positive, so they may be moved
    from the loss into the advantage: min, clip and dual clip are positively homogeneous in A. A
    trainer whose loss is (1/(G M)) sum_i sum_t loss_it (Dr. GRPO) then computes the DeltaL loss
    with x_i = r_i / (G M). KL and entropy terms are not reweighted.

    Args:
        advantages: (G,) or (G, T), any floating dtype. Gradients, if any, pass through.
        lengths: (G,) integer tensor of this rank's sequences, as for :func:`sequence_weights`.
        alpha: exponent, 0 <= alpha <= 16.
        group: process group over which the batch is spread (one all-reduce of two numbers).

    Returns:
        A tensor of the shape and dtype of ``advantages``; 0 for sequences of length 0.

    Raises:
        TypeError, ValueError: as :func:`sequence_weights`, and for shapes that do not fit.

    Source: the official code of arXiv:2509.07558 multiplies the advantages by these factors.
    """
    lengths = check_lengths(lengths)
    alpha = _checked_alpha(alpha)
    if not isinstance(advantages, Tensor) or not advantages.is_floating_point():
        raise TypeError("advantages must be a floating point tensor; convert with .float()")
    size = lengths.shape[0]
    if advantages.ndim not in (1, 2) or advantages.shape[0] != size:
        raise ValueError(
            f"advantages must be (G,) or (G, T) with G = {size} as in lengths, got "
            f"{tuple(advantages.shape)}"
        )
    _check_device("advantages", advantages, lengths)
    power = _power(lengths, -alpha)
    count = _power(lengths, 0.0)
    total, sequences = sum_over(torch.stack([power, count]).sum(-1), group)
    factors = _divide(power * sequences, total).to(torch.float32)
    if advantages.ndim == 2:
        factors = factors[:, None]
    return (advantages.float() * factors).to(advantages.dtype)


def _cell_weights(columns: Tensor, row: Aggregation, p: float, q: float) -> Tensor:
    """s_c L_i^p / S_c(q) of a whole batch, from the rows lengths, ids and perhaps signs."""
    lengths, groups, *signs = columns
    cells = make_cells(groups, signs[0] if signs else None)
    sizes = cells.totals(_power(lengths, 0.0))
    numerator = _power(lengths, p)
    denominator = cells.totals(_power(lengths, q))[cells.of]
    if row.share == "by size":
        numerator = numerator * sizes[cells.of]
        return _divide(numerator, denominator * sizes.sum())
    return _divide(numerator, denominator * (sizes > 0).sum())


def _wide(tensor: Tensor) -> torch.dtype:
    # float64 where the device has it: these are G numbers, and every loss is scaled by them.
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _power(lengths: Tensor, exponent: float) -> Tensor:
    power = lengths.clamp(min=1).to(_wide(lengths)) ** exponent
    return torch.where(lengths > 0, power, torch.zeros_like(power))


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    # An all-empty batch or cell has denominator 0 and numerators 0: its weights are 0, not NaN.
    return numerator / torch.where(denominator > 0, denominator, torch.ones_like(denominator))


def _signs(advantages: Tensor, lengths: Tensor) -> Tensor:
    _check_rows("advantages", advantages, lengths)
    if advantages.is_complex() or advantages.dtype == torch.bool:
        raise TypeError(f"advantages must be real numbers, got {advantages.dtype}")
    if values_are_free(advantages) and bool((advantages.isnan() & (lengths > 0)).any()):
        raise ValueError("advantages must have a sign where there are tokens, got NaN")
    return (advantages > 0).long() - (advantages < 0).long()


def _checked_groups(groups: Tensor, lengths: Tensor) -> Tensor:
    _check_rows("groups", groups, lengths)
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise TypeError(f"groups must be integer ids of the prompts, got {groups.dtype}")
    return groups.long()


def _checked_keep(keep: Tensor, lengths: Tensor) -> Tensor:
    _check_rows("keep", keep, lengths)
    if keep.dtype != torch.bool:
        raise TypeError(f"keep must be a bool tensor, got {keep.dtype}: pass keep != 0 of a mask")
    return keep


def _check_rows(name: str, tensor: Tensor, lengths: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != lengths.shape:
        shape, remedy = tuple(tensor.shape), ""
        if shape == (*lengths.shape, 1):
            remedy = f": pass {name}.squeeze(-1)"
        raise ValueError(f"{name} must be (G,) = {tuple(lengths.shape)}, got {shape}{remedy}")
    _check_device(name, tensor, lengths)


def _check_device(name: str, tensor: Tensor, lengths: Tensor) -> None:
    if tensor.device != lengths.device:
        raise ValueError(
            f"{name} is on {tensor.device}, lengths on {lengths.device}: move {name} there"
        )


def _alpha_of(row: Aggregation, method: str, alpha: float) -> float:
    if row.takes_alpha:
        return _checked_alpha(alpha)
    if alpha != 1.0:
        raise ValueError(f"alpha={alpha} has no effect on method={method!r}; omit it")
    return 1.0


def _checked_alpha(alpha: float) -> float:
    # Far beyond any use, and short of where L^-alpha underflows in float64.
    return check_number(alpha, "alpha", "0 <= alpha <= 16", lambda a: 0 <= a <= 16)


def _constant_of(row: Aggregation, method: str, max_length: float | None) -> float:
    """M^m."""
    if not row.takes_max_length:
        if max_length is not None:
            raise ValueError(f"max_length={max_length} has no effect on method={method!r}; omit it")
        return 1
    if max_length is None:
        raise ValueError(
            f"method={method!r} needs max_length, the constant M (usually the maximum response "
            "length); it is not read off the padding"
        )
    return check_number(max_length, "max_length", "max_length > 0", lambda m: m > 0) ** row.m
