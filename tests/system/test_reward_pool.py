"""Reward servers in a pool on real Ray: slow, broken, failing. No torch, so restarts are quick."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
import ray

from tests.rewards.services import service
from texforce_ray.actors.messages import Scores, ScoringTask, pack_images
from texforce_ray.actors.reward import RewardServer
from texforce_ray.config.io import make_config
from texforce_ray.crew.budget import Budget
from texforce_ray.crew.pool import ActorPool
from texforce_ray.crew.starting import reward_pool
from texforce_ray.errors import ActorError, RewardError

pytestmark = pytest.mark.usefixtures("small_cluster")


def server(target: str, **kwargs: Any) -> Any:
    return ray.remote(RewardServer).options(num_cpus=0).remote("r", target, kwargs, 2)


def score(target: str) -> Any:
    images = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    task = ScoringTask(["a"] * 3, [{}] * 3)
    (answer,) = ray.get(server(target).score.remote([task], pack_images(images)))
    return answer


def test_a_reward_server_scores_in_parts_and_keeps_order() -> None:
    answer = score("tests.system.rewards:Counting")
    assert answer.error is None
    assert answer.scores == [2.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("target", "cause"),
    [
        ("tests.system.rewards:Broken", "OSError: the scoring service is down"),
        ("tests.system.rewards:TooFew", "returned 1 numbers for 2 images"),
        ("tests.system.rewards:Infinite", "infinite"),
        ("tests.system.rewards:Words", "not a list of numbers"),
    ],
)
def test_a_failing_reward_answers_with_its_error_as_data(target: str, cause: str) -> None:
    answer = score(target)
    assert answer.scores is None
    assert cause in answer.error


def test_a_reward_class_without_score_fails_at_start() -> None:
    servers = ActorPool("reward-r", [server("tests.system.rewards:NoScore")], retries=0)
    with pytest.raises(RewardError, match="NoScore has no method score"):
        asyncio.run(servers.ready(30))


# ---- slow and broken rewards --------------------------------------------------------------


def reward_servers(target: str, budget: Budget | None = None, **settings: Any) -> Any:
    """As a run starts them."""
    reward = {"target": target, "num_cpus": 0, "retry_pause_s": 0.01, **settings}
    config = make_config({"rewards": [reward], "ray": {"max_restarts": 1}})
    return reward_pool(config.rewards[0], config, {}, budget)


def scores_of(servers: Any, units: int, answers: list[Scores] | None = None) -> list[Scores]:
    answers = [] if answers is None else answers

    async def job() -> list[Scores]:
        await servers.actors.ready(60)
        images = ray.put(pack_images(np.zeros((2, 8, 8, 3), dtype=np.uint8)))
        try:
            for _ in range(units):
                answers.append(await servers.score(images, ["a"] * 2, [{}] * 2))
            return answers
        finally:
            servers.actors.kill()

    return asyncio.run(job())


def test_a_slow_reward_is_masked_until_the_runs_budget_is_spent() -> None:
    budget = Budget(3)
    servers = reward_servers("tests.rewards.bad:Sleeper", budget, timeout_s=0.5, retries=0)
    answers: list[Scores] = []
    with pytest.raises(ActorError, match=r"failed 4 times .*ray\.max_run_restarts"):
        scores_of(servers, 4, answers)
    # More often than ray.max_restarts, which is 1 here and would have ended the run.
    assert [answer.scores for answer in answers] == [None] * 3
    assert all("no answer within" in str(answer.error) for answer in answers)


def test_a_slow_service_answers_before_its_server_is_killed() -> None:
    with service(lambda *_: (time.sleep(5), (200, {"scores": [1.0, 1.0]}))[1]) as url:
        servers = reward_servers(
            "texforce_ray.rewards.http_client:HttpReward",
            timeout_s=2,
            retries=0,
            kwargs={"url": url.replace("http://", "http://me:hunter2@"), "retries": 5},
        )
        (answer,) = scores_of(servers, 1)
    assert answer.scores is None
    assert "before the reward's timeout_s" in str(answer.error)
    assert "hunter2" not in str(answer.error)
    assert servers.actors.restarts == 0


def test_a_reward_with_a_broken_gpu_gets_a_new_server(tmp_path: Any) -> None:
    servers = reward_servers(
        "tests.rewards.bad:BrokenGpu", retries=1, kwargs={"marker": str(tmp_path / "broken")}
    )
    (answer,) = scores_of(servers, 1)
    assert answer.scores == [1.0, 1.0], answer.error
    assert servers.actors.restarts == 1


def test_a_constructors_secrets_reach_no_log() -> None:
    kwargs = {"api_key": "sk-123456", "url": "https://me:hunter2@host/v1?api_key=sk-9", "size": 3}
    servers = ActorPool("r", [server("tests.rewards.bad:Unwilling", **kwargs)], retries=0)
    with pytest.raises(RewardError, match=r"'size': 3.*ConnectionError: no answer") as caught:
        asyncio.run(servers.ready(30))
    assert not [secret for secret in ("sk-1", "hunter2", "sk-9") if secret in str(caught.value)]
