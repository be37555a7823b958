"""The driver: one Ray job that coordinates rollouts, rewards and learner. Read `_iterate` first.

It moves references between actors and never touches a tensor; it is the only writer of the run
directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from texforce_ray.actors.crew import Crew, connect
from texforce_ray.collect import ScoredBatch, check_masked, collect, plan_units
from texforce_ray.config import Config, resolve_run_dir
from texforce_ray.errors import CheckpointError, Interrupted
from texforce_ray.evaluation import Evaluation, compare, evaluate
from texforce_ray.policy import Policy
from texforce_ray.prompts import Prompt, load_prompts
from texforce_ray.recorder import Recorder
from texforce_ray.records.checkpoint import newest_checkpoint
from texforce_ray.records.progress import Progress
from texforce_ray.records.run_directory import RunDirectory
from texforce_ray.rewards import resolve
from texforce_ray.rl.baseline import Baseline

log = logging.getLogger(__name__)


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


def train(config: Config, *, resume: bool = False) -> RunResult:
    """Run a configuration to its end; the same as `python -m texforce_ray.run`.

    Args:
        config: what to run.
        resume: continue the run in `config.run_dir` from its newest whole checkpoint.

    Raises:
        TexForceError: anything that a user can act on; Interrupted after SIGINT or SIGTERM.
    """
    config = resolve_run_dir(config)
    check_inputs(config)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_train(config, resume))
    # Inside a notebook a loop runs already; ours gets a thread of its own.
    box: list[Any] = []
    thread = threading.Thread(target=lambda: box.append(asyncio.run(_train(config, resume))))
    thread.start()
    thread.join()
    if not box:
        raise RuntimeError("the run failed; its error stands above")
    return box[0]


def check_inputs(config: Config) -> tuple[list[Prompt], list[Prompt]]:
    """Training and evaluation prompts; fails before anything is started if an input is wrong."""
    for reward in config.rewards:
        resolve(reward.name, reward.target)
    train_prompts = load_prompts(config.prompts.train)
    return train_prompts, load_prompts(
        config.eval.prompts
    ) if config.eval.prompts else train_prompts


async def _train(config: Config, resume: bool) -> RunResult:
    began = time.monotonic()
    prompts, eval_prompts = check_inputs(config)
    checkpoint = newest_checkpoint(Path(config.run_dir)) if resume else None
    if resume and checkpoint is None and list(Path(config.run_dir).glob("checkpoints/step-*")):
        raise CheckpointError(f"no checkpoint in {config.run_dir} is whole; nothing to resume from")
    start = checkpoint.iteration if checkpoint else 0
    directory = RunDirectory.reopen(config, start) if resume else RunDirectory.create(config)
    started_ray = connect(config)
    crew = Crew(config)
    recorder = Recorder(config, directory)
    try:
        with _stop_on_signal(), Progress(config.iterations, start) as progress:
            progress.message(f"run directory: {directory.path}")
            progress.message("starting actors (imports take a moment) ...")
            await crew.ready()
            await _warn_truncated(crew, prompts, progress)
            policy = await Policy.start(crew, config, checkpoint)
            baseline = Baseline(config, checkpoint.prompt_statistics if checkpoint else {})
            try:
                await _iterate(
                    config, crew, policy, baseline, prompts, eval_prompts, recorder, progress
                )
            except asyncio.CancelledError:
                await recorder.checkpoint(policy, baseline)
                raise Interrupted(
                    f"stopped after {policy.version} of {config.iterations} iterations; continue "
                    f"with: python -m texforce_ray.run --resume {directory.path}"
                ) from None
            comparison = await _finish(config, crew, policy, eval_prompts, recorder, progress)
        return RunResult(
            directory.path,
            directory.path / "adapter",
            policy.version,
            time.monotonic() - began,
            comparison,
        )
    finally:
        directory.close()
        crew.close()
        if started_ray:
            ray.shutdown()


async def _iterate(
    config: Config,
    crew: Crew,
    policy: Policy,
    baseline: Baseline,
    prompts: list[Prompt],
    eval_prompts: list[Prompt],
    recorder: Recorder,
    progress: Progress,
) -> None:
    """Sample, score, update, publish; with k = 1 the next iteration is sampled meanwhile."""
    under_way: dict[int, asyncio.Task[ScoredBatch]] = {}
    try:
        for iteration in range(policy.version, config.iterations):
            recorder.start_iteration()
            for ahead in range(
                iteration, min(iteration + config.max_staleness + 1, config.iterations)
            ):
                if ahead not in under_way:
                    units = plan_units(config, prompts, ahead)
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
            if config.eval.every and (iteration + 1) % config.eval.every == 0:
                with recorder.phase("evaluation"):
                    result = await evaluate(
                        crew, eval_prompts, config.eval.images, policy.evaluated
                    )
                recorder.evaluation(policy.version, result)
            await recorder.iteration(batch, mask, total, advantages, update, policy, baseline, crew)
            progress.update(iteration + 1, recorder.reward, recorder.samples_per_second)
    finally:
        for task in under_way.values():
            task.cancel()


async def _finish(
    config: Config,
    crew: Crew,
    policy: Policy,
    eval_prompts: list[Prompt],
    recorder: Recorder,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Final adapter, comparison of base and tuned, report."""
    results: tuple[Evaluation, Evaluation] | None = None
    comparison: dict[str, dict[str, float]] = {}
    if config.eval.final_images:
        progress.message(f"comparing base and tuned on {config.eval.final_images} images ...")
        base = await evaluate(crew, eval_prompts, config.eval.final_images, [])
        tuned = await evaluate(crew, eval_prompts, config.eval.final_images, policy.evaluated)
        comparison = compare([reward.key for reward in config.rewards], base, tuned)
        results = base, tuned
    files = await crew.export(policy.evaluated)
    recorder.finish(files, comparison, results)
    return comparison


async def _warn_truncated(crew: Crew, prompts: list[Prompt], progress: Progress) -> None:
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    if count := await crew.count_truncated(texts):
        progress.message(
            f"warning: {count} of {len(texts)} prompts are longer than the text encoder's limit; "
            "their ends are cut off"
        )


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[None]:
    """SIGINT and SIGTERM cancel the run, which then leaves a checkpoint behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    signals = (signal.SIGINT, signal.SIGTERM)
    # After ray.init(), which puts a handler of its own in place.
    previous = {number: signal.getsignal(number) for number in signals}
    for number in signals:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
            signal.signal(number, previous[number])
