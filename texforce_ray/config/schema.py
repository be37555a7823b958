"""The whole configuration: its sections, and the numbers derived from several of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from texforce_ray import randomness
from texforce_ray.config.actors import LearnerConfig, PlacementConfig, RayConfig, RolloutConfig
from texforce_ray.config.fields import (
    DType,
    Section,
    as_list,
    fixed_values,
    free,
    marked,
    recorded,
    walk,
)
from texforce_ray.config.learning import (
    CustomObjective,
    DirectObjective,
    Objective,
    OptimizerConfig,
    PpoObjective,
    UpdateConfig,
)
from texforce_ray.config.model import DiffusionConfig, LoraConfig, ModelConfig
from texforce_ray.config.prompts import PromptsConfig
from texforce_ray.config.records import CheckpointConfig, EvalConfig, TrackConfig
from texforce_ray.config.rewards import AdvantageConfig, RewardConfig
from texforce_ray.config.rules import RULES
from texforce_ray.errors import ConfigError


class Config(Section):
    """Everything that a run needs."""

    seed: int = Field(0, ge=0, description="all prompts, noise and timesteps follow from it")
    run_dir: str = free(
        "runs/{time}", "where results go; {time} becomes the start time", min_length=1
    )
    iterations: int = recorded(20, "iterations of sampling and updating", ge=1)
    max_staleness: int = Field(
        0, ge=0, le=1, description="k: iteration i is sampled with policy version max(0, i - k)"
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="the frozen pipeline")
    lora: LoraConfig = Field(default_factory=LoraConfig, description="the trained adapter")
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig, description="the MDP")
    prompts: PromptsConfig = Field(default_factory=PromptsConfig, description="what is sampled")
    rollout: RolloutConfig = Field(default_factory=RolloutConfig, description="rollout actors")
    rewards: Annotated[tuple[RewardConfig, ...], BeforeValidator(as_list)] = Field(
        (RewardConfig(name="shapes"),), min_length=1, description="components of the reward"
    )
    advantage: AdvantageConfig = Field(default_factory=AdvantageConfig, description="baseline")
    objective: Objective = Field(
        default_factory=PpoObjective, description="what an update optimises"
    )
    update: UpdateConfig = Field(default_factory=UpdateConfig, description="minibatches, epochs")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW")
    learner: LearnerConfig = Field(default_factory=LearnerConfig, description="learner actor")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="evaluation")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="what is kept"
    )
    ray: RayConfig = Field(default_factory=RayConfig, description="how to reach Ray")
    track: TrackConfig = Field(default_factory=TrackConfig, description="trackers")
    profile: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_list)] = free(
        (),
        "iterations, counted from 0, to profile into RUN_DIR/profile; profiled iterations are "
        "slower",
    )
    placement: PlacementConfig = Field(
        default_factory=PlacementConfig, description="which nodes may hold which actors"
    )

    @property
    def samples_per_iteration(self) -> int:
        return self.prompts.per_iteration * self.prompts.samples_per_prompt

    @property
    def units_per_iteration(self) -> int:
        return self.samples_per_iteration // self.rollout.batch_size

    @property
    def minibatch_size(self) -> int:
        return self.samples_per_iteration // self.update.minibatches

    @property
    def shard_size(self) -> int:
        """Samples of a minibatch whose gradients are summed together."""
        return self.minibatch_size // self.learner.gradient_shards

    @property
    def evaluation_guidance(self) -> float:
        given = self.eval.guidance_scale
        return self.diffusion.guidance_scale if given is None else given

    @property
    def evaluation_eta(self) -> float:
        return self.diffusion.eta if self.eval.eta is None else self.eval.eta

    @property
    def evaluation_steps(self) -> int:
        return self.eval.steps or self.diffusion.steps

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """All at which images are drawn."""
        scales = (self.diffusion.guidance_scale, self.evaluation_guidance)
        return (*scales, *self.eval.guidance_curve)

    def window_steps(self, iteration: int) -> list[int] | None:
        """The steps of an iteration's window; None if all steps add noise.

        One for all samples of an iteration: with one for each request, advantages would compare
        samples of different noise.
        """
        d = self.diffusion
        if d.window is None:
            return None
        return randomness.window(self.seed, iteration, d.window.size, d.window_range)

    @property
    def total_updates(self) -> int:
        return self.iterations * self.updates_per_iteration

    @property
    def updates_per_iteration(self) -> int:
        return self.update.epochs * self.update.minibatches

    @property
    def ppo(self) -> PpoObjective:
        """The objective, if it is PPO."""
        if not isinstance(self.objective, PpoObjective):
            raise TypeError(f"objective.kind is {self.objective.kind}")
        return self.objective

    @property
    def direct(self) -> DirectObjective | None:
        """The objective, if it is direct backpropagation."""
        return self.objective if isinstance(self.objective, DirectObjective) else None

    @property
    def trained_timesteps(self) -> int:
        """Timesteps of each sample that PPO trains on: all of a window."""
        if self.diffusion.window is not None:
            return self.diffusion.window.size
        return max(1, round(self.diffusion.steps * self.ppo.timestep_fraction))

    @property
    def noise_levels(self) -> int | None:
        """Levels of each sample, of objectives on the forward process."""
        if isinstance(self.objective, CustomObjective):
            return self.objective.kwargs.get("levels")
        return getattr(self.objective, "levels", None)

    @property
    def exact_numerics(self) -> bool:
        """Whether sampler and learner compute likelihoods in float32 throughout."""
        return self.model.dtype == "float32" and self.diffusion.storage_dtype == "float32"

    @property
    def of_rollouts(self) -> Config:
        """The config by which rollout actors load the model."""
        return self.changed({"model.dtype": self.dtypes[1]})

    @property
    def dtypes(self) -> tuple[DType, ...]:
        """Of the frozen weights in learner and rollout actors."""
        return self.model.dtype, self.rollout.dtype or self.model.dtype

    @property
    def uses_decoupled(self) -> bool:
        if self.ppo.decoupled == "auto":
            return self.max_staleness > 0 or not self.exact_numerics
        return self.ppo.decoupled == "always"

    @property
    def ratio_error_bound(self) -> float:
        if self.ppo.max_ratio_error is not None:
            return self.ppo.max_ratio_error
        return 1e-4 if self.exact_numerics else math.inf

    @model_validator(mode="after")
    def _rules(self) -> Config:
        for rule in RULES:
            rule(self)
        return self

    def fixed(self) -> dict[str, Any]:
        """Only the result-affecting fields, as plain data; must be equal on resume."""
        return fixed_values(self)

    def changed(self, values: Mapping[str, Any]) -> Config:
        """A copy with other values at dotted keys, checked like any config.

        Raises:
            ConfigError: names what is wrong.
        """
        tree = self.model_dump()
        for key, value in values.items():
            *parents, name = key.split(".")
            node: Any = tree
            for part in parents:
                listed = isinstance(node, list | tuple)
                node = node[int(part)] if listed else (node or {}).get(part)
            if not isinstance(node, dict) or name not in node:
                raise ConfigError(f"{key}: there is no such key")
            node[name] = value
        try:
            return Config.model_validate(tree)
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{', '.join(values)}: {message}") from None

    def sized_like(self, other: Config) -> Config:
        """A copy whose 'auto' sizes are those that another run measured."""
        sizes: dict[str, Any] = {}
        if not self.rollout.batch_size:
            sizes["rollout.batch_size"] = other.rollout.batch_size
        if not self.learner.microbatch_size:
            sizes["learner.microbatch_size"] = other.learner.microbatch_size
        if self.learner.gradient_checkpointing == "auto":
            sizes["learner.gradient_checkpointing"] = other.learner.gradient_checkpointing
        return self.changed(sizes)


def recorded_paths() -> set[str]:
    """Dotted paths of the fields that may change on resume and are then recorded."""
    return {key.plain for key in walk(Config) if marked(key.field, "recorded")}
