"""A token loss from its formula alone: the derivatives, closed form and Triton function follow."""

from __future__ import annotations

import functools
import hashlib
import inspect
import textwrap
import traceback
from collections.abc import Callable, Iterable
from numbers import Real
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from ._program import OUTPUTS, Program, closed_form
from ._tracing import INPUTS, Trace, Value, needed
from ._triton_source import device_function, device_source
from .surrogates import KINDS, Surrogate


def surrogate(formula: Callable[..., Any], **settings: float) -> FormulaSurrogate:
    """The token loss of a formula, for ``surrogate=`` of :func:`dl_norm.policy_loss` and the rest.

    ``formula(log_prob, ratio, advantage, *settings)`` is a plain function of PyTorch operations
    that computes every token by itself. It returns the loss of the tokens, or that and a dict of
    further quantities of the tokens, whose sums come back among the metrics:

        def soft_clip(log_prob, ratio, advantage, temperature):
            return -advantage * torch.tanh((ratio - 1) / temperature) * temperature

        dl_norm.policy_loss(..., surrogate=dl_norm.surrogate(soft_clip, temperature=0.5))

    **What it may use**: arithmetic, comparisons and logical operations; ``exp, log, log1p, expm1,
    sigmoid, logsigmoid, tanh, softplus, relu, abs, sign, sqrt, rsqrt, square, reciprocal, pow,
    minimum, maximum, clamp, where, masked_fill, isnan, isfinite, zeros_like, ones_like, full_like``
    as functions or methods; ``.detach()`` and ``torch.no_grad()``, for a value without derivative;
    ``.float()``, which does nothing. Numbers from outside are read once, here.

    **Settings** are Python floats. What the formula computes of them alone is computed here, in
    float64; the rest takes them as run-time numbers. A new value is a new surrogate, made in a few
    milliseconds, and the same kernel.

    **The derivative** is that of PyTorch, also where there is none: half of each argument's where
    those of ``minimum`` or ``maximum`` are equal, 0 of ``relu`` and ``abs`` at 0. At a bound of
    ``clamp``, where versions of PyTorch differ, it is that of what is clamped. Two NaN of PyTorch
    are numbers here: a branch that ``where`` does not choose has no influence, and log(ratio) has
    the derivative 1 by itself at ratios of 0 and infinity too.

    The formula is also run under autograd, in float64 on random numbers, and compared.

    Raises:
        ValueError: an operation is not pointwise, or not among those above, with its line; the loss
            depends on neither ratio nor log_prob; autograd disagrees, as with random numbers in the
            formula; a setting is not finite.
        TypeError: the formula does not take these arguments; a setting is not a number.
    """
    return FormulaSurrogate(formula, _checked_settings(formula, settings))


# What of it is the same at all settings; by name, as torch.compile of PyTorch 2.10 traces them.
_OF_FORMULA = (
    "_program", "_closed_form", "_source", "_name", "kind", "extra_names", "uses_log_prob",
    "scales_with_advantage", "ratio_is_constant",
)  # fmt: skip


