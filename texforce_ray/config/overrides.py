"""What `key.sub=value` on a command line means: text fields keep text, the rest is YAML.

| the key's field | value |
| --- | --- |
| text | taken literally: `#`, `: ` and commas are ordinary characters |
| list of texts | `[a, b]`, whose entries are texts |
| all others | a number, true, false, null, `[...]` or `{...}` as in YAML; else text |

In all of them, quotes are removed from a quoted value, `null` (or nothing) is null, and `${...}` is
OmegaConf's interpolation as in a file; `\\${` is the text `${`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from texforce_ray.config import Config
from texforce_ray.errors import ConfigError

Kind = Literal["text", "texts", "other"]
_NULL = ("", "null", "Null", "NULL", "None", "~")


def apply_overrides(tree: Any, overrides: Sequence[str]) -> None:
    """Apply overrides to an OmegaConf tree, in their order.

    Another `objective.kind` takes effect first and drops the keys of the kind before it.

    Raises:
        ConfigError: not of the form key.sub=value, or a list has no such entry.
        yaml.YAMLError, ValueError: a value in brackets or quotes is not YAML.
    """
    for override in sorted(overrides, key=lambda text: not text.startswith("objective.kind=")):
        if "=" not in override or override.startswith("-"):
            raise ConfigError(f"override {override!r} should look like key.sub=value")
        key, _, text = override.partition("=")
        if "[" in key or "]" in key:
            raise ConfigError(
                f"override {override!r}: write entries of lists as rewards.0.weight=2"
            )
        value = parse_value(text, kind_of(key.split(".")))
        kind = value.get("kind") if isinstance(value, dict) else value
        if key in ("objective", "objective.kind") and kind is not None:
            drop_other_kind(tree, kind)
        _set(tree, key, value, override)


def drop_other_kind(tree: Any, kind: Any) -> None:
    """Remove an objective of another kind from an OmegaConf tree."""
    from omegaconf import DictConfig

    node = tree.get("objective")
    if isinstance(node, DictConfig) and node.get("kind", "ppo") != kind:
        del tree["objective"]


def apply_plain(tree: Any, values: Mapping[str, Any]) -> None:
    """Set values in an OmegaConf tree without parsing them, such as paths."""
    for key, value in values.items():
        _set(tree, key, escaped(value), key)


def _set(tree: Any, key: str, value: Any, override: str) -> None:
    from omegaconf import DictConfig, ListConfig, OmegaConf

    node, parts = tree, key.split(".")
    for position, part in enumerate(parts):
        if isinstance(node, ListConfig):
            name = ".".join(parts[:position])
            if not part.isdecimal() or int(part) >= len(node):
                raise ConfigError(
                    f"override {override!r}: {name} has {len(node)} entries, counted from 0"
                )
            node = node._get_node(int(part))
        elif isinstance(node, DictConfig) and not node._is_none():
            node = node._get_node(part)
        else:
            break
    OmegaConf.update(tree, key, value, merge=True)


def parse_value(text: str, kind: Kind) -> Any:
    """An override's value; see the module's docstring.

    Raises:
        yaml.YAMLError, ValueError: brackets or quotes are not YAML.
    """
    text = text.strip()
    if text in _NULL:
        return None
    quoted = _quoted(text)
    if quoted is not None:
        return quoted
    if kind == "text":
        return text
    if text[0] in "[{":
        return _flow(text, kind)
    return text if kind == "texts" else _scalar(text)


def _quoted(text: str) -> str | None:
    """The text inside quotes that enclose all of it; None if there are none."""
    import yaml

    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None  # such as "a" and "b"
    if isinstance(node, yaml.ScalarNode) and node.end_mark.index == len(text):
        return str(node.value)
    return None


def _flow(text: str, kind: Kind) -> Any:
    import yaml

    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is None or node.end_mark.index != len(text):
        raise ValueError(f"{text!r}: unexpected text after the closing bracket")
    return yaml.load(text, Loader=yaml.BaseLoader) if kind == "texts" else _omega(text)


def _scalar(text: str) -> Any:
    """A number or a truth value if YAML reads the whole text as one, else the text."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return text
    if isinstance(node, yaml.ScalarNode) and node.style is None and node.value == text:
        return _omega(text) if not text.startswith("!") else text
    return text  # YAML would cut part of it off or read it as structure


def _omega(text: str) -> Any:
    """As OmegaConf reads it: 1e-4 is a number; interpolations are resolved later, in the tree."""
    from omegaconf import OmegaConf

    parsed = OmegaConf.from_dotlist([f"value={text}"])
    return OmegaConf.to_container(parsed, resolve=False)["value"]


def escaped(value: Any) -> Any:
    """Escape plain data, so that OmegaConf takes its texts literally."""
    import re

    if isinstance(value, Mapping):
        return {key: escaped(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(entry) for entry in value]
    if not isinstance(value, str):
        return value
    # Backslashes are doubled only before an interpolation: elsewhere they are plain text.
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)


def kind_of(parts: Sequence[str], section: Any = Config) -> Kind:
    """What the field at a dotted path holds; 'other' if there is no such field."""
    if not parts:
        return _kind(section)
    found: set[Kind] = set()
    for option in _options(section):
        if isinstance(option, type) and issubclass(option, BaseModel):
            field = option.model_fields.get(parts[0])
            if field is not None:
                found.add(kind_of(parts[1:], field.annotation))
        elif get_origin(option) is tuple and parts[0].isdecimal():
            found.add(kind_of(parts[1:], get_args(option)[0]))
    return found.pop() if len(found) == 1 else "other"


def _kind(annotation: Any) -> Kind:
    options = [option for option in _options(annotation) if option is not type(None)]
    if options == [str]:
        return "text"
    if len(options) == 1 and get_origin(options[0]) is tuple:
        inner = get_args(options[0])
        return "texts" if inner == (str, ...) else "other"
    return "other"


def _options(annotation: Any) -> Iterator[Any]:
    """The members of a union, without `Annotated`."""
    import types

    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _options(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _options(part)
    else:
        yield annotation
