"""Every key of the configuration with its type, default and meaning.

`run --help-config` prints the plain list; `python -m texforce_ray.config_help --markdown` the page
of the documentation. Both walk the types: nothing is listed by hand.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from texforce_ray.config import Config

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥"}
_INTRODUCTION = """\
# Configuration reference

Every key, from the types that check it. Values come from a YAML file and from `key.sub=value` on
the command line; entries of lists are counted from 0 (`rewards.0.weight=2`). Where the type is
text, the value is taken as it stands, `#` and `: ` included; elsewhere it is a number, true, false,
null, or `[...]` and `{...}` as in YAML. `null` is null everywhere, `'null'` the text.
`${oc.env:NAME}` is an environment variable, as in a file; `\\${` is the text `${`. Unknown keys and
impossible combinations are refused before anything starts. A run's `config.yaml` holds all keys,
resolved.

**On resume** says whether a key may differ from the run's own when it is continued:

| mark | meaning |
| --- | --- |
| free | says where and how things run, and changes no result |
| recorded | changes the result, may be changed all the same; the change is stored with the run |
| fixed | changes the result: must be as it was |
"""


def describe() -> str:
    """One block of lines for each section; [placement] marks keys that may change on resume."""
    lines = ["Keys of the configuration; [placement]: may differ when a run is resumed.", ""]
    for key, field, section in _fields(Config, ""):
        if section is not None:
            lines += ["", f"{key}: {field.description}"]
            continue
        mark = " [placement]" if _marked(field, "placement") else ""
        lines.append(f"  {key} = {_default(field)}{mark}")
        lines.append(f"      {field.description}")
    return "\n".join(lines)


def markdown() -> str:
    """The reference page: each section's docstring, and a table of its keys."""
    lines = [_INTRODUCTION, "## Top level", ""]
    free: tuple[str, ...] = ()  # sections that are marked as a whole
    header = True
    for key, field, section in _fields(Config, ""):
        if section is not None:
            lines += ["", f"## {key}", "", _about(field, section), ""]
            free += (f"{key}.",) if _marked(field, "placement") else ()
            header = True
            continue
        if header:
            lines += _HEADER
            header = False
        cells = (
            f"`{key}`",
            _type(field),
            _code(_default(field)),
            "free" if key.startswith(free) else _on_resume(field),
            field.description or "",
        )
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _about(field: FieldInfo, section: type[BaseModel]) -> str:
    about = inspect.cleandoc(section.__doc__ or "")
    if _is_list(field):
        return f"{about} A list of them."
    return f"{about} Left out unless given." if field.default is None else about


_HEADER = ("| key | type | default | on resume | meaning |", "| --- | --- | --- | --- | --- |")


def _cell(text: str) -> str:
    """Bars would end the cell; angle brackets would be HTML outside of code."""
    text = text.replace("\n", " ").replace("|", r"\|")
    return text if text.startswith("`") else text.replace("<", "&lt;")


def _code(text: str) -> str:
    return text if text == "(required)" else f"`{text}`"


def _marked(field: FieldInfo, mark: str) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(mark))


def _on_resume(field: FieldInfo) -> str:
    if _marked(field, "placement"):
        return "free"
    return "recorded" if _marked(field, "safe") else "fixed"


def _type(field: FieldInfo) -> str:
    """What a user may write, e.g. "int, ≥ 1, or null"."""
    name = _type_name(field.annotation)
    if any(isinstance(entry, BeforeValidator) for entry in field.metadata) and name == "int":
        name = "int or 'auto'"
    bounds = [
        f"{sign} {getattr(entry, attribute):g}"
        for entry in field.metadata
        for attribute, sign in _BOUNDS.items()
        if getattr(entry, attribute, None) is not None
    ]
    base, null, _ = name.partition(" or null")
    return ", ".join([base, *bounds, *([null.strip()] if null else [])])


def _type_name(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in inner).replace('"', "'")
    if origin in (Union, types.UnionType):
        parts = [_type_name(part) for part in inner]
        return " or ".join(sorted(parts, key=lambda part: part == "null"))
    if origin is tuple:
        entries = ", ".join(_type_name(part) for part in inner if part is not Ellipsis)
        return f"list of {entries}" if inner[-1] is Ellipsis else f"[{entries}]"
    if origin is Annotated:  # its own bounds are left to the check
        return _type_name(inner[0])
    name = getattr(origin or annotation, "__name__", str(annotation))
    return {"str": "text", "dict": "mapping", "NoneType": "null"}.get(name, name)


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
        yield key, field, section
        yield from _fields(section, f"{key}.0." if _is_list(field) else f"{key}.")


def _is_list(field: FieldInfo) -> bool:
    return not isinstance(field.annotation, type) and "tuple" in str(field.annotation)


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


def main(arguments: list[str] | None = None) -> int:
    """Print the list of keys; returns the exit code."""
    commands = argparse.ArgumentParser(prog="python -m texforce_ray.config_help")
    commands.add_argument("--markdown", action="store_true", help="as a page for the documentation")
    print(markdown() if commands.parse_args(arguments).markdown else describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
