"""Errors that a user meets. Each message says what is wrong, what was found, and what to do.

Imports nothing of the package: reward environments import this file without torch or pydantic.
"""

from __future__ import annotations

import re
from typing import Any


class TexForceError(Exception):
    """Base of all errors of this package that a user can act on."""


class ConfigError(TexForceError):
    """The configuration is wrong: names the key, what it got, and what would be right."""


class PromptError(TexForceError):
    """A prompt file is missing, unreadable or empty."""


class RunDirectoryError(TexForceError):
    """The run directory cannot be used: not writable, not a run, or a run of another config."""


class CheckpointError(TexForceError):
    """No usable checkpoint where one was asked for."""


class RewardError(TexForceError):
    """A reward cannot be loaded, or failed on too many samples."""


class ResourceError(TexForceError):
    """The Ray cluster has no room for the actors that the config asks for."""


class ActorError(TexForceError):
    """An actor failed for good: names the actor, its task and the cause."""


class NobodyLeftError(ActorError):
    """All actors of a role are gone for good: the run cannot go on, whatever the task."""


class BudgetSpentError(ActorError):
    """Actors failed more often than the run allows (ray.max_run_restarts)."""


class DeviceError(TexForceError):
    """A GPU failed or ran out of memory: the process that used it is started again."""


class LostObjectError(TexForceError):
    """Data went with the node that held it; whoever asked for it has it made again."""


class PeerLostError(TexForceError):
    """A learner lost the others that it works with; all of them are started again."""


class NumericsError(TexForceError):
    """Learner and sampler disagree about log-probabilities beyond the configured bound."""


class EffectError(TexForceError):
    """An actor does not sample with the policy that was published, or training changes nothing."""


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
    """Whether a GPU is to blame: its process cannot be trusted with further work.

    Told by names and words: neither the driver nor every reward's environment has torch.
    """
    types = {base.__name__ for base in type(error).__mro__ if base.__module__ != "ray.exceptions"}
    return bool(types & _DEVICE_TYPES) or _DEVICE.search(str(error)) is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device fault says that its memory was too small."""
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
    """Texts in a reward's arguments that their names call secret; those ending in _env name one."""
    if isinstance(values, dict):
        return [found for key, value in values.items() for found in secrets(value, str(key))]
    if isinstance(values, (list, tuple)):
        return [found for value in values for found in secrets(value, name)]
    hidden = isinstance(values, str) and _SECRET_NAME.search(name) and not name.endswith("_env")
    return [str(values)] if hidden and values else []


def shareable(values: Any, name: str = "") -> Any:
    """Plain data of a config without its secrets, for trackers and reports that others see."""
    if isinstance(values, dict):
        return {key: shareable(value, str(key)) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [shareable(value, name) for value in values]
    if secrets(values, name):
        return _HIDDEN
    return redacted(values) if isinstance(values, str) else values


_YAML_LINE = re.compile(r"^([ -]*([\w-]+): *)(\S.*)$", re.MULTILINE)


def shareable_yaml(text: str) -> str:
    """The same for a config as it is written: one value a line."""

    def hide(line: re.Match[str]) -> str:
        return f"{line[1]}{_HIDDEN}" if secrets(line[3], line[2]) else line[0]

    return redacted(_YAML_LINE.sub(hide, text))
