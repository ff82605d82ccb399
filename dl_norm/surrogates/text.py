"""A token loss as a configuration writes it: ``"dppo_tv(delta_high=0.15) + drift(tau=0.002)"``."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping

from .base import Surrogate


def read(text: str, known: Mapping[str, Callable[..., Surrogate]]) -> Surrogate:
    """Names of ``known``, or calls of them with numbers, and sums of these. Nothing is evaluated.

    Raises:
        ValueError: the text is something else.
        TypeError: a loss does not take these options.
    """
    try:
        return _loss(ast.parse(text.strip(), mode="eval").body, known)
    except (SyntaxError, _Unknown) as error:
        raise ValueError(
            f'surrogate={text!r} is no sum of losses such as "dppo_tv(delta_high=0.15) + drift": '
            f"{error}. The losses are {', '.join(known)}"
        ) from error


class _Unknown(Exception):
    pass


def _loss(node: ast.expr, known: Mapping[str, Callable[..., Surrogate]]) -> Surrogate:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _loss(node.left, known) + _loss(node.right, known)
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    make = known.get(call.func.id) if isinstance(call.func, ast.Name) else None
    if make is None:
        raise _Unknown(f"{ast.unparse(node)} is none")
    arguments = [_number(argument) for argument in call.args]
    return make(*arguments, **{str(k.arg): _number(k.value) for k in call.keywords})


def _number(node: ast.expr) -> float | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        positive = _number(node.operand)
        if positive is not None:
            return -positive
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    value = node.value if isinstance(node, ast.Constant) else ...
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    raise _Unknown(f"{ast.unparse(node)} is no number")
