"""The driver: one Ray job that coordinates rollouts, rewards and learner. Read `_iterate` first.

It moves references between actors; of tensors it only keeps the policy and the learner's state, so
that no lost node takes them along. It is the only writer of the run directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from texforce_ray.actors.autoscaling import Autoscaler
from texforce_ray.actors.connection import check_startable, connect
from texforce_ray.actors.crew import Crew, Roles
from texforce_ray.actors.environments import chosen, prepare_environments
from texforce_ray.actors.placement import wait_for_room
from texforce_ray.actors.pool import readable
from texforce_ray.actors.sizing import needs_sizes, with_sizes
from texforce_ray.collect import (
    ScoredBatch,
    TrainingBatch,
    check_masked,
    collect,
    count_truncated,
    plan_units,
)
from texforce_ray.config import Config
from texforce_ray.config_io import resolve_run_dir
from texforce_ray.errors import CheckpointError, Interrupted, TexForceError
from texforce_ray.evaluation import Comparison, compare, compare_over_guidance, evaluate
from texforce_ray.model.location import find_adapter, locate_model
from texforce_ray.monitor import Monitor
from texforce_ray.policy import Policy
from texforce_ray.prompts import Prompt, load_prompts
from texforce_ray.recorder import Recorder
from texforce_ray.records.checkpoint import (
    Checkpoint,
    checkpoints,
    newest_checkpoint,
    step_of,
)
from texforce_ray.records.exclusive import check_exclusive
from texforce_ray.records.progress import Progress
from texforce_ray.records.rescaled import drop_old_totals
from texforce_ray.records.run_directory import RunDirectory, check_resumable, digest
from texforce_ray.records.tracking import check_trackers
from texforce_ray.rewards import check_differentiable, resolve
from texforce_ray.rl.baseline import Baseline
from texforce_ray.signals import cancel_on_signal

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class PromptSets:
    """What is trained on, what is evaluated on, and what the end compares on besides."""

    train: list[Prompt]
    evaluation: list[Prompt]
    unseen: list[Prompt]

    def all(self) -> list[Prompt]:
        return [*self.train, *self.evaluation, *self.unseen]


@dataclass(frozen=True)
class _Run:
    """What every part of a run needs."""

    config: Config
    prompts: PromptSets
    crew: Crew
    recorder: Recorder
    progress: Progress


def train(config: Config, *, resume: bool = False, roles: Roles = Roles()) -> RunResult:  # noqa: B008 - immutable
    """Run a configuration to its end; the same as `python -m texforce_ray.run`.

    Args:
        config: what to run.
        resume: continue the run in `config.run_dir` from its newest whole checkpoint.
        roles: actor classes, where others stand in for them.

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
    """Run in a thread: a notebook runs a loop of its own, in which ours cannot be started."""
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
            # Only the main thread hears of it; the run must stop too, and leave its checkpoint.
            loop, task = started.result()
            loop.call_soon_threadsafe(task.cancel)
            return result.result()


def check_inputs(config: Config, *, new: bool = True) -> PromptSets:
    """All prompts; fails before anything is started if an input is wrong.

    `new`: a run that begins; one that is resumed no longer needs the adapter that it began with.
    """
    check_startable(config)
    model = config.model
    locate_model(model.path, model.variant, model.single_file_config)
    if new and config.lora.init is not None:
        find_adapter(Path(config.lora.init).expanduser(), f"lora.init: {config.lora.init}")
    check_trackers(config.track)
    for reward in config.rewards:
        resolve(reward.name, reward.target)
        chosen(reward)
        if config.direct is not None and reward.weight:
            check_differentiable(reward.name)
    train = load_prompts(config.prompts.train)
    return PromptSets(
        train=train,
        evaluation=load_prompts(config.eval.prompts) if config.eval.prompts else train,
        unseen=load_prompts(config.eval.unseen) if config.eval.unseen else [],
    )


