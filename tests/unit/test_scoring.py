"""The queue of one reward: which units share a call, and what their failures cost the others."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from texforce_ray.actors.messages import Scores, ScoringTask
from texforce_ray.config import RewardConfig
from texforce_ray.crew.scoring import RewardPool
from texforce_ray.errors import ActorError, LostObjectError, NobodyLeftError, NoneFreeError

Serve = Callable[[list[ScoringTask], tuple[str, ...]], list[Scores]]


class Servers:
    """An actor pool whose servers take one tick of the loop for a call."""

    def __init__(self, count: int, serve: Serve) -> None:
        self.actors, self.serve = [self] * count, serve
        self.calls: list[tuple[str, ...]] = []  # the images of each
        self.tries: list[int | None] = []  # what each call was allowed
        self.running = self.most = 0
        self.open = asyncio.Event()
        self.open.set()

    async def run(
        self, task: str, submit: Callable[[Any], Any], timeout: float, retries: int | None = None
    ) -> Any:
        del task, timeout
        self.tries.append(retries)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.open.wait()
            await asyncio.sleep(0)
            return submit(self), ()
        finally:
            self.running -= 1

    @property
    def score(self) -> Servers:
        return self

    def remote(self, tasks: list[ScoringTask], *images: str) -> list[Scores]:
        self.calls.append(images)
        return self.serve(tasks, images)


def quick(tasks: list[ScoringTask], images: tuple[str, ...]) -> list[Scores]:
    """Each image's score is the number at the end of its prompt."""
    del images
    return [Scores([float(p.split()[-1]) for p in t.prompts], None, 0.001) for t in tasks]


def scored(
    serve: Serve, units: int, *, servers: int = 2, first: int = 1, **settings: Any
) -> tuple[list[Any], Servers, RewardPool]:
    """`first` units alone, so that the reward's speed is known, then `units` at once."""

    async def job() -> tuple[list[Any], Servers, RewardPool]:
        actors = Servers(servers, serve)
        reward = RewardConfig(name="shapes", retry_pause_s=0.01, **settings)
        pool = RewardPool(reward, actors)  # type: ignore[arg-type]
        for _ in range(first):
            await pool.score("warm", ["prompt 0"], [{}])  # type: ignore[arg-type]
        actors.calls.clear()
        jobs = [
            pool.score(f"images {i}", [f"prompt {i}"] * (i + 1), [{}] * (i + 1))  # type: ignore[arg-type]
            for i in range(units)
        ]
        return await asyncio.gather(*jobs, return_exceptions=True), actors, pool

    return asyncio.run(job())


def test_units_of_a_quick_reward_share_calls_and_each_gets_its_own_scores() -> None:
    answers, actors, _ = scored(quick, 12)
    assert [answer.scores for answer in answers] == [[float(i)] * (i + 1) for i in range(12)]
    assert [len(call) for call in actors.calls] == [6, 3, 2, 1]  # an equal share of what waits
    assert actors.most == 2  # the rest waits for a server


def test_a_call_has_no_more_units_than_a_fraction_of_a_second_can_score() -> None:
    def slow(tasks: list[ScoringTask], images: tuple[str, ...]) -> list[Scores]:
        return [answer._replace(seconds=0.2) for answer in quick(tasks, images)]

    _, actors, _ = scored(slow, 12)
    assert [len(call) for call in actors.calls] == [2, 2, 2, 2, 2, 1, 1]
    # Calls share a deadline: a tenth of it at most.
    _, actors, _ = scored(slow, 12, timeout_s=1.0)
    assert [len(call) for call in actors.calls] == [1] * 12


@pytest.mark.parametrize(
    ("busy", "hurried", "calls"),
    [(True, (), [3]), (False, (), [1, 1, 1]), (True, (1,), [2, 1]), (True, (0, 1, 2), [1, 1, 1])],
)
def test_units_wait_for_company_only_while_all_actors_sample_and_nobody_waits_for_them(
    busy: bool, hurried: tuple[int, ...], calls: list[int]
) -> None:
    async def job() -> Servers:
        actors = Servers(1, quick)
        pool = RewardPool(RewardConfig(name="shapes"), actors, lambda: busy)  # type: ignore[arg-type]
        await pool.score("warm", ["prompt 0"], [{}])  # type: ignore[arg-type]
        actors.calls.clear()
        jobs = []
        for i in range(3):
            one = pool.score(f"images {i}", ["prompt 1"], [{}], hurry=i in hurried)  # type: ignore[arg-type]
            jobs.append(asyncio.ensure_future(one))
            await asyncio.sleep(0.02)
        await asyncio.wait_for(asyncio.gather(*jobs), 5)
        return actors

    assert [len(call) for call in asyncio.run(job()).calls] == calls


def test_the_speed_of_a_reward_is_measured_before_units_share_a_call() -> None:
    _, actors, _ = scored(quick, 4, first=0)
    assert [len(call) for call in actors.calls] == [1, 1, 1, 1]


