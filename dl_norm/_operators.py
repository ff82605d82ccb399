"""Operators of torch whose arguments are records: the schema is made from their fields.

Under torch.compile a launch is one opaque operator, and an operator takes plain values. So a
record goes in as its fields, one after the other, and is put together again inside.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor", float: "float", int: "int", bool: "bool", str: "str",
    tuple[float, ...]: "float[]", tuple[bool, ...]: "bool[]",
}  # fmt: skip


class RecordOperator:
    """``function`` as the operator dl_norm::name; see :func:`operator`."""

    def __init__(self, name: str, function: Callable[..., tuple[Tensor, ...]], outputs: int):
        hints = get_type_hints(function)
        names = list(inspect.signature(function).parameters)
        self.kinds = [hints[name] for name in names]
        # Resolved here, as torch.compile traces the call.
        self.fields = [_field_tree(kind) for kind in self.kinds]
        arguments = [
            f"{kind} {name}"
            for parameter in names
            for kind, name in _arguments(parameter, hints[parameter])
        ]
        self.op = torch.library.custom_op(
            f"dl_norm::{name}",
            lambda *arguments: function(*self._records(arguments)),
            mutates_args=(),
            schema=f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * outputs)})",
        )

    def __call__(self, *records) -> tuple[Tensor, ...]:
        return self.op(*self.arguments(*records))

    def arguments(self, *records) -> list:
        """What the operator itself takes for these records."""
        flat = []
        for record, fields in zip(records, self.fields, strict=True):
            flat += _flatten(record, fields)
        return flat

    def fake(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        """Registers what gives outputs of the right shapes and dtypes without computing them."""
        self.op.register_fake(lambda *arguments: function(*self._records(arguments)))

    def _records(self, arguments: tuple) -> list:
        values = iter(arguments)
        return [_build(kind, values) for kind in self.kinds]


def operator(name: str, *, outputs: int) -> Callable[[Callable[..., Any]], RecordOperator]:
    """Decorator: a function of records and plain values, called with them, as an operator.

    Its parameters are annotated with a NamedTuple or dataclass, which may be ``| None`` if it is of
    tensors alone, or with a type an operator knows, and it returns ``outputs`` tensors. An optional
    record within a record must be there.
    """
    return lambda function: RecordOperator(name, function, outputs)


def _field_tree(kind: Any) -> dict | None:
    kind = _without_none(kind)
    return {n: _field_tree(of) for n, of in _hints(kind).items()} if _is_record(kind) else None


def _flatten(value: Any, fields: dict | None) -> list:
    """The fields of a record, those of records within it in their place; else the value."""
    if fields is None:
        return [value]
    return [
        leaf for name in fields
        for leaf in _flatten(None if value is None else getattr(value, name), fields[name])
    ]  # fmt: skip


def _build(kind: Any, values: Iterator) -> Any:
    record = _without_none(kind)
    if record is not kind:  # of tensors alone
        parts = [next(values) for _ in _hints(record)]
        return None if parts[0] is None else record(*parts)
    if not _is_record(kind):
        value = next(values)
        return tuple(value) if isinstance(value, list) else value
    return kind(*[_build(of, values) for of in _hints(kind).values()])


def _arguments(name: str, kind: Any) -> list[tuple[str, str]]:
    """(type, name) of every argument in the schema."""
    if _is_record(kind):
        fields = _hints(kind).items()  # two records may have a field of one name
        return [pair for field, of in fields for pair in _arguments(f"{name}_{field}", of)]
    record = _without_none(kind)
    if record is not kind:
        return [(f"{of}?", part) for of, part in _arguments(name, record)]
    if _is_optional(kind):
        (of,) = set(get_args(kind)) - {type(None)}
        return [(f"{_SCHEMA_TYPES[of]}?", name)]
    return [(_SCHEMA_TYPES[kind], name)]


def _hints(record: type) -> dict[str, Any]:
    """The types of the fields, a record that may be None as the record."""
    names = getattr(record, "_fields", None) or [f.name for f in dataclasses.fields(record)]
    hints = get_type_hints(record)
    return {name: _without_none(hints[name]) for name in names}


def _without_none(kind: Any) -> Any:
    records = [of for of in get_args(kind) if _is_record(of)] if _is_optional(kind) else []
    return records[0] if records else kind


def _is_optional(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and (hasattr(kind, "_fields") or dataclasses.is_dataclass(kind))