async def _iterate(run: _Run, policy: Policy, baseline: Baseline) -> None:
    """Sample, score, update, publish; with k = 1 the next iteration is sampled meanwhile."""
    config, crew, recorder = run.config, run.crew, run.recorder
    under_way: dict[int, asyncio.Task[ScoredBatch]] = {}

    def sample_ahead() -> None:
        """Start all iterations whose policy version is there."""
        furthest = min(policy.version + config.max_staleness, config.iterations - 1)
        for ahead in range(policy.version, furthest + 1):
            if ahead not in under_way:
                units = plan_units(config, run.prompts.train, ahead)
                version = units[0].policy_version
                job = collect(crew, units, policy.snapshots[version], policy.effects.get(version))
                under_way[ahead] = asyncio.ensure_future(job)

    try:
        for iteration in range(policy.version, config.iterations):
            recorder.start_iteration()
            sample_ahead()
            with recorder.phase("rollout_wait"):
                batch = await under_way.pop(iteration)
            mask = batch.scored & recorder.recorded_mask(batch)
            check_masked(config, batch.rewards, batch.errors, f"iteration {iteration}")
            training = TrainingBatch(batch, mask, *baseline.advantages(batch, mask))
            await recorder.samples(training)
            with recorder.phase("update"):
                update = await policy.update(crew, training)
            baseline.commit()
            try:
                if config.eval.every and policy.version % config.eval.every == 0:
                    with recorder.phase("evaluation"):
                        await _evaluate(run, policy)
                sample_ahead()  # actors work while the driver writes
            finally:  # the version is there: a checkpoint without its line would be a gap for ever
                await recorder.iteration(training, update, policy, baseline, crew)
            for warning in recorder.take_warnings():
                run.progress.message(f"warning: {warning}")
            run.progress.update(policy.version, recorder.reward, recorder.samples_per_second)
            # The last references to its trajectories: the object store is free for the next ones.
            del batch, training
    finally:
        for task in under_way.values():
            task.cancel()
        await asyncio.gather(*under_way.values(), return_exceptions=True)


async def _evaluate(run: _Run, policy: Policy) -> None:
    """Scores and a grid of the evaluation's prompts and seeds, the same ones every time."""
    count = run.config.eval.images
    result = await evaluate(run.crew, run.prompts.evaluation, count, policy.evaluated)
    run.recorder.evaluation(policy.version, result)


async def _evaluate_again(run: _Run, policy: Policy) -> None:
    """The evaluation that the run was stopped in."""
    run.progress.message(f"evaluating version {policy.version}: the run was stopped in it")
    await _evaluate(run, policy)


async def _finish(run: _Run, policy: Policy) -> Comparison:
    """Final adapter, comparison of base and tuned, report."""
    config, crew, prompts = run.config, run.crew, run.prompts
    results, comparison = None, Comparison({}, {}, [])
    if count := config.eval.final_images:
        run.progress.message(f"comparing base and tuned on {count} images each ...")
        names = [reward.key for reward in config.rewards]
        seen, *more = [
            [await evaluate(crew, chosen, count, which) for which in ([], policy.evaluated)]
            for chosen in (prompts.evaluation, prompts.unseen)
            if chosen
        ]
        sets = {"seen": prompts.evaluation, "unseen": prompts.unseen}
        comparison = Comparison(
            rewards=compare(names, *seen),
            unseen=compare(names, *more[0]) if more else {},
            guidance=await compare_over_guidance(
                crew, {name: chosen for name, chosen in sets.items() if chosen}, policy.evaluated
            ),
        )
        results = seen[0], seen[1]
    (snapshot,) = await crew.fetch(policy.evaluated)
    files = await crew.export(policy.evaluated)
    run.recorder.finish(files, snapshot.shapes, comparison, results)
    return comparison