def test_merged_units_are_one_task_and_stay_whole() -> None:
    seen: list[list[int]] = []

    def serve(tasks: list[ScoringTask], images: tuple[str, ...]) -> list[Scores]:
        seen.append([task.payloads for task in tasks])
        return quick(tasks, images)

    answers, _, _ = scored(serve, 12, servers=1, first=0, merge_units=3)
    assert [answer.scores for answer in answers] == [[float(i)] * (i + 1) for i in range(12)]
    assert seen == [[3], [3, 3, 3]]


def test_only_the_units_that_failed_are_tried_again_and_alone() -> None:
    def serve(tasks: list[ScoringTask], images: tuple[str, ...]) -> list[Scores]:
        answers = quick(tasks, images)
        return [
            Scores(None, "black", 0.001) if "3" in images[i] else answer
            for i, answer in enumerate(answers)
        ]

    answers, actors, pool = scored(serve, 6, servers=1, retries=2)
    assert [answer.error for answer in answers] == [None, None, None, "black", None, None]
    assert [call for call in actors.calls if "images 3" in call][1:] == [("images 3",)] * 2
    assert len(actors.calls) == 3
    assert pool.statistics.retries == 2


def test_a_reward_that_fails_at_once_is_not_taken_for_a_quick_one() -> None:
    def serve(tasks: list[ScoringTask], images: tuple[str, ...]) -> list[Scores]:
        return [Scores(None, "unauthorised", 0.001)] * len(images)

    _, actors, _ = scored(serve, 4, retries=0)
    assert [len(call) for call in actors.calls] == [1, 1, 1, 1]


def test_a_unit_that_waits_for_its_next_try_leaves_the_server_to_others() -> None:
    seen: list[str] = []

    def serve(tasks: list[ScoringTask], images: tuple[str, ...]) -> list[Scores]:
        seen.extend(images)
        first = images == ("images 0",) and seen.count("images 0") == 1
        return [Scores(None, "busy", 1.0)] if first else quick(tasks, images)

    answers, _, _ = scored(serve, 3, servers=1, first=0)
    assert [answer.error for answer in answers] == [None] * 3
    assert seen[-1] == "images 0"


def test_without_any_server_all_that_wait_give_up_together() -> None:
    def serve(tasks: list[ScoringTask], images: tuple[str, ...]) -> list[Scores]:
        raise NoneFreeError("no server became free")

    answers, actors, _ = scored(serve, 5, servers=1, first=0)
    assert [answer.error for answer in answers] == ["no server became free"] * 5
    assert len(actors.calls) == 1


@pytest.mark.parametrize("error", [ActorError, LostObjectError])
def test_a_unit_that_takes_its_call_along_does_not_take_the_others(error: type[Exception]) -> None:
    def serve(tasks: list[ScoringTask], images: tuple[str, ...]) -> list[Scores]:
        if "images 2" in images:
            raise error("gone")
        return quick(tasks, images)

    answers, actors, _ = scored(serve, 5, servers=1, retries=0)
    assert actors.tries == [None, 0, *[None] * 5]  # a call with several units is tried once
    others = [answers[i].scores for i in (0, 1, 3, 4)]
    assert others == [[float(i)] * (i + 1) for i in (0, 1, 3, 4)]
    if error is ActorError:  # masked; what is lost is sampled again instead
        assert answers[2] == Scores(None, "gone", 0.0)
    else:
        assert isinstance(answers[2], LostObjectError)


def test_nobody_left_reaches_every_unit() -> None:
    def serve(tasks: list[ScoringTask], images: tuple[str, ...]) -> list[Scores]:
        raise NobodyLeftError("none")

    answers, _, _ = scored(serve, 5, first=0)
    assert [type(answer) for answer in answers] == [NobodyLeftError] * 5


def test_cancelled_units_are_not_scored_and_cancel_their_call() -> None:
    async def job() -> tuple[Servers, RewardPool, Sequence[Any]]:
        actors = Servers(1, quick)
        pool = RewardPool(RewardConfig(name="shapes"), actors)  # type: ignore[arg-type]
        actors.open.clear()
        jobs = [
            asyncio.ensure_future(pool.score(f"images {i}", ["prompt 1"], [{}]))  # type: ignore[arg-type]
            for i in range(3)
        ]
        while not actors.running:
            await asyncio.sleep(0)
        jobs[0].cancel()
        jobs[2].cancel()
        while actors.running and not jobs[1].done():
            actors.open.set()
            await asyncio.sleep(0)
        return actors, pool, await asyncio.gather(*jobs, return_exceptions=True)

    actors, pool, answers = asyncio.run(job())
    assert actors.calls == [("images 1",)]
    assert answers[1] == Scores([1.0], None, 0.001)
    assert [type(answers[i]) for i in (0, 2)] == [asyncio.CancelledError] * 2
    assert not pool._calls
    gc.collect()  # a forgotten future with an error would be reported here
