"""Reads configurations, explains what is wrong with them, writes them resolved."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from texforce_ray.config import Config
from texforce_ray.config.fields import walk
from texforce_ray.config.moved import moved_keys
from texforce_ray.config.overrides import apply_overrides, apply_plain, drop_other_kind, escaped
from texforce_ray.errors import ConfigError, MovedKeysError
from texforce_ray.paths import check_local


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
    plain: Mapping[str, Any] | None = None,
    *,
    stored: bool = False,
) -> Config:
    """Read a YAML file and dotted overrides (`key.sub=value`) into a checked `Config`.

    A `path` that does not exist may name a shipped config: 'shapes', 'paper/table3-unet'.

    Args:
        path: the file.
        overrides: as on a command line; `texforce_ray.config.overrides` defines how they are read.
        base: plain data that the file's values override.
        plain: values by dotted key that override all others and are not parsed, such as a path
            from the command line.
        stored: the file is the config.yaml of a run, perhaps somebody else's. Runs write it
            resolved, so interpolations such as `${oc.env:HOME}` are rejected.

    Raises:
        ConfigError: names every wrong key, what it got, and what would be right.
    """
    return make_config(_values(path, overrides, base or {}, plain or {}, stored))


def _values(
    path: str | Path | None,
    overrides: Sequence[str],
    base: Mapping[str, Any],
    plain: Mapping[str, Any],
    stored: bool,
) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        tree = OmegaConf.create(escaped(base))
        if path is not None:
            path = _found(path)
            loaded = _loaded(path, stored)
            objective = loaded.get("objective")
            if OmegaConf.is_dict(objective) and "kind" in objective:
                drop_other_kind(tree, objective.kind)
            tree = OmegaConf.merge(tree, loaded)
        apply_overrides(tree, overrides)
        apply_plain(tree, plain)
        return OmegaConf.to_container(tree, resolve=True)
    except (
        OmegaConfBaseException,
        YAMLError,
        LookupError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        # OmegaConf lets some of Python's own errors through, e.g. for `seed=0x_`; for a file that
        # holds a bare value, it raises OSError.
        raise ConfigError(
            f"cannot read config {path or ''} {' '.join(overrides)}: {error}"
        ) from None


def _loaded(path: Path, stored: bool) -> Any:
    from omegaconf import OmegaConf

    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist{_similar_configs(path)}")
    loaded = OmegaConf.load(path)
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{path} should hold a mapping of keys, like configs/shapes.yaml")
    if stored and (key := _interpolated(OmegaConf.to_container(loaded, resolve=False))) is not None:
        raise ConfigError(
            f"{path}: {key} holds an interpolation (${{...}}), which no run writes into "
            "its config.yaml; put the value itself there"
        )
    return loaded


def _interpolated(value: Any) -> str | None:
    """The dotted key of the first text that OmegaConf would resolve; None if there is none."""
    if isinstance(value, str):
        return "" if re.search(r"(?<!\\)(\\\\)*\$\{", value) else None
    if not isinstance(value, dict | list):
        return None
    for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
        if (found := _interpolated(entry)) is not None:
            return f"{name}.{found}".rstrip(".")
    return None


def make_config(values: Any) -> Config:
    """Check plain data; see `load_config` for errors."""
    if moved := moved_keys(values):
        lines = ["the configuration has keys of an earlier version:", *moved]
        raise MovedKeysError("\n".join(lines))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem) for problem in _causes(error.errors())]
        raise ConfigError("\n".join(["the configuration is invalid:", *lines])) from None


def _causes(problems: Sequence[Any]) -> list[Any]:
    """Drop complaints about a list whose entries are wrong: they only follow from those."""
    return [
        problem
        for problem in problems
        if problem["type"] != "too_short"
        or not any(
            other["loc"][: len(problem["loc"])] == problem["loc"]
            for other in problems
            if other is not problem
        )
    ]


def _explain(problem: Any) -> str:
    key = _key(problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        if key in {k.plain for k in walk(Config)}:  # of another member of a union
            return f"  {key}: not a key of {_key(problem['loc'][:1])} kind {problem['loc'][1]!r}"
        return f"  {key}: unknown key{_did_you_mean(key)}"
    if not key:
        return f"  {message}"
    got = problem["input"]
    shown = "" if isinstance(got, dict | list) else f" (got {got!r})"
    return f"  {key}: {message}{shown}"


# Of the members of unions; no key has such a name.
_TAGS = ("adapter", "same")


def _key(loc: Sequence[int | str]) -> str:
    """The dotted key of a problem, without pydantic's names for the members of a union."""
    names = {key.path[-1] for key in walk(Config)}
    *parents, last = loc or ("",)
    kept = [part for part in parents if isinstance(part, int) or part in names]
    if last not in _TAGS:
        kept.append(last)
    return ".".join(map(str, kept))


