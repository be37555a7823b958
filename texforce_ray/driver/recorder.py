"""Writes each iteration's samples, metrics, grids and checkpoints, and the final results."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from texforce_ray.actors.messages import Updated
from texforce_ray.artifacts.location import DIFFUSERS_FILE
from texforce_ray.artifacts.lora_header import parts_apart
from texforce_ray.artifacts.snapshot import LoraShape
from texforce_ray.config import Config
from texforce_ray.crew.crew import Crew
from texforce_ray.driver.advantages import AdvantageEstimator
from texforce_ray.driver.collect import TrainingBatch
from texforce_ray.driver.evaluation import Comparison, Evaluation, write_results
from texforce_ray.driver.iteration_metrics import cost_metrics, reward_metrics, time_metrics
from texforce_ray.driver.policy import Policy
from texforce_ray.observability.alarms import LearningAlarms
from texforce_ray.observability.profiling import write_profile
from texforce_ray.records.card_info import card_info
from texforce_ray.records.checkpoint import (
    Whole,
    checkpoint_path,
    mark_best,
    prune,
    save_checkpoint,
)
from texforce_ray.records.metrics import read_metrics
from texforce_ray.records.rescaled import last_change, reward_weights
from texforce_ray.records.run_directory import RunDirectory
from texforce_ray.records.samples import write_samples

log = logging.getLogger(__name__)

Job = Callable[[], Awaitable[None]]


class Record:
    """One iteration in progress: the times of its phases, then its results."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)  # of each phase
        self.training: TrainingBatch | None = None
        self.updated: Updated | None = None
        self.reward: float | None = None  # mean total of the unmasked samples
        self.samples_per_second: float | None = None
        self.warnings: list[str] = []
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time within the block as phase `name`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began

    def trained(self, training: TrainingBatch, updated: Updated) -> None:
        """Note that the policy was updated: from now on the iteration must be recorded."""
        # Without the trajectories: the object store needs the room for the next ones.
        scored = replace(training.scored, trajectories=())
        self.training, self.updated = replace(training, scored=scored), updated

    def elapsed(self) -> float:
        return time.perf_counter() - self._began


