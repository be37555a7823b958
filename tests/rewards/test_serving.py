"""Reward servers on real Ray: isolation, retries, hanging and dying servers, merging."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from texforce_ray.actors.messages import Scores, pack_images
from texforce_ray.config import Config, RewardConfig
from texforce_ray.config.io import make_config
from texforce_ray.errors import ActorError, RewardError, TexForceError

FAST = {"retry_pause_s": 0.01, "num_cpus": 0}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray, as a run with isolated rewards starts it."""
    import ray

    from texforce_ray.cluster.connection import connect

    connect(_config({"name": "hand"}))
    yield
    ray.shutdown()


def _config(*rewards: dict[str, Any], **settings: Any) -> Config:
    return make_config({"rewards": [FAST | reward for reward in rewards], **settings})


def _scores(
    config: Config, units: int = 1, black: tuple[int, ...] = (), size: int = 6
) -> tuple[list[Scores], dict[str, float]]:
    """Answers of the config's one reward to some units at once, and its statistics."""

    async def job() -> tuple[list[Scores], dict[str, float]]:
        import ray

        from texforce_ray.cluster.environments import prepare_environments
        from texforce_ray.crew.starting import reward_pool

        pythons = await prepare_environments(config)
        pool = reward_pool(config.rewards[0], config, pythons)
        images = np.full((size, 64, 64, 3), 200, dtype=np.uint8)
        try:
            await pool.actors.ready(config.ray.start_timeout_s)
            refs = [
                ray.put(pack_images(images * 0 if i in black else images)) for i in range(units)
            ]
            answers = await asyncio.gather(
                *(pool.score(ref, ["a green circle"] * size, [{}] * size) for ref in refs)
            )
            return list(answers), pool.take_statistics()
        finally:
            pool.actors.kill()

    return _run(job())


def _run(job: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(job)


def _own(name: str, **settings: Any) -> dict[str, Any]:
    return {"target": f"tests.rewards.bad:{name}", **settings}


@pytest.mark.usefixtures("cluster")
def test_an_isolated_reward_scores_on_ray() -> None:
    (answer,), statistics = _scores(_config({"name": "hand"}))
    assert answer.error is None
    assert answer.scores == [0.0] * 6
    assert statistics["scoring/hand_latency_p95"] > 0


@pytest.mark.usefixtures("cluster")
def test_a_users_requirement_is_there_and_the_core_is_not() -> None:
    (answer,), _ = _scores(
        _config(_own("NeedsPackage", requirements=["colormath==3.0.0", "numpy<2"]))
    )
    assert answer.scores == [1.0] * 6, answer.error


@pytest.mark.usefixtures("cluster")
def test_a_requirement_that_cannot_be_installed_is_named_with_the_installers_words() -> None:
    config = _config(_own("NeedsPackage", requirements=["no-such-package-at-all==9.9"]))
    with pytest.raises(RewardError) as caught:
        _scores(config)
    message = str(caught.value)
    assert "no-such-package-at-all==9.9" in message
    assert "was not found in the package registry" in message or "no versions" in message
    assert "Traceback" not in message


@pytest.mark.usefixtures("cluster")
def test_a_missing_or_unfit_interpreter_is_named() -> None:
    for path in ("/no/such/python", "/bin/false"):
        with pytest.raises(TexForceError, match=path):
            _scores(_config({"name": "hand", "environment": path}))


@pytest.mark.usefixtures("cluster")
def test_a_hanging_server_is_restarted_and_the_call_repeated(tmp_path: Path) -> None:
    reward = _own("SleepsOnce", kwargs={"marker": str(tmp_path / "slept")}, timeout_s=2, retries=2)
    (answer,), _ = _scores(_config(reward))
    assert answer.scores == [1.0] * 6, answer.error


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("name", "seconds", "cause"),
    [("Sleeper", 1, "no answer within 1 s"), ("Dies", 30, "the actor died")],
)
def test_a_server_that_never_answers_or_dies_ends_as_unscored(
    name: str, seconds: float, cause: str
) -> None:
    (answer,), _ = _scores(_config(_own(name, timeout_s=seconds, retries=1)))
    assert answer.scores is None
    assert answer.error is not None
    assert f"reward-{name}-0" in answer.error
    assert cause in answer.error


@pytest.mark.usefixtures("cluster")
def test_nan_stays_nan() -> None:
    (answer,), statistics = _scores(_config(_own("ThirdNaN")))
    assert np.isnan(answer.scores or []).tolist() == [True, False, False] * 2
    assert statistics["scoring/ThirdNaN_retries"] == 0


@pytest.mark.usefixtures("cluster")
def test_units_are_merged_when_asked_for_and_one_bad_unit_does_not_mask_the_others() -> None:
    alone, _ = _scores(_config(_own("BatchSize")), units=3)
    assert [answer.scores for answer in alone] == [[6.0] * 6] * 3
    merged, statistics = _scores(_config(_own("BatchSize", merge_units=3)), units=3)
    assert [answer.scores for answer in merged] == [[18.0] * 6] * 3
    assert statistics["scoring/BatchSize_queue_max"] == 2
    spoilt, statistics = _scores(
        _config(_own("BatchSize", merge_units=3, retries=1)), units=3, black=(1,)
    )
    assert [answer.scores for answer in spoilt] == [[6.0] * 6, None, [6.0] * 6]
    assert "a black image" in str(spoilt[1].error)
    assert statistics["scoring/BatchSize_retries"] == 3  # each of them alone
    # Two units wait in vain for a third: they are scored all the same.
    pair, _ = _scores(_config(_own("BatchSize", merge_units=3)), units=2)
    assert [answer.scores for answer in pair] == [[12.0] * 6] * 2


@pytest.mark.usefixtures("cluster")
def test_a_class_that_cannot_be_made_is_named() -> None:
    config = _config({"target": "tests.rewards.bad:SleepsOnce", "label": "mine"})
    with pytest.raises((RewardError, ActorError), match=r"SleepsOnce.*marker"):
        _scores(config)


def test_environment_choices_are_checked_before_anything_starts() -> None:
    from texforce_ray.cluster.environments import reward_environment

    with pytest.raises(RewardError, match=r"'driver', 'isolated' or the absolute path"):
        reward_environment(RewardConfig(name="hand", environment="elsewhere"))
    with pytest.raises(RewardError, match="cannot install requirements"):
        reward_environment(RewardConfig(name="hand", environment="driver", requirements=("x",)))
    assert reward_environment(RewardConfig(name="shapes")) is None
    assert reward_environment(RewardConfig(name="hand", environment="driver")) is None
    named = reward_environment(RewardConfig(name="iqa:piqe"))
    assert getattr(named, "name", None) == "pyiqa"
    assert (
        getattr(reward_environment(RewardConfig(name="shapes", environment="isolated")), "name", "")
        == "light"
    )
