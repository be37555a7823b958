"""Reads configurations, explains what is wrong with them, writes them resolved."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from texforce_ray.config import Config, field_paths
from texforce_ray.errors import ConfigError
from texforce_ray.overrides import apply_overrides, apply_plain, escaped
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

    A `path` where there is no file may name a shipped config: 'shapes', 'paper/table3-unet'.

    Args:
        path: the file.
        overrides: as on a command line; `texforce_ray.overrides` says how they are read.
        base: plain data under the file's.
        plain: values by dotted key that win over all others and pass no parser, such as a path
            from the command line.
        stored: the file is the config.yaml of a run, perhaps somebody else's. Runs write it
            resolved, so interpolations such as `${oc.env:HOME}` are refused.

    Raises:
        ConfigError: naming every wrong key, what it got, and what would be right.
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
            tree = OmegaConf.merge(tree, _loaded(path, stored))
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
        # OmegaConf lets some of Python's own errors through, e.g. for `seed=0x_`; its own for a
        # file that holds a bare value is an OSError.
        raise ConfigError(
            f"cannot read config {path or ''} {' '.join(overrides)}: {error}"
        ) from None


def _loaded(path: Path, stored: bool) -> Any:
    from omegaconf import OmegaConf

    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist{_similar_configs(path)}")
    loaded = OmegaConf.load(path)
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{path} should hold a mapping of keys, as configs/shapes.yaml")
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
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem) for problem in _causes(error.errors())]
        raise ConfigError("\n".join(["the configuration is wrong:", *lines])) from None


def _causes(problems: Sequence[Any]) -> list[Any]:
    """Without complaints about a list whose entries are wrong: they follow from those."""
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
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"  {key}: unknown key{_did_you_mean(key)}"
    if not key:
        return f"  {message}"
    got = problem["input"]
    shown = "" if isinstance(got, dict | list) else f" (got {got!r})"
    return f"  {key}: {message}{shown}"


def _did_you_mean(key: str) -> str:
    import difflib

    parts = key.split(".")
    plain = ".".join(part for part in parts if not part.isdigit())
    known = [".".join(path) for path in field_paths(Config)]
    # A field without its section: of those of its name, the first.
    close = [k for k in known if len(parts) == 1 and k.rpartition(".")[2] == plain][:1]
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
    """The folder of shipped configs: in a wheel inside the package, in a checkout beside it."""
    package = Path(__file__).parent
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
    found = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
    if found:
        return f"; {folder} holds {', '.join(found)}"
    names = sorted(str(p.relative_to(shipped_configs())) for p in shipped_configs().rglob("*.yaml"))
    return f"; shipped are {', '.join(name.removesuffix('.yaml') for name in names)}"


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

    # OmegaConf's own writer: PyYAML leaves texts such as 7e1234 bare, which OmegaConf reads as a
    # number, and a commit's hash may look like that.
    return OmegaConf.to_yaml(OmegaConf.create(escaped(config.model_dump(mode="json"))))
