"""Turns a file's entries into prompts: the text, and metadata that every reward accepts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from texforce_ray.errors import PromptError

Record = tuple[str, dict[str, Any]]
Item = tuple[str, Any]  # where it stands ("line 3"), and what was read there

_CHAT = {"role", "content"}


def record_of(item: Any, column: str, where: str) -> Record:
    """(text, other fields); the text is empty where there is none.

    Args:
        item: a text, or a mapping that holds one in `column`.
        where: file and place, for errors.

    Raises:
        PromptError: no such column; a prompt that is not text; metadata with no JSON form.
    """
    if not isinstance(item, dict):
        return text_of(item, where), {}
    if column not in item:
        raise PromptError(
            f"{where}: no field {column!r}, only {', '.join(map(str, item))}; set 'column' to the "
            "one that holds the text"
        )
    rest = {
        str(key): plain(value, f"{where}, field {key!r}")
        for key, value in item.items()
        if key != column
    }
    return text_of(item[column], f"{where}, field {column!r}"), rest


def text_of(value: Any, where: str) -> str:
    """A prompt's text; for a list of texts, the first one. Empty for null.

    Raises:
        PromptError: anything else.
    """
    if value is None:
        return ""
    if isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value):
        value = value[0] if value else ""  # several captions of one image
    if isinstance(value, bytes):  # text columns of some Parquet writers
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise PromptError(f"{where}: {_shown(value)} is not text") from None
    if not isinstance(value, str):
        raise PromptError(f"{where}: {_shown(value)} is not text{_advice(value)}")
    return _checked(value, where).strip()


def _advice(value: Any) -> str:
    first = value[0] if isinstance(value, list | tuple) and value else value
    if isinstance(first, Mapping):
        what = "a chat's messages" if first.keys() >= _CHAT else "an object"
        return f" but {what}; put the text alone into a field and name that field in 'column'"
    if isinstance(value, float) and math.isnan(value):
        return " but a missing value; remove the row, or use null to skip it"
    return ""


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _checked(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON escapes can encode lone surrogates
        raise PromptError(f"{where}: not valid text: {error}") from None
    return text


def plain(value: Any, where: str) -> Any:
    """Metadata as JSON types: dates as ISO text, decimals as numbers, NaN as null.

    Raises:
        PromptError: a value that has no such form.
    """
    if isinstance(value, Mapping):
        return {_checked(str(key), where): plain(entry, where) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry, where) for entry in value]
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        return _checked(value, where)
    if value is None or isinstance(value, bool | int):
        return value
    return _special(value, where)


def _special(value: Any, where: str) -> Any:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, UUID):
        return str(value)
    raise PromptError(
        f"{where}: {_shown(value)} cannot be stored as JSON; remove the column, or write it as text"
    )
