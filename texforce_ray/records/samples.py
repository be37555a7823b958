"""One parquet file per iteration: what was sampled and how it scored."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from texforce_ray.errors import RunDirectoryError
from texforce_ray.files import atomic_write_bytes

Column = NDArray[Any] | list[Any]


def samples_path(run_dir: Path, iteration: int) -> Path:
    """Return the path of the samples of `iteration`, e.g. `samples/iteration-00012.parquet`."""
    return Path(run_dir) / "samples" / f"iteration-{iteration:05d}.parquet"


def write_samples(run_dir: Path, iteration: int, columns: Mapping[str, Column]) -> Path:
    """Write the samples of one iteration and return the file's path.

    Equal columns give equal bytes (with the same pyarrow), so two runs can be compared file by
    file.

    Args:
        run_dir: the run directory.
        iteration: names the file; a file of the same iteration is replaced.
        columns: one entry per sample in each; written in this order. Arrays `[B]` keep their
            dtype and NaN stays NaN; an array `[B,...]` becomes a column of lists.

    Raises:
        RunDirectoryError: the file could not be written.
        ValueError: the columns differ in length.
    """
    path = samples_path(run_dir, iteration)
    atomic_write_bytes(path, to_parquet(columns))
    return path


def to_parquet(columns: Mapping[str, Column]) -> bytes:
    """The bytes of a parquet file with these columns; equal columns give equal bytes.

    Raises:
        ValueError: the columns differ in length.
    """
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"sample columns must have the same length, got {lengths}")
    table = pa.table({name: _arrow(column) for name, column in columns.items()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_samples(path: Path) -> dict[str, list[Any]]:
    """Return the columns of a file that `write_samples` wrote, in their order.

    Raises:
        RunDirectoryError: the file is missing or is not parquet.
    """
    try:
        table = pq.read_table(io.BytesIO(Path(path).read_bytes()))
        return {name: table.column(name).to_pylist() for name in table.column_names}
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RunDirectoryError(
            f"cannot read samples from {path}: {error}; give a file from the run's samples/ folder"
        ) from error


def _arrow(column: Column) -> Any:
    if isinstance(column, np.ndarray) and column.ndim > 1:
        return pa.array(column.tolist())
    return pa.array(column)
