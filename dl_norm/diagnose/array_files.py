"""Rows of files of arrays: Parquet in batches, NPY and NPZ."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .columns import Block, RolloutError, Selection

INSTALL = "pip install 'dl-norm[diagnose]'"
BATCH_ROWS = 16384


def read_parquet(path: Path, selection: Selection) -> Iterator[Block]:
    """Blocks of the columns that are used; others are not read."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"{path}: reading Parquet needs pyarrow: {INSTALL}") from error
    try:
        with pq.ParquetFile(path) as file:
            used = selection.see(file.schema_arrow.names, str(path))
            names = sorted(set(used.values()))
            first = 1
            for batch in file.iter_batches(BATCH_ROWS, columns=names):
                columns = {
                    name: _parquet_values(batch.column(name), name == used.get("tokens"))
                    for name in names
                }
                yield Block(columns, _rows(path, first))
                first += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise RolloutError(f"{path}: not a Parquet file: {error}") from None


def _parquet_values(column: Any, tokens: bool) -> Any:
    """A numpy array where there is one for it; of lists of tokens their lengths."""
    import pyarrow as pa

    kind = column.type
    if column.null_count == 0:
        if tokens and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            if not pa.types.is_nested(kind.value_type):
                return column.value_lengths().to_numpy(zero_copy_only=False)
        elif any(is_kind(kind) for is_kind in (pa.types.is_integer, pa.types.is_floating)):
            return column.to_numpy(zero_copy_only=False)
    return column.to_pylist()


def read_numpy(path: Path, selection: Selection) -> Iterator[Block]:
    """One block of an NPY file of (N,) or (batches, N) lengths or named fields, or of an NPZ file
    of named (N,) arrays."""
    columns: dict[str, Any]
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            columns = _columns_of_array(content, path)
            used = set(selection.see(list(columns), str(path)).values())
        else:
            with content:
                used = set(selection.see(content.files, str(path)).values())
                columns = {name: content[name] for name in used}
    except RolloutError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise RolloutError(f"{path}: not an NPY or NPZ file of numbers: {error}") from None
    columns = {name: columns[name] for name in used}
    for name, values in columns.items():
        if values.ndim != 1:
            raise RolloutError(f"{path}: expected (N,) values in {name!r}, got {values.shape}")
    sizes = {name: len(values) for name, values in columns.items()}
    if len(set(sizes.values())) > 1:
        raise RolloutError(f"{path}: arrays of different lengths: {sizes}")
    yield Block(columns, _rows(path, 1))


def _columns_of_array(array: NDArray[Any], path: Path) -> dict[str, NDArray[Any]]:
    if array.dtype.names:
        return {name: array.reshape(-1)[name] for name in array.dtype.names}
    if array.ndim == 1:
        return {"length": array}
    if array.ndim == 2:
        batch = np.repeat(np.arange(array.shape[0]), array.shape[1])
        return {"length": array.reshape(-1), "batch": batch}
    raise RolloutError(
        f"{path}: expected (N,) or (batches, N) lengths, got an array of shape {array.shape}"
    )


def _rows(path: Path, first: int) -> Callable[[int], str]:
    return lambda row: f"{path}, row {first + row}"
