"""Which files a path means, and the reader of each format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from .array_files import read_numpy, read_parquet
from .columns import Block, RolloutError, Selection
from .text_files import read_csv, read_json, read_json_lines, read_tsv

Reader = Callable[[Path, Selection], Iterator[Block]]

READERS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".npy": read_numpy,
    ".npz": read_numpy,
}
TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # may be packed: .jsonl.gz


def files_of(path: Path) -> tuple[list[Path], list[str]]:
    """The files to read, in order, and the names of those in the folder that are not read."""
    if not path.exists():
        raise RolloutError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path], []
    names = sorted(path.iterdir(), key=_natural)
    names = [file for file in names if not file.name.startswith(".")]
    files = [file for file in names if file.is_file() and _format(file) in READERS]
    formats = sorted({_format(file) for file in files})
    if not files:
        raise RolloutError(f"{path}: a folder without {', '.join(READERS)} files")
    if len(formats) > 1:
        raise RolloutError(
            f"{path}: a folder with {' and '.join(formats)} files: name one file, or put those of "
            "one format into a folder of their own"
        )
    return files, [file.name for file in names if file not in set(files)]


def read_blocks(path: Path, selection: Selection) -> Iterator[Block]:
    """The rows of a file, by the reader of its format."""
    reader = READERS.get(_format(path))
    if reader is None:
        raise RolloutError(
            f"{path}: unknown format {''.join(path.suffixes[-2:])!r}; expected one of "
            f"{', '.join(READERS)}, or .gz of a text format"
        )
    return reader(path, selection)


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] and suffixes[-2] in TEXT:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts 2.jsonl before 10.jsonl."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), part) if part.isdigit() else (-1, part) for part in parts]
