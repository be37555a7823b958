"""The pool on real Ray: killed, hanging and raising actors. No torch, so restarts are quick."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from typing import Any

import pytest
import ray

from texforce_ray.actors.messages import Whereabouts, whereabouts
from texforce_ray.cluster.placement import actor_options
from texforce_ray.crew.budget import Budget
from texforce_ray.crew.pool import ActorPool
from texforce_ray.errors import ActorError, ConfigError, PeerLostError

pytestmark = pytest.mark.usefixtures("small_cluster")


class Worker:
    """Answers as an actor does."""

    def __init__(self, error: str | None = None) -> None:
        if error:
            raise ConfigError(error)

    def ready(self) -> Whereabouts:
        return whereabouts("cpu")

    def work(self, value: int) -> tuple[int, int]:
        return value, value * 10

    def die_once(self, marker: str) -> int:
        if not os.path.exists(marker):
            open(marker, "w").close()
            os._exit(1)
        return 7

    def die_loudly(self) -> None:
        print("the disk is on fire", file=sys.stderr, flush=True)
        os._exit(3)

    def hang_once(self, marker: str) -> int:
        if not os.path.exists(marker):
            open(marker, "w").close()
            time.sleep(60)
        return 8

    def fail(self) -> None:
        raise KeyError("no such thing")

    def refuse(self) -> None:
        raise ConfigError("this key is wrong")

    def break_once(self, marker: str, message: str) -> int:
        """As torch does: once its context is broken, the process fails at everything."""
        if not os.path.exists(marker):
            open(marker, "w").close()
            self.broken = message
        if message := getattr(self, "broken", ""):
            raise RuntimeError(message)
        return 9

    def run_out(self) -> None:
        class OutOfMemoryError(RuntimeError):
            """As torch.OutOfMemoryError, which the driver cannot import."""

        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")


class LateDeath(Worker):
    """Its process ends between its constructor and its first answer."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        self.marker = marker

    def ready(self) -> str:
        if not os.path.exists(self.marker):
            open(self.marker, "w").close()
            os._exit(1)
        return super().ready()


class Visible(Worker):
    def seen(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")


def pool(size: int = 1, retries: int = 2, **kwargs: Any) -> ActorPool:
    actor = ray.remote(Worker).options(num_cpus=0, max_restarts=3)
    return ActorPool("worker", [actor.remote(**kwargs) for _ in range(size)], retries=retries)


def started(workers: ActorPool) -> list[str]:
    return [member.name for member in workers.members() if member.state == "idle"]


def run(workers: ActorPool, method: str, *arguments: Any, timeout: float = 30) -> Any:
    async def once() -> Any:
        value, _ = await workers.run(
            f"doing {method}", lambda a: getattr(a, method).remote(*arguments), timeout
        )
        return value

    return asyncio.run(once())


def test_first_value_is_fetched_and_the_rest_stay_references() -> None:
    async def go() -> None:
        value, (rest,) = await pool().run(
            "work", lambda a: a.work.options(num_returns=2).remote(4), 30
        )
        assert value == 4
        assert isinstance(rest, ray.ObjectRef)
        assert await rest == 40

    asyncio.run(go())


def test_many_tasks_on_few_actors_all_finish() -> None:
    async def go() -> list[int]:
        workers = pool(2)
        jobs = [
            workers.run("work", lambda a, i=i: a.work.options(num_returns=2).remote(i), 30)
            for i in range(20)
        ]
        return [value for value, _ in await asyncio.gather(*jobs)]

    assert asyncio.run(go()) == list(range(20))


def test_a_killed_actor_is_restarted_and_its_task_done_again(tmp_path: Any) -> None:
    workers = pool()
    assert run(workers, "die_once", str(tmp_path / "died")) == 7
    assert workers.restarts == 1


def test_who_died_where_and_what_it_wrote_last_is_said(tmp_path: Any) -> None:
    with pytest.raises(ActorError) as caught:
        run(pool(retries=0), "die_loudly")
    message = str(caught.value)
    assert re.match(r"worker-0 \(cpu, pid \d+ on [\d.]+\) failed at doing die_loudly", message)
    assert "after 1 tries: the actor died" in message
    assert "the disk is on fire" in message


def test_a_run_has_a_budget_of_failures(tmp_path: Any) -> None:
    workers, budget = pool(), Budget(1)
    workers.budget = budget
    assert run(workers, "die_once", str(tmp_path / "first")) == 7
    with pytest.raises(ActorError, match=r"failed 2 times in this run \(ray\.max_run_restarts"):
        run(pool_of(workers), "die_once", str(tmp_path / "second"))


def pool_of(other: ActorPool) -> ActorPool:
    """The same actors and budget, for another event loop."""
    return ActorPool("worker", other.actors, retries=2, budget=other.budget)


def test_a_hanging_actor_is_killed_and_its_task_done_again(tmp_path: Any) -> None:
    workers = pool()
    assert run(workers, "hang_once", str(tmp_path / "hung"), timeout=2) == 8
    assert workers.restarts == 1


def test_an_actor_with_a_broken_gpu_is_replaced(tmp_path: Any) -> None:
    workers, message = pool(), "CUDA error: an illegal memory access was encountered"
    workers.budget = Budget(1)
    assert run(workers, "break_once", str(tmp_path / "broken"), message) == 9
    assert (workers.restarts, workers.budget.spent) == (1, 1)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("rollout", "rollout.batch_size or rollout.decode_batch_size"),
        ("learner", "learner.microbatch_size"),
        ("reward-hps", "batch_size of the reward 'hps'"),
    ],
)
def test_too_little_gpu_memory_says_what_to_lower(name: str, key: str) -> None:
    workers = pool(retries=0)
    workers.name = name
    with pytest.raises(ActorError, match=rf"CUDA out of memory.*; lower {key}"):
        run(workers, "run_out")


