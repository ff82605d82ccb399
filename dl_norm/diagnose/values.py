"""From the cells of a column to numbers; an error names the row."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .columns import Cells, RolloutError

MAX_LENGTH = 10**9  # tokens; beyond any context, and short of where powers of it overflow
# Squares and ratios of these stay well inside float64.
LARGEST, SMALLEST = 1e60, 1e-60


@dataclass(frozen=True)
class Numbers:
    """A column as float64: finite numbers, of which ``allowed`` holds."""

    expected: str
    allowed: Callable[[NDArray[np.float64]], NDArray[np.bool_]]
    booleans: bool = False  # True and False are 1 and 0

    def __call__(self, cells: Cells) -> NDArray[np.float64]:
        numbers = _as_float64(cells.values)
        if numbers is None:
            numbers = self._one_by_one(cells)
        with np.errstate(invalid="ignore"):
            wrong = ~(np.isfinite(numbers) & self.allowed(numbers))
        if wrong.any():
            raise cells.error(int(np.argmax(wrong)), self.expected)
        return numbers

    def _one_by_one(self, cells: Cells) -> NDArray[np.float64]:
        values = cells.values
        if isinstance(values, np.ndarray):
            if values.dtype.kind not in "bUS":  # a date, say, which Python takes for a number
                raise cells.error(0, self.expected)
            values = values.tolist()
        numbers = np.empty(len(values))
        for row, value in enumerate(values):
            number = self._truth(value) if self.booleans else None
            if number is None:
                try:
                    if isinstance(value, (bool, np.bool_)):
                        raise TypeError
                    number = float(value)
                except (TypeError, ValueError, OverflowError):
                    raise cells.error(row, self.expected) from None
            numbers[row] = number
        return numbers

    def _truth(self, value: Any) -> float | None:
        if isinstance(value, (bool, np.bool_)):
            return float(value)
        if isinstance(value, str):
            return {"true": 1.0, "false": 0.0}.get(value.strip().lower())
        return None


lengths = Numbers(
    f"a whole number of tokens, 0 to {MAX_LENGTH:,}",
    lambda x: (x >= 0) & (x <= MAX_LENGTH) & (x == np.floor(x)),
)
rewards = Numbers(
    f"a number, at most {LARGEST:g} in size", lambda x: np.abs(x) <= LARGEST, booleans=True
)
advantages = Numbers(f"a number, at most {LARGEST:g} in size", lambda x: np.abs(x) <= LARGEST)
norms = Numbers(
    f"a number, 0 or {SMALLEST:g} to {LARGEST:g}",
    lambda x: (x == 0) | ((x >= SMALLEST) & (x <= LARGEST)),
)


class Ids:
    """Numbers from 0 in order of appearance; equal for equal values, conversations included."""

    def __init__(self) -> None:
        self._ids: dict[str | float, int] = {}
        self._kind: str | None = None

    def __call__(self, cells: Cells) -> NDArray[np.int64]:
        values = cells.values.tolist() if isinstance(cells.values, np.ndarray) else cells.values
        kinds = set(map(type, values))
        if self._kind is None:
            self._kind = next(filter(None, map(_kind_of, map(type, values))), None)
        # 1 and "1" may be the same step, or not: nothing here can tell.
        if wrong := {kind for kind in kinds if _kind_of(kind) != (self._kind or "any")}:
            row = next(row for row, value in enumerate(values) if type(value) in wrong)
            raise cells.error(row, f"{self._kind or 'numbers or text'} in every row")
        keys: Sequence[Any] = values
        if not kinds <= {str, int, float}:
            keys = [value if isinstance(value, (str, int, float)) else _json(value)
                    for value in values]  # fmt: skip
        ids = {key: self._id(key, cells, keys) for key in dict.fromkeys(keys)}
        return np.fromiter(map(ids.__getitem__, keys), np.int64, len(keys))

    def _id(self, key: str | float, cells: Cells, keys: Sequence[Any]) -> int:
        missing = isinstance(key, str) and not key.strip()
        if missing or (isinstance(key, float) and not math.isfinite(key)):
            raise cells.error(keys.index(key), f"{self._kind} in every row")
        if isinstance(key, str) and len(key) > 32:
            # A prompt is kept as its digest: a long file has many, and they are long.
            data = key.encode("utf-8", "surrogatepass")
            key = "digest " + hashlib.blake2b(data, digest_size=16).hexdigest()
        return self._ids.setdefault(key, len(self._ids))


def token_counts(cells: Cells) -> NDArray[np.float64]:
    """Lengths of lists of token ids. An array holds the counts already."""
    if isinstance(cells.values, np.ndarray):
        return cells.values.astype(np.float64)
    for row, value in enumerate(cells.values):
        if not isinstance(value, list) or (value and isinstance(value[0], (list, dict))):
            raise cells.error(row, "a list of token ids")
    return np.fromiter(map(len, cells.values), np.float64, len(cells.values))


class TextCounts:
    """Tokens of texts, as a Hugging Face tokenizer cuts them."""

    def __init__(self, tokenizer: str):
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError(
                "--tokenizer needs transformers: pip install 'dl-norm[trl]'"
            ) from error
        try:
            self._encode = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            raise RolloutError(f"tokenizer {tokenizer!r} cannot be loaded: {error}") from None

    def __call__(self, cells: Cells) -> NDArray[np.float64]:
        texts = [_text(cells, row) for row in range(len(cells.values))]
        counts: list[int] = []
        for start in range(0, len(texts), 1024):  # a batch encoding holds several lists per text
            batch = texts[start : start + 1024]
            ids = self._encode(batch, add_special_tokens=False)["input_ids"]
            counts.extend(map(len, ids))
        return np.array(counts, dtype=np.float64)


def _as_float64(values: Any) -> NDArray[np.float64] | None:
    """All at once where every value is of a plain type; None: look at each."""
    if isinstance(values, np.ndarray):
        return values.astype(np.float64) if values.dtype.kind in "iuf" else None
    kinds = set(map(type, values))
    try:
        if kinds <= {int, float}:
            return np.array(values, dtype=np.float64)
        if kinds == {str}:  # of a CSV file
            return np.fromiter(map(float, values), np.float64, len(values))
    except (ValueError, OverflowError):
        pass
    return None


def _kind_of(kind: type) -> str | None:
    if issubclass(kind, bool) or kind is type(None):
        return None
    return "numbers" if issubclass(kind, (int, float)) else "text"


def _json(value: Any) -> str:
    """A conversation, say, as text that is no other value's."""
    return "json " + json.dumps(value, default=str)


def _text(cells: Cells, row: int) -> str:
    """What the model wrote: a string, or the assistant's messages of a conversation."""
    value = cells.values[row]
    if isinstance(value, str):
        return value
    try:
        written = [message for message in value if message["role"] == "assistant"]
        return "".join(message["content"] or "" for message in written)
    except (TypeError, KeyError):
        raise cells.error(row, "text or a list of messages") from None
