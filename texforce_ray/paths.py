"""Paths that a user gives, and weighted paths in command lines. Imports nothing heavy."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from texforce_ray.errors import ConfigError

# `Path` turns s3://b/x into s3:/b/x, a folder "s3:" in the working directory.
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def check_local(text: str | Path, key: str) -> None:
    """Refuse a URI where a path of this machine is needed.

    Args:
        text: what was given.
        key: the config key or argument, for the message.

    Raises:
        ConfigError: it begins with a scheme, such as s3:// or file://, or no file can have this
            name.
    """
    if "\0" in str(text) or re.search("[\ud800-\udfff]", str(text)):
        raise ConfigError(f"{key}: {str(text)!r} holds characters that are not text; rename it")
    if not _URI.match(str(text)):
        return
    if str(text).lower().startswith("file:/"):
        raise ConfigError(f"{key}: {str(text)!r} is a URI; give the path itself, /data/x")
    raise ConfigError(
        f"{key}: {str(text)!r} is a URI, and only paths are read and written here; mount the "
        "storage (s3fs, gcsfuse, NFS, a cluster's volume) and give the path, or copy it from or "
        "to a local folder"
    )


def local_path(text: str) -> Path:
    """The type of path arguments: `argparse` adds the argument's name to the error."""
    try:
        check_local(text, "")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from None
    return Path(text)


def weighted(text: str, mark: str, example: str) -> tuple[Path, float]:
    """A path with an optional weight behind it: `DIR*0.5` or `DIR=0.5`.

    A text that is the path of something that exists is taken whole, whatever it holds.

    Args:
        mark: what stands between path and weight.
        example: for the message.

    Raises:
        ConfigError: what follows the mark is no number.
    """
    if os.path.exists(text):  # not Path.exists: it raises for names that are too long
        return Path(text), 1.0
    path, found, weight = text.rpartition(mark)
    try:
        return (Path(path), float(weight)) if found else (Path(text), 1.0)
    except ValueError:
        raise ConfigError(
            f"{text!r} neither exists nor looks like {example} (a path with {mark!r} in its name "
            f"is taken whole if it exists; with a weight, write PATH{mark}1)"
        ) from None


def named(text: str) -> tuple[str, Path]:
    """Name ('' without one) and path of `[NAME=]DIR`."""
    name, equals, path = text.partition("=")
    if os.path.exists(text) or not equals or "/" in name:
        return "", Path(text)
    return name, Path(path)


def weighted_sum(text: str) -> list[tuple[float, Path]]:
    """Weights and paths of `DIR*W+DIR`, split where each path exists: paths may hold `+` too.

    Raises:
        ConfigError: more than one way to split it, or a term that is none.
    """
    pieces = text.split("+")
    ways = _splits(pieces)
    if len(ways) > 1:
        shown = " or ".join(" and ".join(terms) for terms in ways[:2])
        raise ConfigError(f"--fuse: {text!r} can be read as {shown}; rename or link a folder")
    terms = ways[0] if ways else pieces
    return [(weight, path) for path, weight in (weighted(t, "*", "DIR*0.5") for t in terms)]


def _splits(pieces: list[str]) -> list[list[str]]:
    """All ways to join neighbouring pieces into terms whose paths exist."""
    if not pieces:
        return [[]]
    ways = []
    for count in range(1, len(pieces) + 1):
        term = "+".join(pieces[:count])
        if _exists(term):
            ways += [[term, *rest] for rest in _splits(pieces[count:])]
    return ways


def _exists(term: str) -> bool:
    try:
        return os.path.exists(weighted(term, "*", "DIR*0.5")[0])
    except ConfigError:
        return False
