"""Iterations being sampled: the one that the loop waits for and, with k = 1, the next one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from texforce_ray.config import Config
from texforce_ray.crew.crew import Crew
from texforce_ray.driver.collect import ScoredBatch, collect
from texforce_ray.driver.policy import Policy
from texforce_ray.driver.units import plan_units
from texforce_ray.prompts import Prompt


class Sampling:
    """Samples every iteration as soon as the policy version that it uses is published."""

    def __init__(self, config: Config, crew: Crew, prompts: list[Prompt], policy: Policy) -> None:
        self.config, self.crew, self.prompts, self.policy = config, crew, prompts, policy
        self._under_way: dict[int, asyncio.Task[ScoredBatch]] = {}

    def start(self) -> None:
        """Start all iterations whose policy version is published."""
        current = self.policy.version
        furthest = min(current + self.config.max_staleness, self.config.iterations - 1)
        for iteration in range(current, furthest + 1):
            if iteration not in self._under_way:
                units = plan_units(self.config, self.prompts, iteration)
                version = self.policy.versions[units[0].policy_version]
                job = collect(self.crew, units, version.ref, version.effect)
                self._under_way[iteration] = asyncio.ensure_future(job)

    async def take(self, iteration: int) -> ScoredBatch:
        """The scored samples of an iteration, once all are ready."""
        return await self._under_way.pop(iteration)

    async def cancel(self) -> None:
        """Cancel the iterations in progress."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def sampling_ahead(
    config: Config, crew: Crew, prompts: list[Prompt], policy: Policy
) -> AsyncIterator[Sampling]:
    """Sampling that is cancelled at the end of the block."""
    sampling = Sampling(config, crew, prompts, policy)
    try:
        yield sampling
    finally:
        await sampling.cancel()
