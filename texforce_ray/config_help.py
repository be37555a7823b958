"""Every key of the configuration with its type, default and meaning: `run --help-config`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from texforce_ray.config import Config


def describe() -> str:
    """One block of lines for each section; [placement] marks keys that may change on resume."""
    lines = ["Keys of the configuration; [placement]: may differ when a run is resumed.", ""]
    for key, field, section in _fields(Config, ""):
        if section is not None:
            lines += ["", f"{key}: {field.description}"]
            continue
        extra = field.json_schema_extra
        mark = " [placement]" if isinstance(extra, dict) and extra.get("placement") else ""
        lines.append(f"  {key} = {_default(field)}{mark}")
        lines.append(f"      {field.description}")
    return "\n".join(lines)


def _fields(
    model: type[BaseModel], prefix: str
) -> Iterator[tuple[str, FieldInfo, type[BaseModel] | None]]:
    """Plain fields first, then sections with theirs."""
    sections = []
    for name, field in model.model_fields.items():
        if (section := _section(field)) is None:
            yield prefix + name, field, None
        else:
            sections.append((prefix + name, field, section))
    for key, field, section in sections:
        listed = not isinstance(field.annotation, type) and "tuple" in str(field.annotation)
        yield key, field, section
        yield from _fields(section, f"{key}.0." if listed else f"{key}.")


def _section(field: FieldInfo) -> type[BaseModel] | None:
    for part in (field.annotation, *get_args(field.annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "(required)"
    return json.dumps(value)
