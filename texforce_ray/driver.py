"""The driver: one Ray job that coordinates rollouts, rewards and learner. Read `_iterate` first.

It moves references between actors and never touches a tensor; it is the only writer of the run
directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayError

from texforce_ray.actors.crew import Crew, connect
from texforce_ray.actors.pool import readable
from texforce_ray.collect import ScoredBatch, check_masked, collect, plan_units
from texforce_ray.config import Config
from texforce_ray.config_io import resolve_run_dir
from texforce_ray.errors import CheckpointError, Interrupted, TexForceError
from texforce_ray.evaluation import compare, evaluate
from texforce_ray.model.location import locate_model
from texforce_ray.policy import Policy
from texforce_ray.prompts import Prompt, load_prompts
from texforce_ray.recorder import Recorder
from texforce_ray.records.checkpoint import Checkpoint, checkpoints, newest_checkpoint
from texforce_ray.records.progress import Progress
from texforce_ray.records.run_directory import RunDirectory, check_resumable
from texforce_ray.rewards import resolve
from texforce_ray.rl.baseline import Baseline
from texforce_ray.signals import cancel_on_signal


@dataclass(frozen=True)
class RunResult:
    """Where the results of a finished run are, and the final comparison if there was one.

    comparison: for each reward and 'total': base, tuned, difference, low, high, images.
    """

    run_dir: Path
    adapter: Path
    iterations: int
    seconds: float
    comparison: dict[str, dict[str, float]]


@dataclass(frozen=True)
class _Run:
    """What every part of a run needs."""

    config: Config
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    crew: Crew
    recorder: Recorder
    progress: Progress


def train(config: Config, *, resume: bool = False) -> RunResult:
    """Run a configuration to its end; the same as `python -m texforce_ray.run`.

    Args:
        config: what to run.
        resume: continue the run in `config.run_dir` from its newest whole checkpoint.

    Raises:
        TexForceError: anything that a user can act on; `Interrupted` after SIGINT or SIGTERM.
    """
    config = resolve_run_dir(config)
    check_inputs(config)
    if resume:
        check_resumable(config)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_train(config, resume))
    # A notebook runs a loop of its own, in which ours cannot be started.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(_train(config, resume))).result()


def check_inputs(config: Config) -> tuple[list[Prompt], list[Prompt]]:
    """Training and evaluation prompts; fails before anything is started if an input is wrong."""
    locate_model(config.model.path)
    for reward in config.rewards:
        resolve(reward.name, reward.target)
    prompts = load_prompts(config.prompts.train)
    return prompts, load_prompts(config.eval.prompts) if config.eval.prompts else prompts


async def _iterate(run: _Run, policy: Policy, baseline: Baseline) -> None:
    """Sample, score, update, publish; with k = 1 the next iteration is sampled meanwhile."""
    config, crew, recorder = run.config, run.crew, run.recorder
    under_way: dict[int, asyncio.Task[ScoredBatch]] = {}
    try:
        for iteration in range(policy.version, config.iterations):
            recorder.start_iteration()
            furthest = min(iteration + config.max_staleness, config.iterations - 1)
            for ahead in range(iteration, furthest + 1):
                if ahead not in under_way:
                    units = plan_units(config, run.prompts, ahead)
                    snapshot = policy.snapshots[units[0].policy_version]
                    under_way[ahead] = asyncio.ensure_future(collect(crew, units, snapshot))
            with recorder.phase("rollout_wait"):
                batch = await under_way.pop(iteration)
            mask = batch.scored & recorder.recorded_mask(batch)
            check_masked(config, batch.rewards, batch.errors, f"iteration {iteration}")
            total, advantages = baseline.advantages(batch, mask)
            recorder.samples(batch, mask, total, advantages)
            with recorder.phase("update"):
                update = await policy.update(crew, batch, advantages, mask)
            baseline.commit()
            if config.eval.every and policy.version % config.eval.every == 0:
                with recorder.phase("evaluation"):
                    await _evaluate(run, policy)
            await recorder.iteration(batch, mask, total, advantages, update, policy, baseline, crew)
            run.progress.update(policy.version, recorder.reward, recorder.samples_per_second)
    finally:
        for task in under_way.values():
            task.cancel()
        await asyncio.gather(*under_way.values(), return_exceptions=True)


async def _evaluate(run: _Run, policy: Policy) -> None:
    """Scores and a grid of held-out prompts or seeds, the same ones every time."""
    result = await evaluate(run.crew, run.eval_prompts, run.config.eval.images, policy.evaluated)
    run.recorder.evaluation(policy.version, result)


async def _finish(run: _Run, policy: Policy) -> dict[str, dict[str, float]]:
    """Final adapter, comparison of base and tuned, report."""
    config, crew = run.config, run.crew
    results, comparison = None, {}
    if count := config.eval.final_images:
        run.progress.message(f"comparing base and tuned on {count} images each ...")
        base = await evaluate(crew, run.eval_prompts, count, [])
        tuned = await evaluate(crew, run.eval_prompts, count, policy.evaluated)
        comparison = compare([reward.key for reward in config.rewards], base, tuned)
        results = base, tuned
    run.recorder.finish(await crew.export(policy.evaluated), comparison, results)
    return comparison


async def _train(config: Config, resume: bool) -> RunResult:
    """Everything around the loop: start, restore, stop, clean up."""
    began = time.monotonic()
    prompts, eval_prompts = check_inputs(config)
    checkpoint = _restore(config) if resume else None
    with contextlib.ExitStack() as cleanup:
        start = checkpoint.iteration if checkpoint else 0
        directory = RunDirectory.reopen(config, start) if resume else RunDirectory.create(config)
        cleanup.callback(directory.close)
        if connect(config):
            cleanup.callback(ray.shutdown)
        cleanup.enter_context(cancel_on_signal())
        crew = Crew(config)
        cleanup.callback(crew.close)
        progress = cleanup.enter_context(Progress(config.iterations, start))
        run = _Run(config, prompts, eval_prompts, crew, Recorder(config, directory), progress)
        policy: Policy | None = None
        baseline = Baseline(config, checkpoint.prompt_statistics if checkpoint else {})
        try:
            policy = await _start(run, checkpoint)
            await _iterate(run, policy, baseline)
            comparison = await _finish(run, policy)
        except (RayError, TexForceError) as error:
            # What is finished is kept, whatever broke after it.
            if policy is not None and policy.version > start:
                with contextlib.suppress(RayError, TexForceError):
                    await run.recorder.checkpoint(policy, baseline)
            if isinstance(error, RayError):
                raise readable("driver", "fetching a result", error) from None
            raise
        except asyncio.CancelledError:
            done = start if policy is None else policy.version
            progress.message("stopping; writing a checkpoint ...")
            if policy is not None:
                await run.recorder.checkpoint(policy, baseline)
            raise Interrupted(
                f"stopped after {done} of {config.iterations} iterations; continue with: "
                f"python -m texforce_ray.run --resume {directory.path}"
            ) from None
        seconds = time.monotonic() - began
        adapter = directory.path / "adapter"
        return RunResult(directory.path, adapter, policy.version, seconds, comparison)


def _restore(config: Config) -> Checkpoint | None:
    checkpoint = newest_checkpoint(Path(config.run_dir))
    if checkpoint is None and checkpoints(Path(config.run_dir)):
        raise CheckpointError(
            f"no checkpoint in {config.run_dir}/checkpoints is whole; move that folder away to "
            "start from the beginning"
        )
    return checkpoint


async def _start(run: _Run, checkpoint: Checkpoint | None) -> Policy:
    """Wait for the actors, publish the first version, look at the base model."""
    run.progress.message(f"run directory: {run.config.run_dir}")
    run.progress.message("starting actors (their imports take a moment) ...")
    await run.crew.ready()
    texts = list(dict.fromkeys(prompt.text for prompt in run.prompts))
    if cut := await run.crew.count_truncated(texts):
        run.progress.message(
            f"warning: {cut} of {len(texts)} prompts are longer than the text encoder's limit; "
            "their ends are cut off"
        )
    policy = await Policy.start(run.crew, run.config, checkpoint)
    if policy.version == 0 and run.config.eval.every:
        await _evaluate(run, policy)
        run.progress.message(f"base model: evaluation reward {run.recorder.evaluated:.3f}")
    return policy
