"""Response lengths, and what else is known of the responses, from a file or a folder of files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import values
from .columns import DEFAULTS, LENGTH_KINDS, NONE, Cells, Columns, RolloutError, Selection
from .files import files_of, read_blocks


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
    unused: tuple[str, ...] = ()  # columns of the file
    notes: tuple[str, ...] = ()  # what a reader of the report must know

    def __len__(self) -> int:
        return len(self.lengths)


def read_rollouts(
    path: str | Path, columns: Columns | None = None, *, tokenizer: str | None = None
) -> Rollouts:
    """Responses from a JSONL, JSON, CSV, TSV, Parquet, NPY or NPZ file, or a folder of files of
    one format.

    A folder (TRL's ``output_dir/completions``, verl's ``rollout_data_dir``) is read in the order
    of the names, 2 before 10. Text files may be packed by gzip, and are UTF-8 where no byte-order
    mark says otherwise. JSON is an array of objects or an object of arrays; an NPY file holds (N,)
    lengths, (batches, N) lengths, or a structured array of named columns; an NPZ file an array a
    column. Only the columns that are used are kept, block by block (JSON: the file is in memory).
    Advantages that the file does not have are rewards less their mean over a group (of a batch),
    where it has both.

    Args:
        path: the file or folder.
        columns: names of columns, where the defaults do not fit.
        tokenizer: name or folder of a Hugging Face tokenizer that counts the tokens of a text, for
            files without lengths and tokens. Approximate: a text does not show where the model
            ended, nor how it cut its words into tokens.

    Raises:
        RolloutError: no such file, an unknown format, a missing column, one that only some of the
            rows or files have, or a bad value, with its row (from 1; in a text file the line).
        ImportError: a Parquet file without pyarrow, a tokenizer without transformers.
    """
    path, columns = Path(path), columns or Columns()
    selection = Selection(columns, tokenizer=tokenizer is not None)
    files, others = files_of(path)
    found = _read(files, selection, tokenizer)
    if not found or not len(found[next(iter(found))]):
        raise RolloutError(f"{path} has no rows")
    used = selection.used or {}
    sources = {
        kind: used.get(kind, "none, as asked")
        for kind in DEFAULTS
        if kind not in LENGTH_KINDS and (kind in used or getattr(columns, kind) == NONE)
    }
    lengths, source = _lengths(found, used, tokenizer)
    if not (lengths > 0).any():
        raise RolloutError(f"{path}: every response is empty")
    advantages, notes = found.get("advantage"), []
    if advantages is None and columns.advantage != NONE and {"reward", "group"} <= found.keys():
        advantages, alone = _group_advantages(found["reward"], found["group"], found.get("batch"))
        sources["advantage"] = "reward less the group's mean"
        if alone:
            notes.append(
                f"{alone:,} of {len(lengths):,} responses are the only one of their group "
                f"({used['group']!r}), so that their advantage is 0."
            )
    if others:
        notes.append(f"Not read in {path}: {', '.join(others)}.")
    if tokenizer is not None and "text" not in used:
        notes.append(f"--tokenizer is not used: the lengths are {source}.")
    return Rollouts(
        lengths,
        found.get("batch"),
        found.get("group"),
        found.get("reward"),
        advantages,
        found.get("norm"),
        {"length": source, **sources},
        selection.unused,
        tuple(notes),
    )


def _read(
    files: list[Path], selection: Selection, tokenizer: str | None
) -> dict[str, NDArray[Any]]:
    """The values of each kind that is used."""
    readers: dict[str, Callable[[Cells], NDArray[Any]]] = {
        "length": values.lengths,
        "tokens": values.token_counts,
        "batch": values.Ids(),
        "group": values.Ids(),
        "reward": values.rewards,
        "advantage": values.advantages,
        "norm": values.norms,
    }
    parts: dict[str, list[NDArray[Any]]] = defaultdict(list)
    for file in files:
        for block in read_blocks(file, selection):
            for kind, name in (selection.used or {}).items():
                if kind == "text" and kind not in readers:
                    readers[kind] = values.TextCounts(tokenizer or "")
                parts[kind].append(readers[kind](block.cells(kind, name)))
    return {kind: np.concatenate(parts.pop(kind)) for kind in list(parts)}


def _lengths(
    found: dict[str, NDArray[Any]], used: dict[str, str], tokenizer: str | None
) -> tuple[NDArray[np.float64], str]:
    """The lengths, and what they are."""
    kind = next(kind for kind in LENGTH_KINDS if kind in used)
    name = used[kind]
    source = {
        "length": name, "tokens": f"tokens in {name}", "text": f"{name}, counted by {tokenizer}"
    }[kind]  # fmt: skip
    return found[kind], source


def _group_advantages(
    rewards: NDArray[np.float64],
    groups: NDArray[np.int64],
    batches: NDArray[np.int64] | None,
) -> tuple[NDArray[np.float64], int]:
    """Rewards less the mean of their group in their batch; how many are alone in theirs."""
    key = groups if batches is None else groups + (groups.max() + 1) * batches
    ids = np.unique(key, return_inverse=True)[1].reshape(-1)
    sizes = np.bincount(ids)
    advantages = rewards - (np.bincount(ids, rewards) / sizes)[ids]
    # A mean leaves rounding where every reward of a group is the same: no advantage, not a small
    # one.
    low, high = np.full(len(sizes), np.inf), np.full(len(sizes), -np.inf)
    np.minimum.at(low, ids, rewards)
    np.maximum.at(high, ids, rewards)
    advantages[(low == high)[ids]] = 0.0
    return advantages, int((sizes == 1).sum())
