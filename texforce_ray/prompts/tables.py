"""Prompts in tables: Parquet files, folders of them, and Hugging Face data sets (an extra)."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from texforce_ray.errors import PromptError
from texforce_ray.prompts.records import Item

log = logging.getLogger(__name__)

_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")  # of Dataset.save_to_disk
_NUMBER = re.compile(r"[-_.]?\d+([-_]of[-_]\d+)?$")


def read_parquet(file: Path, column: str) -> list[Item]:
    """Rows as mappings, without columns of bytes.

    Raises:
        ValueError: not a Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Not opened by path: `read_table` would read a=b in a folder's name as a column.
        with pq.ParquetFile(file) as parquet:
            kept, dropped = _chosen(parquet.schema_arrow, column)
            table = parquet.read(columns=kept)
        _warn_dropped(str(file), dropped)
        return _rows(table)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from None


def _chosen(schema: Any, column: str) -> tuple[list[str], list[str]]:
    """Columns to read, and columns of bytes to leave out."""
    if len(set(schema.names)) < len(schema.names):
        raise ValueError("two of its columns have the same name")
    dropped = [f.name for f in schema if f.name != column and _binary(f.type)]
    return [name for name in schema.names if name not in dropped], dropped


def _rows(table: Any) -> list[Item]:
    import pyarrow as pa

    for position, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            # Python's times have no nanoseconds.
            exact = pa.timestamp("us", field.type.tz)
            cast = table.column(position).cast(exact, safe=False)
            table = table.set_column(position, field.name, cast)
    return [(f"row {index}", row) for index, row in enumerate(table.to_pylist())]


def _binary(kind: Any) -> bool:
    """Whether a column holds bytes, such as images; also inside structs and lists."""
    import pyarrow as pa

    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    if pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind):
        return True
    if isinstance(kind, pa.BaseExtensionType):
        return _binary(kind.storage_type)
    if pa.types.is_dictionary(kind) or _listed(kind):
        return _binary(kind.value_type)
    if pa.types.is_map(kind):
        return _binary(kind.item_type)
    return pa.types.is_struct(kind) and any(_binary(field.type) for field in kind)


def _listed(kind: Any) -> bool:
    import pyarrow as pa

    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _warn_dropped(name: str, columns: list[str]) -> None:
    if columns:
        log.warning(
            "prompts of %s: columns of bytes are left out and not passed to rewards: %s",
            name,
            ", ".join(columns),
        )


def read_folder(folder: Path, column: str, split: str | None) -> list[Item]:
    """A saved data set, or all Parquet files of a folder in the order of their names.

    Raises:
        PromptError: neither; or several splits and no choice of one.
        ValueError, OSError: a damaged file.
    """
    if any((folder / name).is_file() for name in _SAVED):
        return read_dataset(str(folder), column, split, None, None)
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.parquet")):
        splits.setdefault(_NUMBER.sub("", file.stem), []).append(file)
    if not splits:
        raise PromptError(
            f"prompt folder {folder} holds no .parquet files and no saved data set; give a file, "
            "or a folder that holds one of these"
        )
    files = splits[_split(str(folder), list(splits), split)]
    items: list[Item] = []
    for file in files:
        items += [(f"{file.name}, {where}", row) for where, row in read_parquet(file, column)]
    return items


def _split(name: str, there: list[str], wanted: str | None) -> str:
    if wanted is None and len(there) == 1:
        return there[0]
    if there == [""]:
        raise PromptError(f"prompts of {name}: its files name no splits; remove 'split'")
    if wanted not in there:
        what = f"has no split {wanted!r}" if wanted is not None else "has several splits"
        raise PromptError(f"prompts of {name}: it {what}; set 'split' to one of {', '.join(there)}")
    return wanted


def read_dataset(
    name: str, column: str, split: str | None, subset: str | None, revision: str | None
) -> list[Item]:
    """A data set from the Hugging Face hub or a folder: saved, or one that `datasets` loads.

    Raises:
        PromptError: the extra is missing; no such data set, subset or split.
    """
    try:
        import datasets
    except ImportError:
        raise PromptError(
            f"prompts.dataset: {name!r} needs a package that is not installed here: "
            "pip install 'texforce-ray[datasets]'"
        ) from None
    folder = Path(name).expanduser()
    saved = any((folder / file).is_file() for file in _SAVED)
    try:
        if saved:
            loaded = datasets.load_from_disk(str(folder))
        else:
            where = str(folder) if folder.is_dir() else name
            loaded = datasets.load_dataset(where, subset, revision=revision)
    except Exception as error:  # many kinds: its own and those of its file systems
        raise PromptError(f"prompts.dataset: {name!r} cannot be loaded: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[_split(name, list(loaded), split)]
    elif split is not None and str(loaded.split) != split:
        raise PromptError(f"prompts.dataset: {name!r} has no splits; remove 'split'")
    _, dropped = _chosen(loaded.features.arrow_schema, column)
    _warn_dropped(name, dropped)
    return _rows(loaded.remove_columns(dropped).with_format("arrow")[:])
