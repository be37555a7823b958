"""Paths given by users, and weighted paths on command lines. Imports nothing heavy."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from texforce_ray.errors import ConfigError

# `Path` turns s3://b/x into s3:/b/x, a folder "s3:" in the working directory.
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def check_local(text: str | Path, key: str) -> None:
    """Reject a URI where a local path is needed.

    Args:
        text: what was given.
        key: the config key or argument, for the message.

    Raises:
        ConfigError: it begins with a scheme, such as s3:// or file://, or is not a possible file
            name.
    """
    if "\0" in str(text) or re.search("[\ud800-\udfff]", str(text)):
        raise ConfigError(f"{key}: {str(text)!r} contains characters that are not text; rename it")
    if not _URI.match(str(text)):
        return
    if str(text).lower().startswith("file:/"):
        raise ConfigError(f"{key}: {str(text)!r} is a URI; give the path itself, like /data/x")
    raise ConfigError(
        f"{key}: {str(text)!r} is a URI, but only local paths are supported; mount the storage "
        "(s3fs, gcsfuse, NFS, a cluster's volume) and give its path, or copy the files from or to "
        "a local folder"
    )


def local_path(text: str) -> Path:
    """The type of path arguments: `argparse` adds the argument's name to the error."""
    try:
        check_local(text, "")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from None
    return Path(text)


def weighted(text: str) -> tuple[float, Path]:
    """The weight and the path of `DIR*0.5`; without a weight, it is 1.

    A text that is an existing path is taken whole, whatever it contains.

    Raises:
        ConfigError: what follows the last `*` is not a number.
    """
    if os.path.exists(text):  # not Path.exists: it raises for names that are too long
        return 1.0, Path(text)
    if re.fullmatch(r".+=[-+.\d]+(e[-+]?\d+)?", text):
        raise ConfigError(f"{text!r} does not exist; a weight is written after a star: 'DIR*0.5'")
    path, star, weight = text.rpartition("*")
    try:
        return (float(weight), Path(path)) if star else (1.0, Path(text))
    except ValueError:
        raise ConfigError(
            f"{text!r} neither exists nor looks like DIR*0.5 (a path with '*' in its name is taken "
            "whole if it exists; with a weight, write PATH*1)"
        ) from None


def named(text: str) -> tuple[str, Path]:
    """Name ('' if there is none) and path of `[NAME=]DIR`."""
    name, equals, path = text.partition("=")
    if os.path.exists(text) or not equals or "/" in name:
        return "", Path(text)
    return name, Path(path)


def weighted_sum(text: str) -> list[tuple[float, Path]]:
    """Weights and paths of `DIR*W+DIR`, split so that each path exists: paths may contain `+`.

    Raises:
        ConfigError: there is more than one way to split it, or a term is not valid.
    """
    pieces = text.split("+")
    ways = _splits(pieces)
    if len(ways) > 1:
        shown = " or ".join(" and ".join(terms) for terms in ways[:2])
        raise ConfigError(f"--fuse: {text!r} can be read as {shown}; rename or link a folder")
    terms = ways[0] if ways else pieces
    return [weighted(term) for term in terms]


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
        return os.path.exists(weighted(term)[1])
    except ConfigError:
        return False
