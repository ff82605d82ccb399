"""Rows of text files, block by block: JSON Lines, JSON, CSV, TSV; in UTF-8, or as a mark says."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO, cast

from .columns import Block, RolloutError, Selection, repeated

# Of lines that are parsed at a time: few enough for their values to stay in a core's cache.
BLOCK_CHARACTERS = 1 << 16
BLOCK_ROWS = 8192
_MARKS = {  # byte-order marks; that of UTF-32 begins with that of UTF-16
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def read_json_lines(path: Path, selection: Selection) -> Iterator[Block]:
    """Blocks of a file with an object, or a bare length, in each line."""
    seen: set[tuple[str, ...]] = set()
    first = 1
    with _open_text(path) as file:
        while lines := file.readlines(BLOCK_CHARACTERS):
            numbers = range(first, first + len(lines))
            first += len(lines)
            records = _parse_together(lines)
            if records is not None:
                yield _block(records, _places(path, "line", numbers), selection, seen, lines)
                continue
            rows = [(n, line.strip()) for n, line in zip(numbers, lines, strict=True)]
            rows = [(number, line) for number, line in rows if line]
            records = [_parse_line(line, f"{path}, line {number}") for number, line in rows]
            if records:
                where = _places(path, "line", [number for number, _ in rows])
                yield _block(records, where, selection, seen)


def read_json(path: Path, selection: Selection) -> Iterator[Block]:
    """Blocks of an array of objects or lengths, or of an object of arrays. The whole file is in
    memory; one of several JSON texts is read as JSON Lines."""
    with _open_text(path) as file:
        text = file.read()
    start = len(text) - len(text.lstrip())
    if start == len(text):
        return
    value, end = _parse(text, str(path), start)
    if text[end:].strip():
        del text, value
        yield from read_json_lines(path, selection)
    elif isinstance(value, list):
        seen: set[tuple[str, ...]] = set()
        for row in range(0, len(value), BLOCK_ROWS):
            records = value[row : row + BLOCK_ROWS]
            where = _places(path, "item", range(row + 1, row + 1 + len(records)))
            yield _block(records, where, selection, seen)
    elif isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        names = selection.see(list(value), str(path)).values()
        sizes = {name: len(value[name]) for name in names}
        if len(set(sizes.values())) > 1:
            raise RolloutError(f"{path}: arrays of different lengths: {sizes}")
        numbers = range(1, 1 + max(sizes.values()))
        yield Block({name: value[name] for name in names}, _places(path, "item", numbers))
    else:
        raise RolloutError(
            f"{path}: expected an array of objects or an object of arrays (pandas: "
            "to_json(orient='records'))"
        )


def read_csv(path: Path, selection: Selection) -> Iterator[Block]:
    """Blocks of a file with commas, the names of the columns in its first line."""
    return _read_delimited(path, selection, ",")


def read_tsv(path: Path, selection: Selection) -> Iterator[Block]:
    """The same with tabs."""
    return _read_delimited(path, selection, "\t")


def _read_delimited(path: Path, selection: Selection, delimiter: str) -> Iterator[Block]:
    with _open_text(path, newline="") as file, _fields_of_any_size():
        reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            header = next((record for record in reader if record), None)
            if header is None:
                return
            _check_header(header, path, reader.line_num, delimiter)
            used = selection.see(header, str(path)).values()
            at = {name: header.index(name) for name in used}
            while True:
                columns, lines = _take(reader, at, path, len(header))
                if not lines:
                    return
                yield Block(columns, _places(path, "line", lines))
        except csv.Error as error:
            raise RolloutError(f"{path}, line {reader.line_num}: not CSV: {error}") from None


def _take(
    reader: Any, at: dict[str, int], path: Path, width: int
) -> tuple[dict[str, list[str]], list[int]]:
    columns: dict[str, list[str]] = {name: [] for name in at}
    stores = [(columns[name].append, place) for name, place in at.items()]
    lines: list[int] = []
    for record in reader:
        if not record:
            continue
        if len(record) != width:
            raise RolloutError(
                f"{path}, line {reader.line_num}: {len(record)} values for {width} columns"
            )
        for append, place in stores:
            append(record[place])
        lines.append(reader.line_num)
        if len(lines) == BLOCK_ROWS:
            break
    return columns, lines


def _check_header(header: list[str], path: Path, line: int, delimiter: str) -> None:
    place = f"{path}, line {line}"
    if all(map(_is_number, header)):
        raise RolloutError(f"{place}: expected the names of the columns, got numbers: {header}")
    others = {",": "commas", ";": "semicolons", "\t": "tabs"}
    expected = others.pop(delimiter)
    found = [words for mark, words in others.items() if mark in header[0]]
    if len(header) == 1 and found:
        raise RolloutError(
            f"{place}: expected columns apart by {expected}, got {header[0]!r}, which has "
            f"{found[0]}: write commas in a .csv file and tabs in a .tsv file"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@contextmanager
def _fields_of_any_size() -> Iterator[None]:
    # A completion may be longer than the 131,072 characters that csv takes by default.
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _block(
    records: Sequence[Any],
    where: Callable[[int], str],
    selection: Selection,
    seen: set[tuple[str, ...]],
    lines: Sequence[str] | None = None,
) -> Block:
    """The used columns of objects or lengths. ``seen``: the tuples of names that the file had
    before; ``lines``: the text of each record, where nobody looked for two values of one name yet.
    """
    kinds = set(map(type, records))
    if wrong := kinds - {dict, int, float}:
        row = next(row for row, record in enumerate(records) if type(record) in wrong)
        found = type(records[row]).__name__
        hint = "; an array belongs in a .json file" if found == "list" else ""
        raise RolloutError(f"{where(row)}: expected an object or a number, got {found}{hint}")
    if kinds != {dict}:
        records = [r if isinstance(r, dict) else {"length": r} for r in records]
    for names in dict.fromkeys(map(tuple, records)):
        if names not in seen:
            row = next(row for row, record in enumerate(records) if tuple(record) == names)
            selection.see(names, where(row))
            seen.add(names)
    used = (selection.used or {}).values()
    if lines is not None and dict in kinds:
        text = "".join(lines)
        if any(text.count(json.dumps(name)) != len(records) for name in used):
            # A name twice in an object, of which json keeps the last; or in an inner object.
            for row, line in enumerate(lines):
                _parse_line(line.strip(), where(row))
    return Block({name: [record[name] for record in records] for name in used}, where)


def _parse_together(lines: Sequence[str]) -> list[Any] | None:
    """The lines' values in one call, twice as fast as one by one; None: not one in each line."""
    # Each in an array of its own: a line with two values, or half of one, cannot pass for two.
    try:
        boxes = json.loads(f"[[{'],['.join(lines)}]]")
        if len(boxes) == len(lines):
            return [record for (record,) in boxes]
    except (ValueError, TypeError, RecursionError):
        pass
    return None


