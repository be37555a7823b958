"""Every key of the configuration with its type, default and meaning.

`run --help-config` prints the plain list; `python -m texforce_ray.config_help --markdown` the page
of the documentation. Both walk the types: nothing is listed by hand.
"""

from __future__ import annotations

import argparse
import inspect
import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from texforce_ray.config import Config
from texforce_ray.config.fields import Key, marked, walk

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "length ≥"}
_INTRODUCTION = """\
# Configuration reference

All keys, generated from the types that check them. Values come from a YAML file and from
`key.sub=value` on the command line; list entries are counted from 0 (`rewards.0.weight=2`). If the
type is text, the value is taken literally, `#` and `: ` included; otherwise it is a number, true,
false, null, or `[...]` and `{...}` as in YAML. `null` always means null, `'null'` is the text.
`${oc.env:NAME}` is an environment variable, as in a file; `\\${` is the text `${`. Unknown keys and
impossible combinations are rejected before anything starts. A run's `config.yaml` holds all keys,
resolved.

**On resume** shows whether a key may differ from the run's own when the run is resumed:

| mark | meaning |
| --- | --- |
| free | only controls where and how things run; may differ |
| recorded | affects the result, but may still be changed; the change is stored with the run |
| fixed | affects the result; must stay the same |
"""


_LEGEND = """\
Keys of the configuration. When a run is resumed, only marked keys may differ:
[free]      does not affect the result
[recorded]  affects the result; the change is stored with the run
"""


def describe() -> str:
    """One block of lines for each section; marks show which keys may differ on resume."""
    lines = [_LEGEND]
    for item, on_resume in _keys():
        key, field, section = item.dotted, item.field, item.section
        if section is not None:
            lines += ["", f"{key}: {field.description}"]
            continue
        mark = "" if on_resume == "fixed" else f" [{on_resume}]"
        lines.append(f"  {key} = {_default(field)}{mark}")
        lines.append(f"      {field.description}")
    return "\n".join(lines)


def markdown() -> str:
    """The reference page: each section's docstring, and a table of its keys."""
    lines = [_INTRODUCTION, "## Top level", ""]
    header = True
    for item, on_resume in _keys():
        key, field, section = item.dotted, item.field, item.section
        if section is not None:
            lines += ["", f"## {key}", "", _about(item, section), ""]
            header = True
            continue
        if header:
            lines += _HEADER
            header = False
        cells = (
            f"`{key}`",
            _type(field),
            _code(_default(field)),
            on_resume,
            field.description or "",
        )
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _keys() -> Iterator[tuple[Key, str]]:
    """All keys, each with its mark: 'free', 'recorded' or 'fixed'."""
    free: tuple[str, ...] = ()  # sections that are marked as a whole
    for item in walk(Config):
        if item.section is not None and marked(item.field, "free"):
            free += (f"{item.dotted}.",)
        yield item, "free" if item.dotted.startswith(free) else _on_resume(item.field)


def _about(key: Key, section: type[BaseModel]) -> str:
    about = inspect.cleandoc(section.__doc__ or "")
    if key.many:
        return f"{about} A list of them."
    return f"{about} Unset by default." if key.field.default is None else about


_HEADER = ("| key | type | default | on resume | meaning |", "| --- | --- | --- | --- | --- |")


def _cell(text: str) -> str:
    """Bars would end the cell; angle brackets would be HTML outside of code."""
    text = text.replace("\n", " ").replace("|", r"\|")
    return text if text.startswith("`") else text.replace("<", "&lt;")


def _code(text: str) -> str:
    return text if text == "(required)" else f"`{text}`"


def _on_resume(field: FieldInfo) -> str:
    if marked(field, "free"):
        return "free"
    return "recorded" if marked(field, "recorded") else "fixed"


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
    if origin is Annotated:  # inner bounds are left to validation
        return _type_name(inner[0])
    name = getattr(origin or annotation, "__name__", str(annotation))
    return {"str": "text", "dict": "mapping", "NoneType": "null"}.get(name, name)


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
