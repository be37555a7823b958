"""Errors shown to users. Each message states what is wrong, what was found, and what to do.

Imports nothing of the package: reward environments import this file without torch or pydantic.
"""

from __future__ import annotations

import re
from typing import Any


class TexForceError(Exception):
    """Base class of all errors in this package that a user can act on."""


class ConfigError(TexForceError):
    """The configuration is wrong; the message names the key, its value, and what is valid."""


class MovedKeysError(ConfigError):
    """The configuration has keys of an earlier version; the message gives their present names."""


class PromptError(TexForceError):
    """A prompt file is missing, unreadable or empty."""


class RunDirectoryError(TexForceError):
    """The run directory cannot be used: not writable, not a run, or a run of another config."""


class CheckpointError(TexForceError):
    """There is no usable checkpoint where one was requested."""


class RewardError(TexForceError):
    """A reward cannot be loaded, or failed on too many samples."""


class ResourceError(TexForceError):
    """The Ray cluster has no room for the actors that the config requests."""


class ActorError(TexForceError):
    """An actor failed permanently; the message names the actor, its task and the cause."""


class NobodyLeftError(ActorError):
    """All actors of a role are permanently gone, so the run cannot continue, whatever the task."""


class NoneFreeError(ActorError):
    """No actor of a role became free in time, and none is at work."""


class BudgetSpentError(ActorError):
    """Actors failed more often than the run allows (ray.max_run_restarts)."""


class DeviceError(TexForceError):
    """A GPU failed or ran out of memory; the process that used it is restarted."""


class LostObjectError(TexForceError):
    """Data was lost with the node that held it; the caller has it recomputed."""


class PeerLostError(TexForceError):
    """A learner lost contact with its peers; all learners are restarted."""


class NumericsError(TexForceError):
    """Learner and sampler disagree, or gradients or weights are not finite or not usable."""


class EffectError(TexForceError):
    """An actor does not sample with the published policy, or training changes nothing."""


class Interrupted(TexForceError):  # noqa: N818 - not a fault: the run was asked to stop
    """The run was asked to stop (SIGINT, SIGTERM) and left a checkpoint behind."""


_DEVICE_TYPES = {"OutOfMemoryError", "AcceleratorError"}  # torch's
_DEVICE = re.compile(
    r"CUDA (driver )?error|CUDA out of memory|HIP (error|out of memory)|CUBLAS_STATUS_|"
    r"CUDNN_STATUS_|cuDNN error|uncorrectable ECC|device-side assert|illegal memory access|"
    r"no CUDA-capable device|unspecified launch failure",
    re.IGNORECASE,
)
_MEMORY = re.compile(r"out of memory|_ALLOC_FAILED|OutOfMemoryError", re.IGNORECASE)


def is_device_fault(error: BaseException) -> bool:
    """Whether a GPU is at fault, so that its process is unfit for further work.

    Matches class names and messages: the driver and some reward environments have no torch.
    """
    types = {base.__name__ for base in type(error).__mro__ if base.__module__ != "ray.exceptions"}
    return bool(types & _DEVICE_TYPES) or _DEVICE.search(str(error)) is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device fault is due to lack of memory."""
    return _MEMORY.search(f"{type(error).__name__}: {error}") is not None


_SECRET_NAME = re.compile(
    r"(^|_)(api_?|access_?)?(key|token|secret|password|passwd|credentials?|auth|authori[sz]ation|bearer)$",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@'\"]+@", re.IGNORECASE)
_SECRET_QUERY = re.compile(
    r"([?&][\w-]*(?:key|token|secret|passw|sig|auth)[\w-]*=)[^&\s'\"]+", re.IGNORECASE
)
_HIDDEN = "***"


def redacted(text: str) -> str:
    """Text for logs, without the user names, passwords and keys of the URLs in it."""
    return _SECRET_QUERY.sub(rf"\1{_HIDDEN}", _USERINFO.sub(rf"\1{_HIDDEN}@", text))


def secrets(values: object, name: str = "") -> list[str]:
    """Secrets in a reward's arguments, recognized by key; a key ending in _env holds a name."""
    if isinstance(values, dict):
        return [found for key, value in values.items() for found in secrets(value, str(key))]
    if isinstance(values, (list, tuple)):
        return [found for value in values for found in secrets(value, name)]
    hidden = isinstance(values, str) and _SECRET_NAME.search(name) and not name.endswith("_env")
    return [str(values)] if hidden and values else []


def shareable(values: Any, name: str = "") -> Any:
    """A config's plain data without its secrets, for trackers and reports that others see."""
    if isinstance(values, dict):
        return {key: shareable(value, str(key)) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [shareable(value, name) for value in values]
    if secrets(values, name):
        return _HIDDEN
    return redacted(values) if isinstance(values, str) else values


_YAML_LINE = re.compile(r"^([ -]*([\w-]+): *)(\S.*)$", re.MULTILINE)


def shareable_yaml(text: str) -> str:
    """Like `shareable`, for a config's text with one value per line."""

    def hide(line: re.Match[str]) -> str:
        return f"{line[1]}{_HIDDEN}" if secrets(line[3], line[2]) else line[0]

    return redacted(_YAML_LINE.sub(hide, text))
