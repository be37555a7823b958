"""Rewards, and how they become advantages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from texforce_ray.config.fields import Section, free, recorded


class RewardConfig(Section):
    """One component of the reward."""

    name: str | None = Field(None, description="a built-in reward")
    target: str | None = Field(None, description="your own reward: 'package.module:Class'")
    label: str | None = Field(None, description="name in metrics; default: name or class name")
    weight: float = recorded(
        1.0,
        "factor in the weighted sum; 0, without 'min': held out, i.e. only recorded, as a check on "
        "the trained ones",
    )
    normalize: Literal["none", "batch", "group"] = Field(
        "none",
        description="before the sum, shift and scale to mean 0, deviation 1: over the iteration "
        "('batch') or over each prompt's samples ('group'; with advantage.mode 'batch' it is GDPO)",
    )
    min: float | None = Field(
        None, description="gate: a sample whose raw score is lower gets the floor as its total"
    )
    floor: float = Field(
        0.0,
        description="total of a sample under the gate; in training it is also no higher than the "
        "lowest total above the gates",
    )
    kwargs: dict[str, Any] = Field({}, description="arguments of the reward's constructor")
    environment: str | None = free(
        None,
        "where it runs: 'driver' (the run's own Python), 'isolated' (an environment of its own), "
        "the absolute path of an interpreter, or null: the reward's default",
    )
    requirements: tuple[str, ...] = Field(
        (), description="packages of your own reward, 'name==version'; they make it isolated"
    )
    batch_size: int = Field(64, ge=1, description="images in one call of score()")
    merge_units: int = Field(
        1,
        ge=1,
        description="units of work in one call of score(); more than 1 is faster with small units, "
        "but which units are merged depends on timing, and so do the last bits of a model's scores",
    )
    num_threads: int = Field(1, ge=1, description="CPU threads of a server (changes rounding)")
    replicas: int = free(1, "reward servers", ge=1)
    num_cpus: float = free(0.1, "CPUs that Ray reserves for each server", ge=0)
    num_gpus: float = free(0.0, "GPUs that Ray reserves for each server", ge=0)
    resources: dict[str, float] = free({}, "custom Ray resources for each server")
    timeout_s: float = free(
        300.0,
        "deadline for one call, after which its server is restarted; the web clients of built-in "
        "rewards stop a little earlier, whatever their own timeout_s and retries",
        gt=0,
    )
    retries: int = free(2, "retries of a failed call before its samples are masked", ge=0)
    retry_pause_s: float = free(0.2, "pause before the first retry; doubled each time", ge=0)

    @model_validator(mode="after")
    def _one_target(self) -> RewardConfig:
        if (self.name is None) == (self.target is None):
            raise ValueError("give exactly one of 'name' (built in) and 'target' (your class)")
        if self.target is not None and self.target.count(":") != 1:
            raise ValueError(f"target {self.target!r} should look like 'package.module:Class'")
        if self.key != self.key.strip() or not self.key.isprintable() or len(self.key) > 100:
            raise ValueError(
                f"label: {self.key!r} should be up to 100 printable characters, without "
                "surrounding spaces"
            )
        return self

    @property
    def key(self) -> str:
        """The component's name in metrics, samples and errors."""
        return self.label or self.name or str(self.target).partition(":")[2]

    @property
    def held_out(self) -> bool:
        """Whether it is only recorded: no part of the total, neither as a term nor as a gate."""
        return not self.weight and self.min is None


def trends_of(rewards: Sequence[RewardConfig]) -> tuple[list[str], list[str]]:
    """Names of the rewards whose means show progress, and of the held-out ones.

    The first are `total` or, where that has normalised parts, the trained rewards: a normalised
    reward's mean over an iteration is always 0.
    """
    trained = [reward for reward in rewards if reward.weight]
    shown = ["total"]
    if any(reward.normalize != "none" for reward in trained):
        shown = [reward.key for reward in trained if reward.weight > 0]
    return shown, [reward.key for reward in rewards if reward.held_out]


class AdvantageConfig(Section):
    """How rewards become advantages."""

    mode: Literal["prompt", "group", "batch"] = Field(
        "prompt",
        description="'prompt': rolling statistics per prompt (DDPO); 'group': per prompt within "
        "the iteration; 'batch': over the iteration",
    )
    clip: float = Field(5.0, gt=0, description="advantages are clipped to +-clip")
    buffer_size: int = Field(32, ge=2, description="rewards remembered per prompt")
    min_count: int = Field(16, ge=2, description="with fewer, the batch's statistics are used")
    scale: Literal["own", "batch"] = Field(
        "own",
        description="deviation to divide by: that of the prompt or group itself, or the batch's",
    )
    max_masked: float = free(
        0.25, "share of unscored samples beyond which the run fails", ge=0, le=1
    )
