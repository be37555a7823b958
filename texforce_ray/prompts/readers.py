"""Prompt files: .txt, .json, .jsonl, .csv, .parquet."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from texforce_ray.errors import PromptError
from texforce_ray.records.files import from_json

Record = tuple[str, dict[str, Any]]


def read_records(path: str, column: str) -> list[Record]:
    """(text, other fields) of each non-empty prompt.

    .txt: a prompt per line. .json: a list of strings or of objects. .jsonl: a string or an object
    per line. Objects, .csv and .parquet hold the text in `column`.

    Raises:
        PromptError: naming the file, what is wrong with it, and what would be right.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise PromptError(f"prompt file {path} does not exist")
    readers = {
        ".txt": _txt,
        ".json": _json,
        ".jsonl": _jsonl,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    if file.suffix.lower() not in readers:
        raise PromptError(
            f"prompt file {path}: ending {file.suffix!r} is unknown; one of {', '.join(readers)}"
        )
    try:
        items = readers[file.suffix.lower()](file)
    except (OSError, ValueError, csv.Error) as error:
        raise PromptError(f"prompt file {path} cannot be read: {error}") from None
    records = [_record(item, column, path, i) for i, item in enumerate(items)]
    kept = [record for record in records if record[0]]
    if not kept:
        raise PromptError(f"prompt file {path} holds no prompts")
    return kept


def _record(item: Any, column: str, path: str, index: int) -> Record:
    if isinstance(item, str):
        return _text(item, path, index), {}
    if not isinstance(item, dict):
        raise PromptError(
            f"prompt file {path}, entry {index}: {type(item).__name__} is neither a text nor an "
            "object"
        )
    if column not in item:
        raise PromptError(
            f"prompt file {path}, entry {index}: no field {column!r}, only "
            f"{', '.join(map(str, item))}; set 'column' to the one that holds the text"
        )
    rest = {key: value for key, value in item.items() if key not in (column, None)}
    return _text(str(item[column] or ""), path, index), rest


def _text(text: str, path: str, index: int) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON's escapes can write what is no character
        raise PromptError(f"prompt file {path}, entry {index}: not valid text: {error}") from None
    return text.strip()


def _lines(file: Path) -> list[str]:
    # Not splitlines(): JSON texts may hold U+2028 and other characters that it splits at.
    return file.read_text(encoding="utf-8-sig").split("\n")


def _txt(file: Path) -> list[Any]:
    return [*_lines(file)]


def _json(file: Path) -> list[Any]:
    items = from_json(file.read_text(encoding="utf-8-sig"))
    if not isinstance(items, list):
        raise ValueError("it should hold a list of texts or objects")
    return items


def _jsonl(file: Path) -> list[Any]:
    return [from_json(line) for line in _lines(file) if line.strip()]


def _csv(file: Path) -> list[Any]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def _parquet(file: Path) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(file).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(str(error)) from None
