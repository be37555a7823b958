"""What somebody else's config could do on this machine, by key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from texforce_ray.config import Config, RewardConfig
from texforce_ray.errors import ConfigError


def check_trusted(config: Config, overrides: Sequence[str], source: str) -> None:
    """Reject a stored config that would run code, install packages or use this machine's secrets.

    Args:
        config: with `overrides` applied; values that they set are trusted.
        overrides: `key.sub=value`.
        source: the config's name in the message.

    Raises:
        ConfigError: names every such key.
    """
    own = tuple(override.partition("=")[0] for override in overrides)
    found = [
        f"  {key}: {why}"
        for key, why in _reaching(config)
        if not any(key == mine or key.startswith(f"{mine}.") for mine in own)
    ]
    if found:
        lines = [
            f"{source} has keys that act on this machine:",
            *found,
            "review them, then add --trust, or set them yourself (key=value)",
        ]
        raise ConfigError("\n".join(lines))


def _reaching(config: Config) -> Iterator[tuple[str, str]]:
    """Keys of a config that do more than define what is computed, and what they do."""
    for index, reward in enumerate(config.rewards):
        for key, why in _of_reward(reward):
            yield f"rewards.{index}.{key}", why
    if config.model.family is not None:
        yield "model.family", f"imports and runs {config.model.family!r}"
    if (target := getattr(config.objective, "target", None)) is not None:
        yield "objective.target", f"imports and runs {target!r}"
    if config.ray.address not in (None, "auto", "local"):
        yield "ray.address", f"joins the cluster at {config.ray.address!r}"
    if config.ray.environments is not None:
        yield "ray.environments", f"runs interpreters in {config.ray.environments!r}"


def _of_reward(reward: RewardConfig) -> Iterator[tuple[str, str]]:
    if reward.target is not None:
        yield "target", f"imports and runs {reward.target!r}"
    if reward.requirements:
        yield "requirements", f"installs {', '.join(reward.requirements)}"
    if reward.environment not in (None, "driver", "isolated"):
        yield "environment", f"runs the interpreter {reward.environment!r}"
    for name in reward.kwargs:
        if name in ("url", "headers") or name.endswith(("_url", "_env")):
            yield f"kwargs.{name}", "sends prompts, images or a variable of this machine elsewhere"
