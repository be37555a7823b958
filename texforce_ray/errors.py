"""Errors that a user meets. Each message says what is wrong, what was found, and what to do.

Imports nothing of the package: reward environments import this file without torch or pydantic.
"""

from __future__ import annotations


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


class LostObjectError(TexForceError):
    """Data went with the node that held it; whoever asked for it has it made again."""


class PeerLostError(TexForceError):
    """A learner lost the others that it works with; all of them are started again."""


class NumericsError(TexForceError):
    """Learner and sampler disagree about log-probabilities beyond the configured bound."""


class Interrupted(TexForceError):  # noqa: N818 - not a fault: the run was asked to stop
    """The run was asked to stop (SIGINT, SIGTERM) and left a checkpoint behind."""
