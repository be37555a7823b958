"""Starts all actors of a run in the right order, and stops them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from texforce_ray.actors.roles import Roles
from texforce_ray.cluster.autoscaling import Autoscaler
from texforce_ray.cluster.environments import prepare_environments
from texforce_ray.cluster.placement import wait_for_room
from texforce_ray.config import Config
from texforce_ray.crew.crew import Crew

Report = Callable[[str], None]


@contextlib.asynccontextmanager
async def open_crew(
    config: Config,
    *,
    learner: bool = True,
    roles: Roles = Roles(),  # noqa: B008 - immutable
    report: Report,
    started: Callable[[Crew], None] = lambda _: None,
) -> AsyncIterator[Crew]:
    """All actors, ready for work; this process must be in a cluster: see `connected`.

    Args:
        config: of the run.
        learner: whether learners are needed.
        roles: actor classes.
        report: receives progress messages, also about what a silent run is waiting for.
        started: receives the crew when its actors are submitted, before they are ready.

    Raises:
        ResourceError: no room on the cluster.
        ActorError: an actor failed to start, or to start in time.
        RewardError: a reward's environment could not be built.
    """
    with contextlib.ExitStack() as cleanup:
        autoscaler = Autoscaler(config, learner=learner)
        cleanup.callback(autoscaler.withdraw)
        await wait_for_room(config, learner=learner, autoscaler=autoscaler, report=report)
        crew = Crew(config, await prepare_environments(config), learner=learner, roles=roles)
        cleanup.callback(crew.close)
        cleanup.callback(_report_silence(crew, config.ray.watchdog_s, report).cancel)
        started(crew)
        report("starting actors (their imports take a moment) ...")
        await crew.ready()
        autoscaler.withdraw()  # the actors hold their nodes now
        yield crew


def _report_silence(crew: Crew, patience: float, report: Report) -> asyncio.Task[None]:
    """Report what the run is waiting for whenever no task finishes for `patience` seconds."""

    async def watch() -> None:
        while True:
            await asyncio.sleep(patience / 4)
            if crew.silence() >= patience:
                report(f"waiting for {'; '.join(crew.waiting()) or 'actors to start'}")

    return asyncio.ensure_future(watch())
