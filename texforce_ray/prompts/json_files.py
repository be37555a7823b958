"""Prompts in JSON, in the forms that data sets and pandas write."""

from __future__ import annotations

from typing import Any

from texforce_ray.files import from_json
from texforce_ray.prompts.records import Item

_FORMS = (
    "it should hold a list of texts or objects, such a list under one key, objects or texts by "
    "id, or columns"
)
_FIELDS = {"prompt", "text", "caption", "captions", "description", "url"}


def read_jsonl(text: str) -> list[Item]:
    """A text or an object per line.

    Raises:
        ValueError: a line is not JSON; names it.
    """
    items = []
    # Not splitlines(): texts may hold U+2028 and other characters on which it splits.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            items.append((f"line {number}", _parsed(line, number)))
    return items


def _parsed(line: str, number: int) -> Any:
    try:
        return from_json(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None


def read_json(text: str, column: str) -> list[Item]:
    """Any of the forms in `_FORMS`; also a .jsonl file that is named .json.

    Raises:
        ValueError: not JSON, or none of these forms.
    """
    try:
        whole = from_json(text)
    except ValueError:
        if _is_jsonl(text):
            return read_jsonl(text)
        raise
    if isinstance(whole, dict):
        return _from_object(whole, column)
    if not isinstance(whole, list):
        raise ValueError(_FORMS)
    return _entries(whole)


def _is_jsonl(text: str) -> bool:
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        return len(lines) > 1 and isinstance(from_json(lines[0]), dict | str)
    except ValueError:
        return False


def _entries(items: list[Any]) -> list[Item]:
    return [(f"entry {index}", item) for index, item in enumerate(items)]


def _from_object(whole: dict[str, Any], column: str) -> list[Item]:
    if isinstance(whole.get(column), dict | list):
        return _columns(whole)
    if column in whole:
        return [("entry 0", whole)]  # a .jsonl file of one line
    lists = [key for key, value in whole.items() if isinstance(value, list)]
    if lists:
        return _from_lists(whole, lists)
    return _by_id(whole, column)


def _from_lists(whole: dict[str, Any], lists: list[str]) -> list[Item]:
    """{"data": [...], "version": "1"}; also pandas' rows with a separate list of column names."""
    if "data" not in lists and len(lists) > 1:
        raise ValueError(f"it holds several lists ({', '.join(lists)}); {_FORMS}")
    rows = whole["data" if "data" in lists else lists[0]]
    names = whole.get("columns")
    if isinstance(names, list) and all(isinstance(row, list) for row in rows):
        rows = [dict(zip(names, row, strict=True)) for row in rows]
    return _entries(rows)


def _by_id(whole: dict[str, Any], column: str) -> list[Item]:
    values = list(whole.values())
    if values and all(isinstance(value, dict) for value in values):
        return [(f"entry {key!r}", {"id": key, **value}) for key, value in whole.items()]
    if values and all(isinstance(v, str) for v in values) and not _FIELDS & whole.keys():
        return [(f"entry {key!r}", {"id": key, column: value}) for key, value in whole.items()]
    raise ValueError(f"no {column!r} among its keys {', '.join(list(whole)[:8])}; {_FORMS}")


def _columns(whole: dict[str, Any]) -> list[Item]:
    """{"prompt": {"0": ..., "1": ...}, ...} or {"prompt": [...], ...}, as pandas writes them."""
    columns = {
        name: value if isinstance(value, dict) else dict(enumerate(value))
        for name, value in whole.items()
        if isinstance(value, dict | list)
    }
    rows = list(next(iter(columns.values())))
    for name, column in columns.items():
        if list(column) != rows:
            raise ValueError(
                f"its columns differ in their entries: {next(iter(columns))!r} has {len(rows)}, "
                f"{name!r} has {len(column)}"
            )
    return [
        (f"entry {row!r}", {name: column[row] for name, column in columns.items()}) for row in rows
    ]