class FormulaSurrogate(Surrogate):
    """What :func:`surrogate` makes. Equal if formula, settings and what was traced are equal.

    ``kind`` is the same for every value of the settings, and in every process.
    """

    def __init__(self, formula: Callable[..., Any], values: dict[str, float]):
        self._key = formula, tuple(values.items())
        self._program = trace(formula, values)
        self._settings = self._program.settings(values)
        self._closed_form = closed_form(self._program)
        self._source, self._name = device_source(self._program, _name(formula), _source(formula))
        self.kind = f"{self._name}_{hashlib.sha256(self._source.encode()).hexdigest()[:16]}"
        self.extra_names = self._program.output_names[len(OUTPUTS) :]
        self.uses_log_prob = self._program.uses_log_prob
        self.scales_with_advantage = self._program.scales_with_advantage
        self.ratio_is_constant = self._program.ratio_is_constant
        _check_against_autograd(self)
        KINDS.setdefault(self.kind, self)

    def settings(self) -> tuple[float, ...]:
        """The run-time numbers that the next two take: what the formula computes of its own."""
        return self._settings

    def closed_form(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float
    ) -> tuple[Tensor, ...]:
        """Loss, d loss / d log ratio, d loss / d log_prob past the ratio, two flags that are never
        set, extras. Some may be the same tensor, or an argument."""
        return self._closed_form(log_prob, ratio, advantage, *settings)

    def counted(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, log_prob: Tensor, ratio: Tensor, advantage: Tensor, *settings: float
    ) -> tuple[Tensor, ...]:
        return self.closed_form(log_prob, ratio, advantage, *settings)[3:]

    def device(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The ``@triton.jit`` function of these arguments, from a file in ``DL_NORM_CACHE_DIR``, or
        else in Triton's own cache."""
        return device_function(self._source, self._name, self.kind)

    def with_settings(self, **values: float) -> FormulaSurrogate:
        """The same formula at other settings; nothing is traced again."""
        other = object.__new__(FormulaSurrogate)
        for name in _OF_FORMULA:
            setattr(other, name, getattr(self, name))
        other._key = self._key[0], tuple(values.items())
        other._settings = self._program.settings(values)
        return other

    def of_settings(
        self, log_prob: Tensor, ratio: Tensor, advantage: Tensor, values: tuple[float, ...]
    ) -> tuple[Tensor, ...]:
        """The closed form at these values of the formula's own settings."""
        given = dict(zip(dict(self._key[1]), values, strict=True))
        return self.closed_form(log_prob, ratio, advantage, *self._program.settings(given))

    def source(self) -> str:
        """The text of that file."""
        return self._source

    def formula(self, log_prob: Tensor, ratio: Tensor, advantage: Tensor) -> Any:
        function, values = self._key
        return function(log_prob, ratio, advantage, **dict(values))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FormulaSurrogate):
            return NotImplemented
        return (self._key, self.kind) == (other._key, other.kind)

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self):
        function, values = self._key
        return FormulaSurrogate, (function, dict(values))

    def __repr__(self) -> str:
        function, values = self._key
        return f"surrogate({', '.join([_name(function), *(f'{k}={v!r}' for k, v in values)])})"


@torch.enable_grad()
def trace(formula: Callable[..., Any], settings: Iterable[str]) -> Program:
    """Loss and derivatives of the formula, two flags that are never set, its further quantities."""
    steps = Trace(_code(formula))
    log_prob, ratio, advantage = (steps.value("input", name) for name in INPUTS)
    log_prob.tangents = (None, steps.value("const", 1.0))
    ratio.tangents = (steps.value("input", "ratio"), None)  # d ratio / d log ratio
    try:
        numbers = {name: steps.value("setting", name) for name in settings}
        loss, extras = _split(formula(log_prob, ratio, advantage, **numbers), Value)
        if all(tangent is None for tangent in loss.tangents):
            raise ValueError("its loss has no derivative by ratio or log_prob")
    except Exception as error:
        line = _line(formula, error)
        raise ValueError(f"{_name(formula)} cannot become a kernel: {error}{line}") from error
    with torch.no_grad():
        never, zeros = ratio < 0.0, steps.value("zeros_like", ratio.position)
        tokens = {log_prob.position, ratio.position}
        positions = []
        for value in (loss, *loss.tangents, never, never, *(e.float() for e in extras.values())):
            value = zeros if value is None else value
            if tokens.isdisjoint(needed(steps.entries, [value.position])):
                value = zeros + value  # of the advantage alone, or of nothing
            positions.append(value.position)
    return Program(
        tuple(steps.entries), tuple(positions), (*OUTPUTS, *extras), tuple(steps.names().items())
    )


def _split(result: Any, kind: type) -> tuple[Any, dict[str, Any]]:
    """Loss and further quantities, of ``kind`` (Value, Tensor), of what a formula has returned."""
    loss, extras = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    named = isinstance(extras, dict) and all(isinstance(name, str) for name in extras)
    if named and not extras.keys().isdisjoint(OUTPUTS):
        raise ValueError(
            f"{', '.join(OUTPUTS[:4])} are taken; call the further quantities otherwise"
        )
    if not named or not all(isinstance(value, kind) for value in (loss, *extras.values())):
        raise ValueError(
            "a formula returns the loss of the tokens, or that and a dict of further quantities of "
            f"the tokens by name; got {result!s:.80}"
        )
    return loss, extras


