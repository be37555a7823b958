"""Building blocks of all sections of the configuration: field markers, the closed section."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

DType: TypeAlias = Literal["float32", "float16", "bfloat16"]


def _auto(value: Any) -> Any:
    return 0 if value == "auto" else value


AutoSize: TypeAlias = Annotated[int, BeforeValidator(_auto)]  # 0: not yet resolved


def as_list(value: Any) -> Any:
    """For fields that are tuples: check a tuple as the list that a config file would hold."""
    return list(value) if isinstance(value, tuple) else value


def free(default: Any, description: str, **constraints: Any) -> Any:
    """A field that does not affect the result and may differ when a run is resumed."""
    return Field(default, description=description, json_schema_extra={"free": True}, **constraints)


def recorded(default: Any, description: str, **constraints: Any) -> Any:
    """A field that affects the result but may still be changed when a run is resumed.

    For runs that stopped because learning failed. The change is recorded with the run.
    """
    return Field(
        default, description=description, json_schema_extra={"recorded": True}, **constraints
    )


class Section(BaseModel):
    """A closed part of the configuration: an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


def marked(field: Any, mark: str) -> bool:
    """Whether a field was made with `free` or `recorded`, whose names are the marks."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(mark))


def fixed_values(section: BaseModel) -> dict[str, Any]:
    """Only the result-affecting fields of a section, as plain data."""
    kept: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        if marked(field, "free"):
            continue
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            value = fixed_values(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            value = [fixed_values(v) for v in value]
        kept[name] = value
    return json.loads(json.dumps(kept))


class Key(NamedTuple):
    """A field and its path: names from the root, with 0 for an entry of a list.

    section: the section that it holds, if any; there is one key for each that it may hold.
    many: whether it holds a list of them.
    """

    path: tuple[str, ...]
    field: FieldInfo
    section: type[BaseModel] | None
    many: bool

    @property
    def dotted(self) -> str:
        """The path as written in an override; in a list, that of the first entry."""
        return ".".join(self.path)

    @property
    def plain(self) -> str:
        """The path without indices."""
        return ".".join(part for part in self.path if not part.isdigit())


def walk(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[Key]:
    """All fields: plain ones first, then sections, each followed by its fields."""
    keys = []
    for name, field in model.model_fields.items():
        many = not isinstance(field.annotation, type) and "tuple" in str(field.annotation)
        sections: list[type[BaseModel] | None] = [*_sections(field.annotation)]
        keys += [Key((*prefix, name), field, s, many) for s in sections or [None]]
    yield from (key for key in keys if key.section is None)
    for key in keys:
        if key.section is not None:
            yield key
            yield from walk(key.section, (*key.path, "0") if key.many else key.path)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field may hold: none, one, or each member of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from _sections(part)