async def _train(
    config: Config,
    prompts: PromptSets,
    changes: dict[str, tuple[Any, Any]] | None,
    roles: Roles,
) -> RunResult:
    """Everything around the loop: start, restore, stop, clean up.

    `changes`: of settings, where an existing run is resumed; None for a new one.
    """
    began, resume = time.monotonic(), changes is not None
    checkpoint = _restore(config) if resume else None
    with contextlib.ExitStack() as cleanup:
        start = checkpoint.iteration if checkpoint else 0
        if needs_sizes(config):  # before they are stored
            _reach(config, cleanup)
            config = await with_sizes(config)
        if resume:
            directory = RunDirectory.reopen(config, start, changes)
        else:
            directory = RunDirectory.create(config, digest(prompts.all()))
        cleanup.enter_context(directory)
        _reach(config, cleanup)
        cleanup.enter_context(cancel_on_signal())
        progress = cleanup.enter_context(Progress(config.iterations, start))
        recorder = Recorder(config, directory)
        monitor = cleanup.enter_context(Monitor(config, directory, start))
        policy: Policy | None = None
        baseline = _baseline(config, checkpoint, progress)
        try:
            autoscaler = Autoscaler(config)
            cleanup.callback(autoscaler.give_back)
            await wait_for_room(config, autoscaler=autoscaler, say=progress.message)
            crew = Crew(config, await prepare_environments(config), roles=roles)
            cleanup.callback(crew.close)
            monitor.crew = crew
            cleanup.callback(_watch(crew, config.ray.watchdog_s, progress).cancel)
            run = _Run(config, prompts, crew, recorder, progress)
            policy = await _start(run, checkpoint)
            autoscaler.give_back()  # the actors hold their nodes now
            await recorder.catch_up(policy, baseline, partial(_evaluate_again, run, policy))
            await _iterate(run, policy, baseline)
            comparison = await _finish(run, policy)
        except (RayError, TexForceError) as error:
            # What is finished is kept, whatever broke after it.
            if policy is not None and policy.version > start:
                with contextlib.suppress(RayError, TexForceError):
                    await recorder.checkpoint(policy, baseline)
            if isinstance(error, RayError):
                raise readable("driver", "fetching a result", error) from None
            raise
        except asyncio.CancelledError:
            done = start if policy is None else policy.version
            progress.message("stopping; writing a checkpoint ...")
            if policy is not None:
                await recorder.checkpoint(policy, baseline)
            raise Interrupted(
                f"stopped after {done} of {config.iterations} iterations; continue with: "
                f"python -m texforce_ray.run --resume {directory.path}"
            ) from None
        seconds = time.monotonic() - began
        adapter = directory.path / "adapter"
        return RunResult(
            directory.path, adapter, policy.version, seconds,
            comparison.rewards, comparison.unseen, comparison.guidance,
        )  # fmt: skip


def _watch(crew: Crew, patience: float, progress: Progress) -> asyncio.Task[None]:
    """Say what is waited for whenever nothing was finished for `patience` seconds."""

    async def watch() -> None:
        while True:
            await asyncio.sleep(patience / 4)
            if crew.silence() >= patience:
                progress.message(f"waiting for {'; '.join(crew.waiting()) or 'actors to start'}")

    return asyncio.ensure_future(watch())


def _reach(config: Config, cleanup: contextlib.ExitStack) -> None:
    if connect(config):
        cleanup.callback(ray.shutdown)


def _restore(config: Config) -> Checkpoint | None:
    checkpoint = newest_checkpoint(Path(config.run_dir))
    if checkpoint is not None or not (damaged := checkpoints(Path(config.run_dir))):
        return checkpoint
    if step_of(damaged[0]) > config.checkpoint.every:  # there were others before, deleted since
        raise CheckpointError(
            f"no checkpoint in {config.run_dir}/checkpoints is whole; move that folder away to "
            "start from the beginning"
        )
    log.warning("no checkpoint is whole, the run's first one included: starting it again")
    return None


def _baseline(config: Config, checkpoint: Checkpoint | None, progress: Progress) -> Baseline:
    """What is remembered of prompts' rewards, as far as it still holds."""
    if checkpoint is None:
        return Baseline(config, {})
    remembered, dropped = drop_old_totals(Path(config.run_dir), config, checkpoint)
    for text in dropped:
        progress.message(text)
    return Baseline(config, remembered)


async def _start(run: _Run, checkpoint: Checkpoint | None) -> Policy:
    """Wait for the actors, publish the first version, look at the base model."""
    run.progress.message(f"run directory: {run.config.run_dir}")
    run.progress.message("starting actors (their imports take a moment) ...")
    await run.crew.ready()
    run.recorder.truncated, warning = await count_truncated(run.crew, run.prompts.all())
    if warning:
        run.progress.message(warning)
    policy = await Policy.start(run.crew, run.config, checkpoint)
    if run.config.eval.every:
        # Drawn again by a resumed run: what follows is compared with it, image by image.
        base = await evaluate(run.crew, run.prompts.evaluation, run.config.eval.images, [])
        run.recorder.base_evaluation(base, new=policy.version == 0)
        run.progress.message(f"base model: evaluation reward {run.recorder.evaluated:.3f}")
    return policy
