"""What a traced formula computes: for the settings once, for every token, and in PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer

from ._tracing import BOOLEAN, INPUTS, arguments, needed

OUTPUTS = ("loss", "through_ratio", "past_ratio", "never", "never")  # and the extras
# Operations that give 0 where all of their arguments are 0.
_ODD = ("neg", "abs", "expm1", "log1p", "tanh", "sqrt", "add", "sub", "minimum", "maximum")


@dataclass(frozen=True)
class Program:
    """The operations of a formula and of its derivatives; see :class:`dl_norm._tracing.Trace`."""

    entries: tuple[tuple, ...]
    outputs: tuple[int, ...]
    output_names: tuple[str, ...]
    names: tuple[tuple[int, str], ...]  # of the formula's variables and of their derivatives

    @functools.cached_property
    def steps(self) -> tuple[int, ...]:
        """What is computed for every token, and the numbers that go in."""
        return needed(self.entries, self.outputs, self._numbers)

    @functools.cached_property
    def hoisted(self) -> tuple[int, ...]:
        """The numbers among the steps that follow from settings: run-time arguments."""
        return tuple(at for at in self.steps if at in self._numbers and self._op(at) != "const")

    @functools.cached_property
    def _numbers(self) -> frozenset[int]:
        of_tokens: set[int] = set()
        for at, entry in enumerate(self.entries):
            if self._op(at) == "input" or not of_tokens.isdisjoint(arguments(entry)):
                of_tokens.add(at)
        numbers = set(range(len(self.entries))) - of_tokens
        return frozenset(at for at in numbers if self._op(at) not in BOOLEAN)

    @property
    def uses_log_prob(self) -> bool:
        """Whether the derivative through the ratio depends on the log-prob itself."""
        entries, (_, through_ratio, *_) = self.entries, self.outputs
        return any(entries[at] == ("input", "log_prob") for at in needed(entries, [through_ratio]))

    @property
    def ratio_is_constant(self) -> bool:
        """Whether no derivative goes through the ratio."""
        return self._op(self.outputs[1]) == "zeros_like"

    @property
    def scales_with_advantage(self) -> bool:
        """Whether loss and derivatives are seen to be 0 where the advantage is."""
        zero: list[bool] = []
        for op, *rest in self.entries:
            if op in ("input", "setting", "const"):
                zero.append(rest[0] in ("advantage", 0.0))
            elif op == "mul":
                zero.append(any(zero[at] for at in rest))
            elif op == "div":
                zero.append(zero[rest[0]])
            else:
                factors = rest[1:] if op == "where" else rest
                known = op in ("where", "zeros_like", *_ODD)
                zero.append(op == "zeros_like" or (known and all(zero[at] for at in factors)))
        return all(zero[at] for at in self.outputs[:3])

    def _op(self, at: int) -> str:
        return self.entries[at][0]

    def leaves(self, kind: str) -> dict[str, int]:
        return {entry[1]: at for at, entry in enumerate(self.entries) if entry[0] == kind}

    def compute(
        self, outputs: Iterable[int], known: dict[int, Any], constant: Callable[[float], Any]
    ) -> list[Any]:
        """The outputs from what is known, by PyTorch's functions, of tensors or their stand-ins."""
        values, outputs = dict(known), tuple(outputs)
        for at in needed(self.entries, outputs, known):
            op, *rest = self.entries[at]
            if op == "const":
                values[at] = constant(rest[0])
            elif at not in known:
                values[at] = getattr(torch, op)(*(values[argument] for argument in rest))
        return [values[at] for at in outputs]

    def settings(self, values: dict[str, float]) -> tuple[float, ...]:
        """The hoisted numbers, of the formula's settings."""

        def number(value: float) -> Tensor:
            return torch.tensor(value, dtype=torch.float64, device="cpu")

        known = {at: number(values[name]) for name, at in self.leaves("setting").items()}
        return tuple(result.item() for result in self.compute(self.hoisted, known, number))


@functools.lru_cache(maxsize=256)
def closed_form(program: Program) -> fx.GraphModule:
    """log_prob, ratio, advantage and the hoisted numbers -> the outputs, in PyTorch operations."""
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    inputs = {name: fx.Proxy(graph.placeholder(name), tracer) for name in INPUTS}
    numbers = [fx.Proxy(graph.placeholder(f"setting_{at}"), tracer) for at in program.hoisted]

    def constant(value: Any) -> fx.Proxy:
        return inputs["ratio"].new_full((), value)

    known = {at: inputs[name] for name, at in program.leaves("input").items()}
    known.update(zip(program.hoisted, map(constant, numbers), strict=True))
    results = program.compute(program.outputs, known, constant)
    graph.output(tuple(result.node for result in results))
    return fx.GraphModule({}, graph)
