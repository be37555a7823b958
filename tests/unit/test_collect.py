"""Samples are collected from rollouts and rewards of different speed."""

from __future__ import annotations

from typing import Any


def test_rollouts_wait_for_slow_rewards() -> None:
    """No more units are sampled but not yet scored than `rollout.max_unscored`."""
    import asyncio

    from texforce_ray.actors.messages import SampleInfo, Scores
    from texforce_ray.config.io import make_config
    from texforce_ray.driver.collect import collect
    from texforce_ray.driver.units import plan_units
    from texforce_ray.prompts import Prompt

    config = make_config(
        {
            "prompts": {"per_iteration": 4, "samples_per_prompt": 4},
            "rollout": {"batch_size": 2, "max_unscored": 3},
            "update": {"minibatches": 1},
        }
    )
    held = highest = 0
    hurried: list[bool] = []

    class Crew:
        """Samples at once, scores slowly."""

        def __init__(self) -> None:
            self.config = config
            self.backlog = asyncio.Semaphore(config.rollout.unscored_units)
            self.rewards = {"shapes": self}

        async def sample(self, *_: Any) -> tuple[SampleInfo, str, str]:
            nonlocal held, highest
            held += 1
            highest = max(highest, held)
            return SampleInfo(0.0), "trajectory", "images"

        async def score(self, _: Any, prompts: list[str], __: Any, *, hurry: bool) -> Scores:
            nonlocal held
            hurried.append(hurry)
            await asyncio.sleep(0.01)
            held -= 1
            return Scores([1.0] * len(prompts), None, 0.01)

        async def redo_if_lost(self, attempt: Any) -> Any:
            return await attempt()

    async def job() -> int:
        units = plan_units(config, [Prompt("a"), Prompt("b")], 0)
        crew: Any = Crew()
        snapshot: Any = "policy"
        return len((await collect(crew, units, snapshot)).rewards)

    assert asyncio.run(job()) == 16
    assert highest == 3
    # The learner waits for the last one alone.
    assert hurried == [False] * (len(hurried) - 1) + [True]