def test_an_actor_that_dies_at_its_first_start_comes_back(tmp_path: Any) -> None:
    actor = ray.remote(LateDeath).options(num_cpus=0, max_restarts=3)
    budget = Budget(1)
    workers = ActorPool("worker", [actor.remote(str(tmp_path / "d"))], retries=0, budget=budget)
    asyncio.run(workers.ready(30))
    assert started(workers) == ["worker-0"]
    assert budget.spent == 1


def test_what_asks_for_no_gpu_sees_none() -> None:
    @ray.remote
    def task() -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    actors = [
        ray.remote(Visible).options(**actor_options({"CPU": 0, "GPU": gpus})).remote()
        for gpus in (0, 1)
    ]
    refs = [*(actor.seen.remote() for actor in actors), task.options(**actor_options({})).remote()]
    none, one, in_task = ray.get(refs, timeout=60)
    assert (none, in_task) == ("", "")
    assert one in ("0", "1")


def test_work_continues_while_a_killed_actor_comes_back(tmp_path: Any) -> None:
    async def go() -> None:
        workers = pool(2)
        await workers.ready(30)
        ray.kill(workers.actors[0], no_restart=False)
        jobs = [
            workers.run("work", lambda a, i=i: a.work.options(num_returns=2).remote(i), 30)
            for i in range(6)
        ]
        answers = await asyncio.wait_for(asyncio.gather(*jobs), 60)
        assert [value for value, _ in answers] == list(range(6))
        workers.kill()

    asyncio.run(go())


def test_actors_without_room_join_when_there_is_some() -> None:
    async def go() -> None:
        actor = ray.remote(Worker)
        first = actor.options(num_cpus=0).remote()
        blocker = actor.options(num_cpus=2).remote()
        await blocker.ready.remote()
        late = actor.options(num_cpus=2).remote()  # there are two CPUs, both are taken
        workers = ActorPool("worker", [first, late], retries=0)
        await workers.ready(30, at_least=1)
        assert started(workers) == ["worker-0"]
        await workers.run("work", lambda a: a.work.options(num_returns=2).remote(1), 30)
        ray.kill(blocker)
        await workers.ready(30)
        assert started(workers) == ["worker-0", "worker-1"]
        workers.kill()

    asyncio.run(go())


class Member(Worker):
    def together(self, rank: int, marker: str) -> tuple[int, int]:
        if rank == 1 and not os.path.exists(marker):
            open(marker, "w").close()
            os._exit(1)
        return rank, rank * 10

    def with_a_peer(self, rank: int, marker: str) -> tuple[int, int]:
        """As a learner whose peer dies: it reports that before Ray reports which actor died."""
        if rank == 1 and not os.path.exists(marker):
            time.sleep(1)
        if rank == 0 and not os.path.exists(marker):
            raise PeerLostError("the connection was closed")
        return self.together(rank, marker)

    def on_a_broken_gpu(self, rank: int, marker: str) -> tuple[int, int]:
        """The others wait for it: without its error, they would wait until the deadline."""
        if not os.path.exists(marker):
            if rank == 1:
                open(marker, "w").close()
                raise RuntimeError("CUDA error: device-side assert triggered")
            time.sleep(60)
        return rank, rank * 10


@pytest.mark.parametrize("method", ["together", "with_a_peer", "on_a_broken_gpu"])
def test_who_works_together_starts_again_together(tmp_path: Any, method: str) -> None:
    async def go() -> None:
        actor = ray.remote(Member).options(num_cpus=0, max_restarts=3)
        workers = ActorPool("learner", [actor.remote() for _ in range(3)], retries=2)
        tries: list[int] = []

        async def prepare() -> Any:
            tries.append(len(tries))
            return lambda rank, a: (
                getattr(a, method).options(num_returns=2).remote(rank, str(tmp_path / "died"))
            )

        value, (rest,) = await workers.run_together("an update", prepare, 30)
        assert (value, await rest) == (0, 0)
        assert tries == [0, 1]
        assert workers.restarts == 1
        workers.kill()

    asyncio.run(go())


def test_an_error_names_actor_task_and_cause() -> None:
    with pytest.raises(ActorError) as caught:
        run(pool(), "fail")
    message = str(caught.value)
    assert "worker-0" in message
    assert "doing fail" in message
    assert "KeyError" in message
    assert "no such thing" in message
    assert "\n" not in message


def test_our_own_errors_arrive_as_they_are() -> None:
    with pytest.raises(ConfigError, match=r"^this key is wrong$"):
        run(pool(), "refuse")


def test_a_constructors_error_arrives_as_it_is() -> None:
    with pytest.raises(ConfigError, match="bad model"):
        asyncio.run(pool(error="bad model").ready(30))