def _check_against_autograd(surrogate: FormulaSurrogate) -> None:
    """Raises where the formula under autograd, on random numbers, is not what was traced."""
    (formula, _), random = surrogate._key, torch.Generator("cpu").manual_seed(0)
    draw = functools.partial(torch.randn, 256, generator=random, dtype=torch.float64, device="cpu")
    with torch.inference_mode(False), torch.enable_grad():
        log_prob, ratio, advantage = -3 * draw().abs(), (0.5 * draw()).exp(), draw()
        leaves = log_prob.requires_grad_(), ratio.requires_grad_()
        try:
            loss, extras = _split(surrogate.formula(log_prob, ratio, advantage), Tensor)
            past_ratio, by_ratio = torch.autograd.grad(
                loss, leaves, torch.ones_like(loss), materialize_grads=True
            )
        except Exception as error:
            line = _line(formula, error)
            raise ValueError(f"{_name(formula)} cannot be run on tensors: {error}{line}") from error
        traced = surrogate.closed_form(log_prob, ratio, advantage, *surrogate.settings())
    traced = dict(zip(surrogate._program.output_names, traced, strict=True))
    expected = {
        "loss": loss, "through_ratio": by_ratio * ratio, "past_ratio": past_ratio, **extras
    }  # fmt: skip
    for key, truth in expected.items():
        truth, found = truth.detach().double(), traced[key].detach()
        scale = truth.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item()
        same = torch.isclose(found, truth, 1e-5, 1e-6 * scale, equal_nan=True)
        if key in ("through_ratio", "past_ratio"):
            same |= truth.isnan()  # because of a branch that where has not chosen
        if not same.all():
            at = int((~same).nonzero()[0])
            raise ValueError(
                f"the trace of {_name(formula)} is wrong: {key} is {truth[at]:.6g} under autograd "
                f"and {found[at]:.6g} traced, at log_prob={log_prob[at]:.6g}, "
                f"ratio={ratio[at]:.6g}, advantage={advantage[at]:.6g}. Does the formula draw "
                "random numbers, look at the type of its arguments, or bring its own derivative?"
            )


def _checked_settings(formula: Callable[..., Any], given: dict[str, float]) -> dict[str, float]:
    """Names and values in the order of the formula's parameters, its defaults among them."""
    if not callable(formula):
        raise TypeError(f"a formula is a function, got {type(formula).__name__}")
    signature, name = inspect.signature(formula), _name(formula)
    try:
        bound = signature.bind(*INPUTS, **given)
    except TypeError as error:
        raise TypeError(
            f"a formula takes log_prob, ratio, advantage, and then settings by name; {error} in "
            f"{name}{signature}"
        ) from error
    bound.apply_defaults()
    settings = list(bound.arguments.items())[len(INPUTS) :]
    for setting, value in settings:
        if isinstance(value, bool) or not isinstance(value, Real):
            kind = type(value).__name__
            raise TypeError(f"{setting} of {name}{signature} must be a number, got {kind}")
        if not abs(float(value)) <= torch.finfo(torch.float32).max:
            raise ValueError(f"{setting} of {name} must be a finite float32, got {value}")
    return {setting: float(value) for setting, value in settings}


def _name(formula: Callable[..., Any]) -> str:
    return getattr(formula, "__name__", type(formula).__name__)


def _code(formula: Callable[..., Any]) -> CodeType | None:
    return getattr(inspect.unwrap(formula), "__code__", None)


def _source(formula: Callable[..., Any]) -> str:
    try:
        return textwrap.dedent(inspect.getsource(formula))
    except (OSError, TypeError):  # typed at a prompt, or no function of Python's
        return _name(formula)


def _line(formula: Callable[..., Any], error: Exception) -> str:
    """The line in the formula's own file where the error came up."""
    file = getattr(_code(formula), "co_filename", None)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == file:
            return f" ({file}, line {frame.lineno}: {frame.line})"
    return ""
