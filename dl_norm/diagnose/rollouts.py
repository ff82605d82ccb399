"""Reads response lengths, and what else is known of the responses, from files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

INSTALL = "pip install 'dl-norm[diagnose]'"
FORMATS = (".jsonl", ".csv", ".parquet", ".npy")

# Names that are looked for, in this order, where no column is named by the user.
DEFAULTS: dict[str, tuple[str, ...]] = {
    "length": (
        "length", "lengths", "completion_length", "response_length", "num_tokens",
        "completion_tokens",
    ),
    "tokens": ("completion_ids", "response_ids", "token_ids", "output_ids"),
    "batch": ("batch", "step", "global_step"),
    "group": ("group", "group_id", "prompt_id", "uid", "prompt"),
    "reward": ("reward", "rewards", "score"),
    "advantage": ("advantage", "advantages"),
    "norm": ("grad_norm", "gradient_norm"),
    "text": ("completion", "completions", "response"),
}  # fmt: skip
NONE = "none"  # as a column's name: do not use such a column, whatever the file has


class RolloutError(ValueError):
    """A file that cannot be used: which row, what is wrong with it, and what to do."""


@dataclass(frozen=True)
class Columns:
    """Names of columns. None: the first of ``DEFAULTS`` that the file has; "none": no such column.

    length: tokens that count. tokens: lists of token ids, counted where there is no length.
    batch: which rollout batch. group: which prompt. reward; advantage: one number each. norm: norm
    of the gradient of the summed token losses. text: what the model wrote, counted with a
    tokenizer where there are neither lengths nor tokens.
    """

    length: str | None = None
    tokens: str | None = None
    batch: str | None = None
    group: str | None = None
    reward: str | None = None
    advantage: str | None = None
    norm: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Rollouts:
    """N responses. ``batches`` and ``groups`` are ids from 0; None where the file has none."""

    lengths: NDArray[np.float64]
    batches: NDArray[np.int64] | None = None
    groups: NDArray[np.int64] | None = None
    rewards: NDArray[np.float64] | None = None
    advantages: NDArray[np.float64] | None = None
    norms: NDArray[np.float64] | None = None
    # Where each came from, for the report: {"length": "completion_length", ...}.
    sources: dict[str, str] | None = None

    def __len__(self) -> int:
        return len(self.lengths)


def read_rollouts(
    path: str | Path, columns: Columns | None = None, *, tokenizer: str | None = None
) -> Rollouts:
    """Responses from a JSONL, CSV, Parquet or NPY file, or a folder of Parquet files.

    A folder (TRL's ``output_dir/completions``) is read in the order of its file names. An NPY file
    holds (N,) lengths, (batches, N) lengths, or a structured array of named columns. Advantages
    that the file does not have are rewards less their mean over a group (of a batch), where it has
    both.

    Args:
        path: the file or folder.
        columns: names of columns, where the defaults do not fit.
        tokenizer: name or folder of a Hugging Face tokenizer that counts the tokens of a text, for
            files without lengths and tokens. Approximate: a text does not show where the model
            ended, nor how it cut its words into tokens.

    Raises:
        RolloutError: no such file, an unknown format, a missing column, or a bad value, with its
            row (from 1; in a text file the line).
        ImportError: a Parquet file without pyarrow, a tokenizer without transformers.
    """
    path, columns = Path(path), columns or Columns()
    table = _read(path)
    names = {
        kind: _choose(kind, getattr(columns, kind), table, path)
        for kind in (field.name for field in fields(Columns))
    }
    lengths, source = _lengths(table, names, path, tokenizer)
    if not len(lengths):
        raise RolloutError(f"{path} has no rows")
    if not (lengths > 0).any():
        raise RolloutError(f"{path}: every response is empty")
    sources = {"length": source}
    rollouts = Rollouts(lengths)
    for kind, field in (("batch", "batches"), ("group", "groups")):
        if name := names[kind]:
            rollouts = replace(rollouts, **{field: _ids(table.columns[name])})
            sources[kind] = name
    for kind, field in (("reward", "rewards"), ("advantage", "advantages"), ("norm", "norms")):
        if name := names[kind]:
            values = table.numbers(name, lowest=0.0 if kind == "norm" else -math.inf)
            rollouts = replace(rollouts, **{field: values})
            sources[kind] = name
    if (
        rollouts.advantages is None
        and columns.advantage != NONE
        and rollouts.rewards is not None
        and rollouts.groups is not None
    ):
        advantages = _group_advantages(rollouts.rewards, rollouts.groups, rollouts.batches)
        rollouts = replace(rollouts, advantages=advantages)
        sources["advantage"] = "reward less the group's mean"
    return replace(rollouts, sources=sources)


@dataclass(frozen=True)
class _Table:
    path: Path
    columns: dict[str, Sequence[Any]]
    rows: Sequence[str]  # what to call each row in an error

    def numbers(self, name: str, lowest: float = -math.inf) -> NDArray[np.float64]:
        """A column as float64; an error names the first row that is not a finite number."""
        column = self.columns[name]
        values = np.empty(len(column))
        for i, value in enumerate(column):
            try:
                if value is None or isinstance(value, (bool, list, dict)):
                    raise TypeError
                values[i] = float(value)
            except (TypeError, ValueError):
                raise self.error(i, name, value, "a number") from None
            if not math.isfinite(values[i]) or values[i] < lowest:
                expected = f"a finite number >= {lowest:g}" if lowest > -math.inf else "finite"
                raise self.error(i, name, value, expected)
        return values

    def error(self, row: int, name: str, value: Any, expected: str) -> RolloutError:
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        return RolloutError(
            f"{self.path}, {self.rows[row]}, column {name!r}: expected {expected}, got {shown}"
        )


def _read(path: Path) -> _Table:
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise RolloutError(f"{path}: no such file or folder")
    readers: dict[str, Callable[[Path], _Table]] = {
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".npy": _read_npy,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise RolloutError(
            f"{path}: unknown format {path.suffix!r}; expected one of {', '.join(FORMATS)}"
        )
    return reader(path)


def _read_folder(path: Path) -> _Table:
    parts = [_read_parquet(file) for file in sorted(path.glob("*.parquet"))]
    if not parts:
        raise RolloutError(f"{path}: a folder without .parquet files")
    names = set(parts[0].columns).intersection(*(part.columns for part in parts))
    return _Table(
        path,
        {name: [v for part in parts for v in part.columns[name]] for name in names},
        [f"{part.path.name} {row}" for part in parts for row in part.rows],
    )


def _read_jsonl(path: Path) -> _Table:
    records, rows = [], []
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RolloutError(f"{path}, line {number}: not JSON: {error}") from None
        if isinstance(record, (int, float)) and not isinstance(record, bool):
            record = {"length": record}  # a file of bare numbers
        if not isinstance(record, dict):
            raise RolloutError(
                f"{path}, line {number}: expected an object or a number, got "
                f"{type(record).__name__}"
            )
        records.append(record)
        rows.append(f"line {number}")
    # A column that one row lacks holds None there; what needs a number then names that row.
    names = dict.fromkeys(name for record in records for name in record)
    return _Table(path, {n: [record.get(n) for record in records] for n in names}, rows)


def _read_csv(path: Path) -> _Table:
    lines = (line for _, line in _lines(path))
    reader = csv.reader(lines, strict=True)
    records, rows = [], []
    try:
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise RolloutError(f"{path}, line 1: two columns of one name in {header}")
        for record in reader:
            if not record:
                continue
            if len(record) != len(header):
                raise RolloutError(
                    f"{path}, line {reader.line_num}: {len(record)} values for "
                    f"{len(header)} columns"
                )
            records.append(record)
            rows.append(f"line {reader.line_num}")
    except csv.Error as error:
        raise RolloutError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
    return _Table(path, {n: [record[i] for record in records] for i, n in enumerate(header)}, rows)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                yield number, line
        except UnicodeDecodeError as error:
            raise RolloutError(f"{path}, after line {number}: not UTF-8 text: {error}") from None


def _read_parquet(path: Path) -> _Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"{path}: reading Parquet needs pyarrow: {INSTALL}") from error
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise RolloutError(f"{path}: not a Parquet file: {error}") from None
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    return _Table(path, columns, _RowNumbers(table.num_rows))


def _read_npy(path: Path) -> _Table:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise RolloutError(f"{path}: not an NPY file of numbers: {error}") from None
    if array.dtype.names:
        columns = {name: array[name].ravel().tolist() for name in array.dtype.names}
    elif array.ndim == 1:
        columns = {"length": array.tolist()}
    elif array.ndim == 2:
        batch = np.repeat(np.arange(array.shape[0]), array.shape[1])
        columns = {"length": array.ravel().tolist(), "batch": batch.tolist()}
    else:
        raise RolloutError(
            f"{path}: expected (N,) or (batches, N) lengths, got an array of shape {array.shape}"
        )
    return _Table(path, columns, _RowNumbers(array.size))


class _RowNumbers(Sequence[str]):
    def __init__(self, total: int):
        self.total = total

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index):
        return f"row {range(self.total)[index] + 1}"


def _choose(kind: str, name: str | None, table: _Table, path: Path) -> str | None:
    if name == NONE:
        return None
    if name is None:
        return next((default for default in DEFAULTS[kind] if default in table.columns), None)
    if name not in table.columns:
        raise RolloutError(
            f"{path} has no column {name!r}; it has {', '.join(map(repr, table.columns)) or 'none'}"
        )
    return name


def _lengths(
    table: _Table, names: dict[str, str | None], path: Path, tokenizer: str | None
) -> tuple[NDArray[np.float64], str]:
    if name := names["length"]:
        lengths = table.numbers(name, lowest=0.0)
        if (lengths != np.floor(lengths)).any():
            row = int(np.argmax(lengths != np.floor(lengths)))
            raise table.error(row, name, table.columns[name][row], "a whole number of tokens")
        return lengths, name
    if name := names["tokens"]:
        for row, value in enumerate(table.columns[name]):
            if not isinstance(value, list):
                raise table.error(row, name, value, "a list of token ids")
        counts = [len(value) for value in table.columns[name]]
        return np.array(counts, dtype=np.float64), f"tokens in {name}"
    name = names["text"]
    if name and tokenizer:
        texts = [_text(table, row, name) for row in range(len(table.rows))]
        return _token_counts(texts, tokenizer), f"{name}, counted by {tokenizer}"
    found = ", ".join(map(repr, table.columns)) or "none"
    message = (
        f"{path} has no lengths: expected a column named {', '.join(DEFAULTS['length'])}, or a "
        f"list of tokens named {', '.join(DEFAULTS['tokens'])}; it has {found}. Name one with "
        "--length-column or --tokens-column"
    )
    if name:
        message += (
            f", or count the tokens of {name!r} with --tokenizer. For exact lengths in TRL's log, "
            "call log_extra('completion_length', [len(ids) for ids in completion_ids]) in a reward "
            "function"
        )
    raise RolloutError(message)


def _text(table: _Table, row: int, name: str) -> str:
    """What the model wrote: a string, or the assistant's messages of a conversation."""
    value = table.columns[name][row]
    if isinstance(value, str):
        return value
    try:
        written = [message for message in value if message["role"] == "assistant"]
        return "".join(message["content"] or "" for message in written)
    except (TypeError, KeyError):
        raise table.error(row, name, value, "text or a list of messages") from None


def _token_counts(texts: list[str], tokenizer: str) -> NDArray[np.float64]:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError("--tokenizer needs transformers: pip install 'dl-norm[trl]'") from error
    try:
        encode = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise RolloutError(f"tokenizer {tokenizer!r} cannot be loaded: {error}") from None
    # In pieces: a batch encoding holds several lists per text.
    counts: list[int] = []
    for start in range(0, len(texts), 1024):
        ids = encode(texts[start : start + 1024], add_special_tokens=False)["input_ids"]
        counts.extend(map(len, ids))
    return np.array(counts, dtype=np.float64)


def _ids(values: Sequence[Any]) -> NDArray[np.int64]:
    """Numbers from 0 in order of appearance; equal for equal values, conversations included."""
    keys = (v if isinstance(v, (str, int)) else json.dumps(v, default=str) for v in values)
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _group_advantages(
    rewards: NDArray[np.float64],
    groups: NDArray[np.int64],
    batches: NDArray[np.int64] | None,
) -> NDArray[np.float64]:
    key = groups if batches is None else groups + (groups.max() + 1) * batches
    ids = np.unique(key, return_inverse=True)[1].reshape(-1)
    return rewards - (np.bincount(ids, rewards) / np.bincount(ids))[ids]
