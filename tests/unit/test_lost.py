"""Data that went with a node is made again: never masked, never trained on twice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from texforce_ray.actors.messages import SampleInfo, Updated, UpdateTask, WorkUnit
from texforce_ray.artifacts.snapshot import Learned, LearnerState, PolicySnapshot
from texforce_ray.cluster.answers import beside
from texforce_ray.config import RewardConfig
from texforce_ray.config.io import load_config
from texforce_ray.crew.budget import Budget
from texforce_ray.crew.crew import Crew
from texforce_ray.crew.scoring import RewardPool
from texforce_ray.driver.collect import TrainingBatch, collect
from texforce_ray.driver.policy import Policy
from texforce_ray.errors import ActorError, LostObjectError, NobodyLeftError, RunDirectoryError

CONFIG = load_config("configs/smoke.yaml")


class Crowd:
    """A crew whose nodes vanish on cue; its redo is the real one."""

    def __init__(self, losses: dict[str, int], most: int = 10) -> None:
        self.config, self.budget, self.lost = CONFIG, Budget(most), 0
        self.losses = losses
        self.backlog = asyncio.Semaphore(4)
        self.rewards = {reward.key: self for reward in CONFIG.rewards}
        self.drawn: list[int] = []
        self.given: list[tuple[Any, ...]] = []

    async def redo_if_lost(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        return await Crew.redo_if_lost(self, attempt)  # type: ignore[arg-type]

    async def sample(self, unit: WorkUnit, policy: Any) -> tuple[SampleInfo, str, str]:
        self.drawn.append(unit.index)
        return SampleInfo(1.0), f"trajectory {unit.index}, draw {len(self.drawn)}", f"{unit.index}"

    async def score(self, images: str, prompts: Any, metadata: Any, *, hurry: bool) -> Any:
        del hurry
        self._lose("images")
        return SimpleNamespace(scores=[float(images)] * len(prompts), error=None, seconds=0.0)

    async def update(self, task: UpdateTask) -> tuple[Updated, list[Any]]:
        self.given.append(tuple(task.trajectories))
        self._lose("trajectories")
        return Updated({}), list(_learned(task.version + 1))

    async def fetch(self, refs: Any) -> list[Any]:
        """Here, a ref is what it refers to."""
        self._lose("state")
        return list(refs)

    def _lose(self, what: str) -> None:
        if self.losses.get(what, 0):
            self.losses[what] -= 1
            raise LostObjectError(f"the {what}")


def _learned(version: int) -> Learned:
    return Learned(PolicySnapshot(version, {}, {}), LearnerState(version, version), None)


def _units() -> list[WorkUnit]:
    return [WorkUnit(0, i, ("a", "b"), ({}, {}), np.arange(2), 0) for i in range(2)]


def _collected(crew: Crowd) -> TrainingBatch:
    batch = asyncio.run(collect(crew, _units(), "snapshot"))  # type: ignore[arg-type]
    zeros = np.zeros(4)
    return TrainingBatch(batch, np.ones(4, bool), zeros, zeros)


def test_images_that_are_lost_are_drawn_again_and_not_masked() -> None:
    crew = Crowd({"images": 1})
    batch = _collected(crew).scored
    assert batch.rewards[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert not np.isnan(batch.rewards).any()
    assert len(crew.drawn) == 3
    assert crew.lost == 1


@pytest.mark.parametrize("what", ["trajectories", "state"])
def test_a_lost_trajectory_or_state_costs_an_update_again_with_fresh_ones(what: str) -> None:
    crew = Crowd({what: 2})
    batch = _collected(crew)
    policy = Policy(CONFIG)
    policy._publish(Updated({}), list(_learned(0)), _learned(0))  # type: ignore[arg-type]
    asyncio.run(policy.update(crew, batch, asyncio.sleep(0)))  # type: ignore[arg-type]
    assert policy.version == 1
    assert policy.learned[1] == _learned(1)
    assert len(crew.given) == 3
    assert crew.given[0] == batch.scored.trajectories
    assert len(set(crew.given)) == 3  # drawn again each time
    assert crew.drawn == [0, 1, 0, 1, 0, 1]


def test_a_version_whose_samples_could_not_be_written_is_not_published() -> None:
    """Its masks would be unknown to a run that repeats the iteration."""
    policy = Policy(CONFIG)
    policy._publish(Updated({}), list(_learned(0)), _learned(0))  # type: ignore[arg-type]

    async def full() -> None:
        raise RunDirectoryError("the disk is full")

    async def job() -> None:
        async with beside(full()) as written:
            await policy.update(crew, batch, written)  # type: ignore[arg-type]

    crew = Crowd({})
    batch = _collected(crew)
    with pytest.raises(RunDirectoryError, match="full"):
        asyncio.run(job())
    assert policy.version == 0
    assert crew.given  # the update itself was made


def test_losing_for_ever_ends_at_the_budget() -> None:
    crew = Crowd({"images": 100}, most=5)
    with pytest.raises(ActorError, match="max_run_restarts allows 5"):
        _collected(crew)


@pytest.mark.parametrize("error", [LostObjectError, NobodyLeftError])
def test_no_mask_for_what_is_not_the_rewards_fault(error: type[Exception]) -> None:
    """A node took the images along, or Ray itself ended: a mask would be recorded for good."""

    class Pool:
        actors = (1,)

        async def run(self, *_: Any, **__: Any) -> Any:
            raise error("gone")

    pool = RewardPool(RewardConfig(name="shapes"), Pool())  # type: ignore[arg-type]
    with pytest.raises(error):
        asyncio.run(pool.score("images", ["a"], [{}]))  # type: ignore[arg-type]
