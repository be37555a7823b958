"""`train`: a whole run, including start, restore, stop and cleanup."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from texforce_ray.actors.roles import Roles
from texforce_ray.cluster.answers import readable
from texforce_ray.cluster.connection import connected
from texforce_ray.config import Config
from texforce_ray.config.io import resolve_run_dir
from texforce_ray.crew.opening import open_crew
from texforce_ray.crew.sizing import needs_sizes, with_sizes
from texforce_ray.driver.inputs import PromptSets, check_inputs
from texforce_ray.driver.loop import training_loop
from texforce_ray.driver.recorder import Recorder
from texforce_ray.driver.session import Session, restore
from texforce_ray.driver.signals import cancel_on_signal
from texforce_ray.errors import Interrupted, TexForceError
from texforce_ray.observability.monitor import Monitor
from texforce_ray.observability.progress import Progress
from texforce_ray.records.exclusive import check_exclusive
from texforce_ray.records.run_directory import RunDirectory, check_resumable, digest

Changes = dict[str, tuple[Any, Any]]  # settings changed by a resume: before and after


@dataclass(frozen=True)
class RunResult:
    """Where the results of a finished run are, and the final comparison if there was one.

    comparison: for each reward and 'total': base, tuned, difference, low, high, images; unseen:
    the same on `eval.unseen`; guidance: the total at each of `eval.guidance_curve`.
    """

    run_dir: Path
    adapter: Path
    iterations: int
    seconds: float
    comparison: dict[str, dict[str, float]]
    unseen: dict[str, dict[str, float]]
    guidance: list[dict[str, Any]]


def train(config: Config, *, resume: bool = False, roles: Roles = Roles()) -> RunResult:  # noqa: B008 - immutable
    """Run a configuration to completion; the same as `python -m texforce_ray.run`.

    Args:
        config: what to run.
        resume: continue the run in `config.run_dir` from its newest complete checkpoint.
        roles: actor classes, if others should stand in for the default ones.

    Raises:
        TexForceError: anything that a user can act on; `Interrupted` after SIGINT or SIGTERM.
    """
    config = resolve_run_dir(config)
    prompts = check_inputs(config, new=not resume)
    changes = check_resumable(config, digest(prompts.all())) if resume else None
    if resume:
        check_exclusive(Path(config.run_dir))
    job = _train(config, prompts, changes, roles)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(job)
    return _run_beside(job)


def _run_beside(job: Coroutine[Any, Any, RunResult]) -> RunResult:
    """Run in a thread: a notebook already runs an event loop, in which ours cannot start."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    async def body() -> RunResult:
        task = asyncio.current_task()
        assert task is not None
        started.set_result((asyncio.get_running_loop(), task))
        return await job

    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(lambda: asyncio.run(body()))
        try:
            return result.result()
        except KeyboardInterrupt:
            # Only the main thread gets this; the run must stop too, and leave its checkpoint.
            loop, task = started.result()
            loop.call_soon_threadsafe(task.cancel)
            return result.result()


async def _train(
    config: Config, prompts: PromptSets, changes: Changes | None, roles: Roles
) -> RunResult:
    """`changes`: None for a new run."""
    began = time.monotonic()
    checkpoint = None if changes is None else restore(config)
    start = checkpoint.iteration if checkpoint else 0
    with contextlib.ExitStack() as cleanup:
        if needs_sizes(config):  # must be resolved before the config is stored
            cleanup.enter_context(connected(config))
            config = await with_sizes(config)
        directory = cleanup.enter_context(_directory(config, prompts, start, changes))
        cleanup.enter_context(connected(config))
        cleanup.enter_context(cancel_on_signal())
        progress = cleanup.enter_context(Progress(config.iterations, start))
        recorder = Recorder(config, directory)
        monitor = cleanup.enter_context(Monitor(config, directory, start))
        progress.message(f"run directory: {config.run_dir}")
        session: Session | None = None
        try:
            async with open_crew(
                config, roles=roles, report=progress.message, started=monitor.follow
            ) as crew:
                session = await Session.start(config, prompts, crew, recorder, progress, checkpoint)
                cleanup.enter_context(_frozen_heap())
                await session.catch_up()
                await training_loop(session)
                comparison = await session.finish()
        except (RayError, TexForceError) as error:
            # Keep finished iterations, whatever failed after them.
            if session is not None and session.policy.version > start:
                with contextlib.suppress(RayError, TexForceError):
                    await session.checkpoint()
            if isinstance(error, RayError):
                raise readable("driver", "fetching a result", error) from None
            raise
        except asyncio.CancelledError:
            progress.message("stopping; writing a checkpoint ...")
            done = start
            if session is not None:
                done = session.policy.version
                await session.checkpoint()
            raise Interrupted(
                f"stopped after {done} of {config.iterations} iterations; resume with: "
                f"python -m texforce_ray.run --resume {directory.path}"
            ) from None
        return RunResult(
            run_dir=directory.path,
            adapter=directory.path / "adapter",
            iterations=session.policy.version,
            seconds=time.monotonic() - began,
            comparison=comparison.rewards,
            unseen=comparison.unseen,
            guidance=comparison.guidance,
        )


@contextlib.contextmanager
def _frozen_heap() -> Iterator[None]:
    """Let the garbage collector look at new objects only: every unit of work makes some.

    Going over all objects of Ray and the libraries again was an eighth of the driver's time.
    """
    ours = not gc.get_freeze_count()  # else somebody in this process has their own plan
    if ours:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def _directory(
    config: Config, prompts: PromptSets, start: int, changes: Changes | None
) -> RunDirectory:
    if changes is None:
        return RunDirectory.create(config, digest(prompts.all()))
    return RunDirectory.reopen(config, start, changes)
