"""Samples come back as written, and equal samples are equal files."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest

from texforce_ray.errors import RunDirectoryError
from texforce_ray.records.samples import read_samples, write_samples


def _columns() -> dict[str, object]:
    return {
        "prompt": ["a green circle", 'it\'s "quoted"\nand 日本語', ""],
        "seed": np.array([0, 2**63 + 5, 2**64 - 1], np.uint64),
        "version": [3, 3, 3],
        "shapes": np.array([0.25, math.nan, 1.0], np.float32),
        "masked": np.array([False, True, False]),
        "error": [None, "timed out", None],
        "boxes": np.arange(6).reshape(3, 2),
    }


def test_round_trip_keeps_order_and_values(tmp_path: Path) -> None:
    path = write_samples(tmp_path, 12, _columns())
    assert path == tmp_path / "samples" / "iteration-00012.parquet"
    back = read_samples(path)
    assert list(back) == list(_columns())
    assert back["prompt"] == _columns()["prompt"]
    assert back["seed"] == [0, 2**63 + 5, 2**64 - 1]
    # "Could not score" is NaN, which is not the same as 0 or a missing column.
    assert math.isnan(back["shapes"][1])
    assert back["error"] == [None, "timed out", None]
    assert back["boxes"] == [[0, 1], [2, 3], [4, 5]]


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    first = write_samples(tmp_path / "a", 1, _columns()).read_bytes()
    assert write_samples(tmp_path / "b", 1, _columns()).read_bytes() == first
    changed = _columns() | {"version": [3, 3, 4]}
    assert write_samples(tmp_path / "b", 1, changed).read_bytes() != first


def test_an_iteration_written_again_replaces_its_file(tmp_path: Path) -> None:
    write_samples(tmp_path, 1, {"seed": [1, 2]})
    path = write_samples(tmp_path, 1, {"seed": [3]})
    assert read_samples(path) == {"seed": [3]}
    assert os.listdir(path.parent) == [path.name]


def test_columns_of_different_length_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'seed': 2.*'prompt': 1"):
        write_samples(tmp_path, 0, {"seed": [1, 2], "prompt": ["a"]})
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("content", [None, b"", b"PAR1 but cut"])
def test_missing_or_damaged_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "iteration-00001.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"iteration-00001\.parquet"):
        read_samples(path)
