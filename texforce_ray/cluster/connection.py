"""Joins a Ray cluster or starts one; reports in advance what would prevent the start."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RuntimeEnvSetupError

import texforce_ray
from texforce_ray.cluster.environments import reward_environment
from texforce_ray.config import Config
from texforce_ray.errors import ResourceError

_OVERRIDE = "RAY_OVERRIDE_JOB_RUNTIME_ENV"
_SOCKET_BYTES = 107  # the longest path of a Unix socket on Linux


def address_of(config: Config) -> tuple[str | None, str]:
    """The cluster's address, None for a new local one, and the setting that it comes from."""
    address, variable = config.ray.address, os.environ.get("RAY_ADDRESS", "").strip()
    if variable and address in (None, "", "auto"):  # Ray itself prefers it to 'auto' too
        address, source = variable, "RAY_ADDRESS"
    else:
        source = "ray.address"
    return (None if address in (None, "", "local") else address), source


def connect(config: Config) -> bool:
    """Join a cluster or start one; True if one was started here.

    Raises:
        ResourceError: no cluster at the given address, or none can be started.
    """
    if ray.is_initialized():
        return False
    check_startable(config)
    address, source = address_of(config)
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    overrides = os.environ.get(_OVERRIDE)
    if any(reward_environment(reward) is not None for reward in config.rewards):
        # The rewards' own environments do not contain this package: upload it with the job.
        modules = _py_modules_of_job()
        if modules:
            os.environ[_OVERRIDE] = "1"  # Ray cannot merge two lists of modules
        ours = str(Path(texforce_ray.__file__).parent)
        options["runtime_env"] = {"py_modules": [*modules, ours]}
    # We report a failed call once; Ray would print it again for each of its other results.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # Authentication is on, as it should be; users need no warning about that.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    try:
        if address is None:
            _start(config, options)
            return True
        _join(address, source, options)
    except RuntimeEnvSetupError as error:
        raise ResourceError(f"Ray cannot set up the job's runtime environment: {error}") from None
    finally:
        _restore(_OVERRIDE, overrides)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    gcs = ray.get_runtime_context().gcs_address
    print(f"joined the Ray cluster at {gcs} ({len(nodes)} nodes)", file=sys.stderr)
    return False


@contextlib.contextmanager
def connected(config: Config) -> Iterator[None]:
    """Within the block, this process is in a cluster; one started here stops at its end.

    Raises:
        ResourceError: as `connect`.
    """
    started = connect(config)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _start(config: Config, options: dict[str, Any]) -> None:
    try:
        # "local": a bare ray.init() would silently join whatever runs on this machine.
        ray.init(address="local", include_dashboard=config.ray.dashboard, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ResourceError(f"Ray cannot start on this machine: {error}") from None


def _join(address: str, source: str, options: dict[str, Any]) -> None:
    try:
        _knock(address)
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError) as error:  # also for a malformed address
        unset = "unset it to start one on this machine; " if source == "RAY_ADDRESS" else ""
        raise ResourceError(
            f"{source}: no Ray cluster at {address!r}: {error}; {unset}if it needs a token, "
            "export RAY_AUTH_MODE=token"
        ) from None


def _knock(address: str) -> None:
    """Fail at once if nothing listens there: Ray itself would try for minutes.

    Raises:
        OSError: nothing does.
    """
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in address:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass


def _py_modules_of_job() -> list[Any]:
    """Modules that `ray job submit` was given for the whole job."""
    try:
        job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
        return list((job.get("runtime_env") or {}).get("py_modules") or [])
    except (ValueError, AttributeError, TypeError):
        return []  # Ray will report what is wrong with it


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def check_startable(config: Config) -> None:
    """Fail before Ray tries to start if it could not create its files.

    Raises:
        ResourceError: the path of its folder is too long, or the folder is not writable.
    """
    if ray.is_initialized() or address_of(config)[0] is not None:
        return
    name = next((n for n in ("RAY_TMPDIR", "TMPDIR") if n in os.environ), "RAY_TMPDIR")
    given = os.environ.get(name, "/tmp")
    advice = f"set it to a short, writable, absolute path: export {name}=/tmp/$USER"
    if not os.path.isabs(given):
        raise ResourceError(f"{name}: {given!r} is not an absolute path; {advice}")
    folder = os.path.join(given, "ray")
    session = f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    sockets = os.path.join(folder, session, "sockets", "plasma_store")
    if (over := len(os.fsencode(sockets)) - _SOCKET_BYTES) > 0:
        raise ResourceError(
            f"{name}: {given!r} is {over} bytes too long: Ray puts sockets in it, and their paths "
            f"are limited to {_SOCKET_BYTES} bytes; {advice}"
        )
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise ResourceError(
            f"{name}: Ray cannot write its files to {given}/ray: {folder} is not a folder that "
            f"this user can write to; {advice}"
        )