def _did_you_mean(key: str) -> str:
    import difflib

    parts = key.split(".")
    plain = ".".join(part for part in parts if not part.isdigit())
    known = [key.plain for key in walk(Config)]
    # A field without its section: the first of that name.
    close = [k for k in known if len(parts) == 1 and k.rpartition(".")[2] == plain][:1]
    close = close or difflib.get_close_matches(plain, known, n=1, cutoff=0.75)
    if not close:  # the right section, but a field further down
        near = [k for k in known if k.startswith(f"{parts[0]}.")]
        found = difflib.get_close_matches(
            parts[-1], [k.rpartition(".")[2] for k in near], cutoff=0.7
        )
        close = [k for k in near if found and k.rpartition(".")[2] == found[0]][:1]
    close = close or difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    if not close:
        close = [k for k in known if k.rpartition(".")[2] == parts[-1]][:1]
    if not close:
        return "; see --help-config for all keys"
    meant = close[0].split(".")
    for position, part in enumerate(parts):
        if part.isdigit() and meant[:position] == parts[:position]:
            meant.insert(position, part)
    return f"; did you mean {'.'.join(meant)}?"


def shipped_configs() -> Path:
    """The folder of shipped configs: in a wheel inside the package, in a checkout next to it."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _found(path: str | Path) -> Path:
    """The file, or the shipped config of that name: 'shapes', or 'configs/shapes.yaml' anywhere."""
    path = Path(path)
    if path.is_file() or path.is_absolute():
        return path
    shipped = shipped_configs() / path.relative_to("configs" if "configs" in path.parts[:1] else "")
    for candidate in (shipped, Path(f"{shipped}.yaml")):
        if candidate.is_file():
            return candidate
    return path


def _similar_configs(path: str | Path) -> str:
    folder = Path(path).parent
    similar = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
    if similar:
        return f"; {folder} holds {', '.join(similar)}"
    names = sorted(str(p.relative_to(shipped_configs())) for p in shipped_configs().rglob("*.yaml"))
    return f"; shipped configs: {', '.join(name.removesuffix('.yaml') for name in names)}"


def resolve_run_dir(config: Config, under_ray_job: bool | None = None) -> Config:
    """Fill in `{time}` and make the run directory absolute.

    Raises:
        ConfigError: a URI; or a relative path under `ray job submit`, where it would lie in Ray's
            temporary copy of the working directory and be deleted with it.
    """
    if under_ray_job is None:
        under_ray_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    check_local(config.run_dir, "run_dir")
    if not config.run_dir.strip():  # it would be the working directory
        raise ConfigError("run_dir: '' names no folder; give e.g. run_dir=runs/my-run")
    text = config.run_dir.replace("{time}", time.strftime("%Y%m%d-%H%M%S"))
    path = Path(text).expanduser()
    if not path.is_absolute() and under_ray_job:
        raise ConfigError(
            f"run_dir: {config.run_dir!r} is relative, and under `ray job submit` it would lie in "
            "Ray's temporary copy of the working directory; give an absolute path, e.g. "
            "run_dir=/data/runs/my-run"
        )
    return config.model_copy(update={"run_dir": str(path.absolute())})


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    from omegaconf import OmegaConf

    # OmegaConf's own writer: PyYAML does not quote texts such as 7e1234, which OmegaConf reads as a
    # number, and a commit's hash may look like that.
    return OmegaConf.to_yaml(OmegaConf.create(escaped(config.model_dump(mode="json"))))
