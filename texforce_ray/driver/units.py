"""What one iteration samples."""

from __future__ import annotations

from texforce_ray import randomness
from texforce_ray.actors.messages import WorkUnit
from texforce_ray.config import Config
from texforce_ray.prompts import Prompt, prompts_of_iteration


def plan_units(config: Config, prompts: list[Prompt], iteration: int) -> list[WorkUnit]:
    """The iteration's units of work: a pure function of config and prompts."""
    chosen = prompts_of_iteration(prompts, config.seed, iteration, config.prompts.per_iteration)
    samples = [prompt for prompt in chosen for _ in range(config.prompts.samples_per_prompt)]
    seeds = randomness.noise_seeds(config.seed, iteration, len(samples))
    size = config.rollout.batch_size
    return [
        WorkUnit(
            iteration=iteration,
            index=first // size,
            prompts=tuple(p.text for p in samples[first : first + size]),
            metadata=tuple(p.metadata for p in samples[first : first + size]),
            seeds=seeds[first : first + size],
            policy_version=max(0, iteration - config.max_staleness),
        )
        for first in range(0, len(samples), size)
    ]
