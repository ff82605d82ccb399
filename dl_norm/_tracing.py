"""A pointwise PyTorch function as a list of operations, its derivatives among them.

The function is called with :class:`Value` objects, which answer to PyTorch's functions, methods and
operators and write down what is asked of them. Every value carries its derivatives along, as
operations of the same list (forward-mode differentiation), so that nothing of the branch which
``where`` does not choose gets into a derivative, NaN and infinity included.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from numbers import Real
from types import CodeType, FrameType
from typing import Any

import torch

INPUTS = ("log_prob", "ratio", "advantage")
BOOLEAN = ("lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_not")


def arguments(entry: tuple) -> tuple[int, ...]:
    return () if entry[0] in ("input", "setting", "const") else entry[1:]


def needed(
    entries: Sequence[tuple], outputs: Iterable[int], known: Container[int] = ()
) -> tuple[int, ...]:
    """What is computed for the outputs, in order, leaves included; nothing behind what is known."""
    found, left = set(), list(outputs)
    while left:
        at = left.pop()
        if at not in found:
            found.add(at)
            left += () if at in known else arguments(entries[at])
    return tuple(sorted(found))


class Trace:
    """Operations in an order in which they can be computed, each of them once.

    An entry is ``("input", name)``, ``("setting", name)``, ``("const", number)``, or the name of a
    function of ``torch`` and the positions of its arguments. ``code``: of the traced function.
    """

    def __init__(self, code: CodeType | None = None):
        self.entries: list[tuple] = []
        self._positions: dict[tuple, int] = {}
        self._code = code
        self._frame: FrameType | None = None

    def value(self, *entry: Any) -> Value:
        if entry not in self._positions:
            self._positions[entry] = len(self.entries)
            self.entries.append(entry)
        return Value(self, self._positions[entry])

    def apply(self, op: str, *args: Value) -> Value:
        """The value of an operation: at once if all is known, another's if it is that already."""
        if self._frame is None:
            self._frame = _frame_of(self._code)
        numbers = [arg.number for arg in args]
        if op not in BOOLEAN and None not in numbers:
            known = [torch.tensor(number, dtype=torch.float64, device="cpu") for number in numbers]
            return self.value("const", getattr(torch, op)(*known).item())
        positions = [arg.position for arg in args]
        if op in ("add", "mul"):
            positions.sort()
        same = _simpler(op, args)
        # A new object in any case: derivatives belong to the use of a value, not to its position.
        return self.value(op, *positions) if same is None else Value(self, same.position)

    def names(self) -> dict[int, str]:
        """What the code calls its values, and d_ that for their derivatives, by position."""
        variables = {} if self._frame is None else dict(self._frame.f_locals)
        self._frame = None
        names = {}
        for name, value in variables.items():
            if isinstance(value, Value):
                names.update({by.position: f"d_{name}" for by in value.tangents if by is not None})
                names[value.position] = name
        return names


def _frame_of(code: CodeType | None) -> FrameType | None:
    frame = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


_NEUTRAL = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0}


def _simpler(op: str, args: tuple[Value, ...]) -> Value | None:
    """x + 0, x - 0, 1 x, -1 x, x / 1, x / x, (1 / y) x, -(-x) and where(c, x, x), if it is one.

    0 x is none: x may be infinite or NaN. x / x is what is left of the derivative of log(ratio) by
    log(ratio), which is 1 at ratios of 0 and infinity too.
    """
    *_, x = args
    if op == "neg" and x.entry[0] == "neg":
        return Value(x.trace, x.entry[1])
    if op == "where" and args[1].position == x.position:
        return x
    if op == "div" and args[0].position == x.position:
        return x.trace.value("const", 1.0)
    if op not in _NEUTRAL:
        return None
    for x, y in (args, args[::-1]) if op in ("add", "mul") else (args,):
        if y.number == _NEUTRAL[op]:
            return x
        if op == "mul" and y.number == -1.0:
            return -x
        if op == "mul" and y.entry[0] == "div" and Value(y.trace, y.entry[1]).number == 1.0:
            return x / Value(y.trace, y.entry[2])
    return None


