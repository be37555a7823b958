"""A run from start to end: the state that the loop works with."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from texforce_ray.cluster.answers import beside, gather
from texforce_ray.config import Config
from texforce_ray.crew.crew import Crew
from texforce_ray.driver.advantages import AdvantageEstimator
from texforce_ray.driver.collect import count_truncated
from texforce_ray.driver.evaluation import Comparison, compare, compare_over_guidance, evaluate
from texforce_ray.driver.inputs import PromptSets
from texforce_ray.driver.policy import Policy
from texforce_ray.driver.recorder import Record, Recorder
from texforce_ray.errors import CheckpointError
from texforce_ray.observability.progress import Progress
from texforce_ray.records.checkpoint import (
    Checkpoint,
    checkpoints,
    newest_checkpoint,
    step_of,
)
from texforce_ray.records.rescaled import drop_old_totals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A run whose actors are ready and whose first policy version is published."""

    config: Config
    prompts: PromptSets
    crew: Crew
    recorder: Recorder
    progress: Progress
    policy: Policy
    estimator: AdvantageEstimator

    @staticmethod
    async def start(
        config: Config,
        prompts: PromptSets,
        crew: Crew,
        recorder: Recorder,
        progress: Progress,
        checkpoint: Checkpoint | None,
    ) -> Session:
        """Publish the first version and evaluate the base model."""
        recorder.truncated, warning = await count_truncated(crew, prompts.all())
        if warning:
            progress.message(warning)
        policy = await Policy.start(crew, config, checkpoint)
        estimator = _estimator(config, checkpoint, progress)
        session = Session(config, prompts, crew, recorder, progress, policy, estimator)
        if config.eval.every:
            # A resumed run draws it again: later evaluations are compared with it image by image.
            base = await evaluate(crew, prompts.evaluation, config.eval.images, [])
            recorder.base_evaluation(base, new=policy.version == 0)
            progress.message(f"base model: evaluation reward {recorder.evaluated:.3f}")
        return session

    async def evaluate(self) -> None:
        """Record scores and a grid of the evaluation's prompts and seeds, the same every time."""
        count = self.config.eval.images
        result = await evaluate(self.crew, self.prompts.evaluation, count, self.policy.evaluated)
        await self.recorder.written()  # one writer at a time
        self.recorder.evaluation(self.policy.version, result)

    @contextlib.asynccontextmanager
    async def evaluating(self, record: Record) -> AsyncIterator[None]:
        """Evaluate beside the block, if it is due: before the work that the block starts."""
        every = self.config.eval.every
        if not every or self.policy.version % every:
            yield
            return
        async with beside(self.evaluate()) as evaluated:
            await asyncio.sleep(0)  # its units are in line now
            yield
            with record.phase("evaluation"):
                await evaluated

    async def catch_up(self) -> None:
        """Complete a resumed run's last iteration, if it was stopped in the middle."""

        async def again() -> None:
            version = self.policy.version
            self.progress.message(f"evaluating version {version}: the run stopped before that")
            await self.evaluate()

        await self.recorder.catch_up(self.policy, self.estimator, again)

    def show(self, record: Record) -> None:
        """Show an iteration's line of progress, and the warnings from its metrics."""
        for warning in record.warnings:
            self.progress.message(f"warning: {warning}")
        self.progress.update(self.policy.version, record.reward, record.samples_per_second)

    async def checkpoint(self) -> None:
        """Write the current version, unless it is already written."""
        await self.recorder.checkpoint(self.policy, self.estimator)

    async def finish(self) -> Comparison:
        """Write the final adapter, the comparison of base and tuned, and the report."""
        await self.recorder.written()
        crew, prompts, tuned = self.crew, self.prompts, self.policy.evaluated
        results, comparison = None, Comparison({}, {}, [])
        if count := self.config.eval.final_images:
            self.progress.message(f"comparing base and tuned on {count} images each ...")
            names = [reward.key for reward in self.config.rewards]
            sets = {"seen": prompts.evaluation, "unseen": prompts.unseen}
            sets = {name: chosen for name, chosen in sets.items() if chosen}
            # All at once: actors that run out of one evaluation's units go on with the next.
            kinds = [(name, policy) for name in sets for policy in ([], tuned)]
            *found, guidance = await gather(
                *(evaluate(crew, sets[name], count, policy) for name, policy in kinds),
                compare_over_guidance(crew, sets, tuned),
            )
            pairs = dict(zip(sets, zip(found[::2], found[1::2], strict=True), strict=True))
            results = pairs["seen"]
            comparison = Comparison(
                rewards=compare(names, *results),
                unseen=compare(names, *pairs["unseen"]) if "unseen" in pairs else {},
                guidance=guidance,
            )
        learned = self.policy.learned[1]
        files = await crew.export(tuned)
        self.recorder.finish(files, learned.snapshot.shapes, comparison, results)
        return comparison


def restore(config: Config) -> Checkpoint | None:
    """The newest checkpoint that is complete; None if the run never finished writing one.

    Raises:
        CheckpointError: there are checkpoints, but none is complete.
    """
    checkpoint = newest_checkpoint(Path(config.run_dir))
    if checkpoint is not None or not (damaged := checkpoints(Path(config.run_dir))):
        return checkpoint
    if step_of(damaged[0]) > config.checkpoint.every:  # earlier ones existed and were deleted
        raise CheckpointError(
            f"no checkpoint in {config.run_dir}/checkpoints is complete; move that folder away to "
            "start from the beginning"
        )
    log.warning("no checkpoint is complete, not even the first one: starting the run again")
    return None


def _estimator(
    config: Config, checkpoint: Checkpoint | None, progress: Progress
) -> AdvantageEstimator:
    """An estimator with the remembered rewards of prompts that are still valid."""
    if checkpoint is None:
        return AdvantageEstimator(config, {})
    remembered, dropped = drop_old_totals(Path(config.run_dir), config, checkpoint)
    for text in dropped:
        progress.message(text)
    return AdvantageEstimator(config, remembered)