def _parse_line(line: str, place: str) -> Any:
    value, end = _parse(line, place)
    if end != len(line):
        raise RolloutError(f"{place}: not JSON: more than one value in the line")
    return value


def _parse(text: str, place: str, start: int = 0) -> tuple[Any, int]:
    """The value at ``start``, and where it ends."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if again := repeated([name for name, _ in pairs]):
            raise RolloutError(f"{place}: two values of one name in an object: {again[0]!r}")
        return dict(pairs)

    try:
        return json.JSONDecoder(object_pairs_hook=unique).raw_decode(text, start)
    except RolloutError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raise RolloutError(f"{place}: not JSON: {error}") from None


def _places(path: Path, what: str, numbers: Sequence[int]) -> Callable[[int], str]:
    return lambda row: f"{path}, {what} {numbers[row]}"


@contextmanager
def _open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """The file as text: a byte-order mark says how it is encoded, gzip is unpacked."""
    with open(path, "rb") as raw:
        packed = raw.peek(2)[:2] == b"\x1f\x8b"
        data = cast("IO[bytes]", gzip.GzipFile(fileobj=raw) if packed else raw)
        encoding = "utf-8"
        try:
            head = data.peek(4096)[:4096]  # pyright: ignore[reportAttributeAccessIssue]
            encoding = next((e for mark, e in _MARKS.items() if head.startswith(mark)), "utf-8")
            if encoding == "utf-8" and b"\0" in head:
                raise RolloutError(
                    f"{path}: not text, or UTF-16 without a byte-order mark: save it as UTF-8"
                )
            text = io.TextIOWrapper(data, encoding, newline=newline)
            yield text
        except UnicodeError as error:
            place = f"{path}{_first_undecodable(data) if encoding.startswith('utf-8') else ''}"
            raise RolloutError(f"{place}: not {encoding.upper()} text: {error}") from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise RolloutError(f"{path}: not a whole gzip file: {error}") from None


def _first_undecodable(data: IO[bytes]) -> str:
    data.seek(0)
    for number, line in enumerate(data, 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return f", line {number}"
    return ""