class Value:
    """What stands for a tensor, or for the number of a setting, while a formula is traced."""

    dtype = torch.float32
    __array_ufunc__ = None  # NumPy's numbers leave their operators to this class
    __hash__ = object.__hash__
    __neg__: Any  # these and the other operators are set below
    __add__: Any
    __mul__: Any
    __rmul__: Any
    __truediv__: Any
    __lt__: Any

    def __init__(self, trace: Trace, position: int):
        self.trace = trace
        self.position = position
        # By the log of the ratio and by the log-prob; None where the value does not depend on it.
        self.tangents: tuple[Value | None, Value | None] = (None, None)

    @property
    def entry(self) -> tuple:
        return self.trace.entries[self.position]

    @property
    def number(self) -> float | None:
        return self.entry[1] if self.entry[0] == "const" else None

    @property
    def boolean(self) -> bool:
        return self.entry[0] in BOOLEAN

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = function.__name__
        return _call(name.strip("_") if name.endswith("__") else name, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return partial(_call, _known(name), self)

    def __bool__(self):
        raise ValueError(
            "a value decides what Python does next (if, and, or, not, min, max); what can be "
            "decided for each token is torch.where, torch.logical_and, torch.minimum and the like"
        )

    def __float__(self):
        raise ValueError(
            "a value is made a Python number (float, math.log and the like): use PyTorch's "
            "functions of tensors, and pass what is to be computed of a setting as a setting"
        )

    __int__ = __index__ = __float__


def _known(name: str) -> str:
    if name not in _FUNCTIONS:
        known = ", ".join(sorted(_FUNCTIONS))
        raise ValueError(f"{name} is no operation that a formula may use; it may use {known}")
    return name


def _call(name: str, *args: Any, **kwargs: Any) -> Value:
    """The function, method or operator of that name."""
    try:
        return _FUNCTIONS[_known(name)](*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"{name} is used in a way that a formula may not: {error}") from error


def _values(*args: Any) -> list[Value]:
    """The arguments, one of them a value; numbers and tensors of one number become constants."""
    trace = next(arg.trace for arg in args if isinstance(arg, Value))

    def value(arg: Any) -> Value:
        if isinstance(arg, Value):
            return arg
        if isinstance(arg, torch.Tensor) and arg.numel() == 1:
            arg = arg.item()
        if not isinstance(arg, Real):
            raise ValueError(f"a formula computes with its arguments and numbers, not with {arg!r}")
        return trace.value("const", float(arg))

    return list(map(value, args))


def _floats(*args: Any) -> list[Value]:
    return [_where(arg, 1.0, 0.0) if arg.boolean else arg for arg in _values(*args)]


def _booleans(*args: Any) -> list[Value]:
    return [arg if arg.boolean else _operation("ne", arg, 0.0) for arg in _values(*args)]


def _differentiated(
    value: Value, args: Iterable[Value], rule: Callable[..., Value | None]
) -> Value:
    """``value`` with the derivatives that ``rule`` makes of the arguments' derivatives."""
    if torch.is_grad_enabled():
        with torch.no_grad():
            by_log_ratio, by_log_prob = zip(*(arg.tangents for arg in args), strict=True)
            value.tangents = (rule(*by_log_ratio), rule(*by_log_prob))
    return value


def _operation(op: str, *args: Any) -> Value:
    values = _booleans(*args) if op.startswith("logical") else _floats(*args)
    result = values[0].trace.apply(op, *values)

    def rule(*tangents: Value | None) -> Value | None:
        total = None
        for tangent, partial_derivative in zip(tangents, _PARTIALS.get(op, ()), strict=False):
            if tangent is not None:
                term = partial_derivative(result, *values) * tangent
                total = term if total is None else total + term
        return total

    return _differentiated(result, values, rule)


# d y / d argument for each argument. None of them takes a difference that cancels, like 1 - y y.
_PARTIALS: dict[str, tuple[Callable[..., Any], ...]] = {
    "neg": (lambda y, a: -1.0,),
    "add": (lambda y, a, b: 1.0, lambda y, a, b: 1.0),
    "sub": (lambda y, a, b: 1.0, lambda y, a, b: -1.0),
    "mul": (lambda y, a, b: b, lambda y, a, b: a),
    "div": (lambda y, a, b: 1.0 / b, lambda y, a, b: -y / b),
    "exp": (lambda y, a: y,),
    "expm1": (lambda y, a: a.exp(),),
    "log": (lambda y, a: 1.0 / a,),
    "log1p": (lambda y, a: 1.0 / (1.0 + a),),
    "sigmoid": (lambda y, a: y * (-a).sigmoid(),),
    "tanh": (lambda y, a: 4.0 * (2.0 * a).sigmoid() * (-2.0 * a).sigmoid(),),
    "sqrt": (lambda y, a: 0.5 / y,),
    "abs": (lambda y, a: a.sign(),),
    "pow": (lambda y, a, b: b * a ** (b - 1.0), lambda y, a, b: _where(a == 0.0, 0.0, y * a.log())),
}


def _where(condition: Any, a: Any, b: Any) -> Value:
    condition, a, b = _values(condition, a, b)
    (condition,), (a, b) = _booleans(condition), _floats(a, b)

    def rule(_, by_a: Value | None, by_b: Value | None) -> Value | None:
        if by_a is None and by_b is None:
            return None
        return _where(condition, 0.0 if by_a is None else by_a, 0.0 if by_b is None else by_b)

    return _differentiated(a.trace.apply("where", condition, a, b), (condition, a, b), rule)


def _extreme(op: str, a: Any, b: Any, clamp: bool = False) -> Value:
    """minimum or maximum. Where both are equal: half of each derivative, or that of what is clamped
    (the first). A NaN keeps the first's."""
    a, b = _floats(a, b)
    second = b < a if op == "minimum" else b > a

    def rule(by_a: Value | None, by_b: Value | None) -> Value | None:
        if by_a is None and by_b is None:
            return None
        by_a, by_b, _ = _values(0.0 if by_a is None else by_a, 0.0 if by_b is None else by_b, a)
        chosen = _where(second, by_b, by_a)
        # Halves first: on a GPU one of the products that are added may be left unrounded.
        return chosen if clamp else _where(a == b, 0.5 * by_a + 0.5 * by_b, chosen)

    return _differentiated(a.trace.apply(op, a, b), (a, b), rule)


def _clamp(x: Any, min: Any = None, max: Any = None) -> Value:
    x = x if min is None else _extreme("maximum", x, min, clamp=True)
    return x if max is None else _extreme("minimum", x, max, clamp=True)


def _pow(x: Any, y: Any) -> Value:
    """Whole and half powers as products, quotients and roots: to rounding, and with their sign."""
    x, y = _floats(x, y)
    power = y.number
    if power is None or abs(power) > 16 or (power % 1 and abs(power) != 0.5):
        return _operation("pow", x, y)
    if power < 0:
        return 1.0 / x**-power
    if power == 0.5:
        return x.sqrt()
    one = x.trace.value("const", 1.0)
    half = _pow(x, power // 2) if power > 1 else one
    return half * half * (x if power % 2 else one)


def _softplus(x: Value, beta: Any = 1.0, threshold: Any = 20.0) -> Value:
    scaled = x * beta
    return _where(scaled > threshold, x, scaled.exp().log1p() / beta)


def _to(x: Value, *targets: Any, **named: Any) -> Value:
    for target in (*targets, *named.values()):
        target = getattr(target, "dtype", target)
        if target != torch.float32 and not isinstance(target, torch.device):
            raise ValueError(f"a formula computes in float32 where it runs; it asks for {target}")
    return _floats(x)[0]


_FUNCTIONS: dict[str, Callable[..., Value]] = {
    **{op: partial(_operation, op) for op in (*_PARTIALS, *BOOLEAN)},
    "logical_xor": lambda a, b: _operation("ne", *_booleans(a, b)),
    "where": _where,
    "masked_fill": lambda x, mask, value: _where(mask, value, x),
    "minimum": partial(_extreme, "minimum"),
    "maximum": partial(_extreme, "maximum"),
    "clamp": _clamp,
    "clamp_min": lambda x, min: _clamp(x, min),
    "clamp_max": lambda x, max: _clamp(x, None, max),
    "relu": lambda x, inplace=False: _where(x <= 0.0, 0.0, x),
    "sign": lambda x: _where(x > 0.0, 1.0, _where(x < 0.0, -1.0, 0.0)),
    "pow": _pow,
    "square": lambda x: x * x,
    "reciprocal": lambda x: 1.0 / x,
    "rsqrt": lambda x: 1.0 / x.sqrt(),
    "softplus": _softplus,
    "logsigmoid": lambda x: -_softplus(-x),
    "isnan": lambda x: x != x,
    "isfinite": lambda x: abs(x) < math.inf,
    "detach": lambda x: Value(x.trace, x.position),
    "clone": lambda x: x,
    "to": _to,
    "type_as": _to,
    "float": _to,
    "bool": lambda x: _booleans(x)[0],
    "zeros_like": lambda x: x.trace.value("const", 0.0),
    "ones_like": lambda x: x.trace.value("const", 1.0),
    "full_like": lambda x, fill_value: _values(fill_value, x)[0],
}
for also, name in {
    "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "negative": "neg",
    "absolute": "abs", "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge",
    "not_equal": "ne", "min": "minimum", "max": "maximum", "clip": "clamp", "and": "logical_and",
    "or": "logical_or", "log_sigmoid": "logsigmoid", "special_expit": "sigmoid",
    "contiguous": "clone",
}.items():  # fmt: skip
    _FUNCTIONS[also] = _FUNCTIONS[name]
for operator, name in {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow", "and": "logical_and",
    "or": "logical_or", "xor": "logical_xor", **{name: name for name in BOOLEAN[:6]},
}.items():  # fmt: skip
    setattr(Value, f"__{operator}__", lambda a, b, name=name: _call(name, a, b))
    setattr(Value, f"__r{operator}__", lambda a, b, name=name: _call(name, b, a))
for operator, name in {"neg": "neg", "abs": "abs", "invert": "logical_not", "pos": "clone"}.items():
    setattr(Value, f"__{operator}__", lambda a, name=name: _call(name, a))
