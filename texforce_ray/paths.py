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