class Recorder:
    """Writes one run's records."""

    def __init__(self, config: Config, directory: RunDirectory) -> None:
        self.config, self.directory = config, directory
        self.names = [reward.key for reward in config.rewards]
        self.evaluated = float("nan")
        self.truncated = 0
        self._base: Evaluation | None = None
        self._best: float | None = None
        self._checkpoint_seconds = 0.0
        self._evaluation: dict[str, float] = {}
        self._whole = Whole()
        self._writing: asyncio.Future[None] | None = None  # of the last iteration
        self._metrics = read_metrics(directory.path)[-1:]  # of a resumed run
        self._alarms = LearningAlarms(
            _comparable(directory.path), config.rewards, config.samples_per_iteration
        )

    async def samples(self, training: TrainingBatch) -> None:
        """Write the iteration's parquet file, before the update so that its masks are kept."""
        batch = training.scored
        columns: dict[str, Any] = {
            "prompt": list(batch.prompts),
            "seed": batch.seeds,
            "policy_version": np.full(len(batch.seeds), batch.policy_version),
        }
        if (steps := self.config.window_steps(batch.iteration)) is not None:
            columns["window"] = np.tile(steps, (len(batch.prompts), 1))
        columns |= dict(zip([f"reward_{n}" for n in self.names], batch.rewards.T, strict=True))
        columns |= {
            "total": training.total,
            "advantage": training.advantages,
            "masked": ~training.mask,
        }
        await _in_thread(write_samples, self.directory.path, batch.iteration, columns)

    def base_evaluation(self, result: Evaluation, *, new: bool) -> None:
        """Keep the base model's scores, from which drift is measured; a new run writes its grid."""
        self._base = result
        self.evaluated = result.means(self.names)["total"]
        if new:
            self._grid(0, result)

    def evaluation(self, version: int, result: Evaluation) -> None:
        """Record the scores and grid of an evaluation during the run."""
        means = result.means(self.names)
        self.evaluated = self._best = means["total"]
        self._evaluation = {f"eval/{name}": value for name, value in means.items()}
        self._evaluation["eval/diversity"] = result.looks.diversity(result.prompts)
        artefacts = result.looks.artefact_means()
        self._evaluation |= {f"eval/{name}": value for name, value in artefacts.items()}
        if self._base is not None:
            self._evaluation["eval/drift"] = result.looks.drift(self._base.looks)
            self._evaluation["eval/style_drift"] = result.looks.style_drift(self._base.looks)
            base = self._base.means(self.names)
            base |= self._base.looks.artefact_means()
            self._evaluation |= {f"eval/base_{name}": value for name, value in base.items()}
        self._grid(version, result)

    async def catch_up(
        self, policy: Policy, estimator: AdvantageEstimator, evaluate: Callable[[], Awaitable[None]]
    ) -> None:
        """Complete a resumed run's last iteration, whose evaluation may have been cut short.

        After a signal or a reward's error, its metrics line and its checkpoint exist, but not its
        evaluation. After a kill, the note that its checkpoint is the best one may be missing.
        """
        every, version = self.config.eval.every, policy.version
        last = self._metrics[0] if self._metrics else {}
        if not every or version % every or last.get("iteration") != version - 1:
            return
        if last.get("eval/total") is None:
            await evaluate()
            await _in_thread(self.directory.metrics.amend, version - 1, self._evaluation)
            self._evaluation = {}
        elif version > last_change(self.directory.path):
            self._best = float(last["eval/total"])
        else:
            return
        await self.checkpoint(policy, estimator)

    def _grid(self, version: int, result: Evaluation) -> None:
        shown = len(result.shown)
        self.directory.write_grid(
            version, result.shown, result.prompts[:shown], result.total[:shown]
        )

    @contextlib.asynccontextmanager
    async def iteration(
        self, policy: Policy, estimator: AdvantageEstimator, crew: Crew
    ) -> AsyncIterator[Record]:
        """Run an iteration in the block; it is recorded after the end if there was an update.

        This holds even if something failed after the update: the version exists, and a checkpoint
        without its metrics line would leave a permanent gap. So the line is written first: if its
        checkpoint is missing, a resumed run writes both again.

        The files are written while the next iteration runs; await `written` to have them.
        """
        record, failed = Record(), True
        try:
            yield record
            failed = False
        finally:
            before = self._writing
            if record.training is not None and record.updated is not None:
                jobs = [self._lines(record, record.training, record.updated, policy, crew)]
                jobs += self._checkpoint_if_due(policy, estimator)
                record.training = None
                self._writing = asyncio.ensure_future(_in_order(before, jobs))
            waits = self._writing if failed else before  # one iteration may be unwritten, not two
            if waits is not None:
                await _ended(waits)

    async def written(self) -> None:
        """Wait until the last iteration is recorded.

        Raises:
            TexForceError: it could not be; no later one will be, which would leave a gap.
        """
        if self._writing is not None:
            await _ended(self._writing)

    def _lines(
        self,
        record: Record,
        training: TrainingBatch,
        updated: Updated,
        policy: Policy,
        crew: Crew,
    ) -> Job:
        """Collect the iteration's metrics and warnings; the job writes its line and profile."""
        batch, seconds = training.scored, record.elapsed()
        record.samples_per_second = len(training.mask) / seconds
        metrics = {
            **reward_metrics(self.config, training),
            **updated.metrics,
            "staleness": policy.version - 1 - batch.policy_version,
            **self._evaluation,
            "samples_per_second": record.samples_per_second,
            **time_metrics(record.seconds, seconds, batch, updated),
            "seconds/checkpoint_before": self._checkpoint_seconds,
            **cost_metrics(batch, updated),
            "prompts/truncated": self.truncated,
            "actors/restarts": crew.restarts,
            **crew.scoring_statistics(),
        }
        record.reward = metrics["reward/total_mean"]
        record.warnings = self._alarms.look({"iteration": batch.iteration, **metrics})
        self._evaluation = {}
        for name, error in batch.errors.items():
            log.warning("iteration %d: reward %s failed: %s", batch.iteration, name, error)
        traces = [("rollout", info.trace) for info in batch.rollouts]
        traces.append(("learner", updated.trace))
        path, iteration = self.directory.path, batch.iteration

        async def write() -> None:
            await _in_thread(self.directory.metrics.append, iteration, metrics)
            await _in_thread(write_profile, self.config, path, iteration, traces)

        return write

    def _checkpoint_if_due(self, policy: Policy, estimator: AdvantageEstimator) -> list[Job]:
        due = policy.version % self.config.checkpoint.every == 0
        last = policy.version == self.config.iterations
        if not (due or last or self._best is not None):
            return []
        write = self._checkpoint(policy, estimator)

        async def timed() -> None:
            began = time.perf_counter()
            await write()
            self._checkpoint_seconds = time.perf_counter() - began

        return [timed]

    async def checkpoint(self, policy: Policy, estimator: AdvantageEstimator) -> None:
        """Write the current version, mark it if it is the best, delete old checkpoints."""
        await self.written()
        await self._checkpoint(policy, estimator)()

    def _checkpoint(self, policy: Policy, estimator: AdvantageEstimator) -> Job:
        """The job may run at any time: what it writes is what was known at this moment."""
        path, version, best = self.directory.path, policy.version, self._best
        self._best = None
        state = policy.checkpoint(estimator.statistics.buffers)

        async def write() -> None:
            if not await asyncio.to_thread(self._whole, checkpoint_path(path, version)):
                await _in_thread(save_checkpoint, path, state)
            if best is not None:
                mark_best(path, version, best, reward_weights(self.config))
            await _in_thread(prune, path, self.config.checkpoint.keep_last, self._whole)

        return write

    def finish(
        self,
        adapter: Mapping[str, bytes],
        shapes: Mapping[str, LoraShape],
        comparison: Comparison,
        results: tuple[Evaluation, Evaluation] | None,
    ) -> None:
        """Write the adapter with its card, the comparison of base and tuned, and the report."""
        scores = comparison.rewards
        self.directory.write_adapter(
            adapter,
            card_info(
                self.config,
                shapes,
                scores,
                tuple(adapter),
                parts_apart(shapes, adapter.get(DIFFUSERS_FILE)),
            ),
        )
        if results is not None:
            folder, shown = self.directory.path / "evaluation", len(results[0].shown)
            labelled = dict(zip(("base", "tuned"), results, strict=True))
            write_results(folder, asdict(comparison), self.names, labelled, shown)
        self.directory.report()


def _comparable(run_dir: Path) -> list[dict[str, Any]]:
    """A resumed run's earlier metrics, without totals under other reward weights."""
    changed, metrics = last_change(run_dir), read_metrics(run_dir)
    return [
        line
        if line["iteration"] >= changed
        else {key: value for key, value in line.items() if not key.startswith("reward/total_")}
        for line in metrics
    ]


async def _in_order(before: asyncio.Future[None] | None, jobs: Sequence[Job]) -> None:
    """Do the jobs after those `before`, or none of them if those failed."""
    if before is not None:
        await _ended(before)
    for job in jobs:
        await job()


async def _ended(writing: asyncio.Future[None]) -> None:
    """Wait for a writer, which a cancelled wait leaves alone; raises its error."""
    await asyncio.wait([writing])
    await writing


async def _in_thread(function: Callable[..., Any], *given: Any) -> None:
    """Write in a thread, so that a slow disk does not hold up the actors; always finish.

    A late stop is better than a second writer starting while the first one still runs unseen.
    """
    job = asyncio.ensure_future(asyncio.to_thread(function, *given))
    try:
        await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait([job])
        raise
