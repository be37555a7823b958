"""Turns what happened in an iteration into records: metrics, samples, grids, checkpoints."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from texforce_ray.actors.crew import Crew
from texforce_ray.collect import ScoredBatch, TrainingBatch
from texforce_ray.config import Config
from texforce_ray.evaluation import Comparison, Evaluation
from texforce_ray.model.snapshot import LoraShape
from texforce_ray.policy import Policy
from texforce_ray.profiling import write_profile
from texforce_ray.records.checkpoint import (
    Whole,
    checkpoint_path,
    mark_best,
    prune,
    save_checkpoint,
)
from texforce_ray.records.metrics import read_metrics
from texforce_ray.records.model_card import card_info
from texforce_ray.records.rescaled import last_change, reward_weights
from texforce_ray.records.run_directory import RunDirectory, write_evaluation
from texforce_ray.rl.baseline import Baseline
from texforce_ray.watch import Watch

log = logging.getLogger(__name__)


class Recorder:
    """Writes one run's records and times its phases."""

    def __init__(self, config: Config, directory: RunDirectory) -> None:
        self.config, self.directory = config, directory
        self.names = [reward.key for reward in config.rewards]
        self.reward: float | None = None
        self.samples_per_second: float | None = None
        self.evaluated = float("nan")
        self.truncated = 0
        self._base: Evaluation | None = None
        self._best: float | None = None
        self._checkpoint_seconds = 0.0
        self._evaluation: dict[str, float] = {}
        self._whole = Whole()
        self._metrics = read_metrics(directory.path)[-1:]  # of a resumed run
        self._watch = Watch(_comparable(directory.path))
        self._warnings: list[str] = []
        self.start_iteration()

    def start_iteration(self) -> None:
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time within it as phase `name`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - began

    def recorded_mask(self, batch: ScoredBatch) -> np.ndarray:
        """Masks of an earlier attempt at this iteration: replayed, so that a repeat is the same."""
        return self.directory.recorded_mask(batch.iteration, batch.seeds)

    async def samples(self, training: TrainingBatch) -> None:
        """The iteration's parquet file; written before the update, so that its masks are kept."""
        batch = training.scored
        columns: dict[str, Any] = {
            "prompt": list(batch.prompts),
            "seed": batch.seeds,
            "policy_version": np.full(len(batch.seeds), batch.policy_version),
        }
        columns |= dict(zip([f"reward_{n}" for n in self.names], batch.rewards.T, strict=True))
        columns |= {
            "total": training.total,
            "advantage": training.advantages,
            "masked": ~training.mask,
        }
        await _in_thread(self.directory.write_samples, batch.iteration, columns)

    def base_evaluation(self, result: Evaluation, *, new: bool) -> None:
        """The base model's scores and, in a new run, its grid: later evaluations drift from it."""
        self._base = result
        self.evaluated = result.means(self.names)["total"]
        if new:
            self._grid(0, result)

    def evaluation(self, version: int, result: Evaluation) -> None:
        """Scores and grid of an evaluation in the run."""
        means = result.means(self.names)
        self.evaluated = self._best = means["total"]
        self._evaluation = {f"eval/{name}": value for name, value in means.items()}
        self._evaluation["eval/diversity"] = result.looks.diversity(result.prompts)
        if self._base is not None:
            self._evaluation["eval/drift"] = result.looks.drift(self._base.looks)
            self._evaluation["eval/style_drift"] = result.looks.style_drift(self._base.looks)
            base = self._base.means(self.names)
            self._evaluation |= {f"eval/base_{name}": value for name, value in base.items()}
        self._grid(version, result)

    async def catch_up(
        self, policy: Policy, baseline: Baseline, evaluate: Callable[[], Awaitable[None]]
    ) -> None:
        """Complete a resumed run's last iteration, whose evaluation may have been cut short.

        By a signal or a reward's error: its line is there then, and so is its checkpoint. Or the
        process was killed before it noted that the checkpoint is the best one.
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
        await self.checkpoint(policy, baseline)

    def _grid(self, version: int, result: Evaluation) -> None:
        shown = len(result.shown)
        self.directory.write_grid(
            version, result.shown, result.prompts[:shown], result.total[:shown]
        )

    async def iteration(
        self,
        training: TrainingBatch,
        update: Mapping[str, Any],
        policy: Policy,
        baseline: Baseline,
        crew: Crew,
    ) -> None:
        """The iteration's line of metrics, then its checkpoint if one is due.

        In this order: a line whose checkpoint is missing is written again by a resumed run, but a
        checkpoint whose line is missing would leave a gap for ever.
        """
        batch, mask, total = training.scored, training.mask, training.total
        advantages = training.advantages
        seconds = time.perf_counter() - self._began
        self.samples_per_second = len(mask) / seconds
        self.reward = float(total[mask].mean()) if mask.any() else None
        metrics: dict[str, Any] = {
            "policy_version": batch.policy_version,
            "reward/total_mean": self.reward,
            "reward/total_std": float(total[mask].std()) if mask.any() else None,
            **self._reward_metrics(training),
            "reward/masked": int((~mask).sum()),
            "advantage/mean": float(advantages[mask].mean()) if mask.any() else None,
            "advantage/std": float(advantages[mask].std()) if mask.any() else None,
            "advantage/abs_max": float(np.abs(advantages).max()),
            **{name: value for name, value in update.items() if "/" in name},
            "staleness": policy.version - 1 - batch.policy_version,
            **self._evaluation,
            "samples_per_second": self.samples_per_second,
            **self._times(seconds, batch, update),
            "prompts/truncated": self.truncated,
            "actors/restarts": crew.restarts,
            **crew.scoring_statistics(),
        }
        await _in_thread(self.directory.metrics.append, batch.iteration, metrics)
        await _in_thread(write_profile, self.config, self.directory.path, batch, update)
        self._warnings = self._watch.look({"iteration": batch.iteration, **metrics})
        self._evaluation = {}
        for name, error in batch.errors.items():
            log.warning("iteration %d: reward %s failed: %s", batch.iteration, name, error)
        due = policy.version % self.config.checkpoint.every == 0
        last = policy.version == self.config.iterations
        if due or last or self._best is not None:
            began = time.perf_counter()
            await self.checkpoint(policy, baseline)
            self._checkpoint_seconds = time.perf_counter() - began

    def take_warnings(self) -> list[str]:
        """What the last iteration's metrics should make a user look at."""
        taken, self._warnings = self._warnings, []
        return taken

    def _reward_metrics(self, training: TrainingBatch) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for reward, values in zip(self.config.rewards, training.scored.rewards.T, strict=True):
            name, known = reward.key, values[~np.isnan(values)]
            metrics[f"reward/{name}_masked"] = len(values) - len(known)
            if not len(known):
                continue
            metrics[f"reward/{name}_mean"] = float(known.mean())
            metrics[f"reward/{name}_std"] = float(known.std())
            if reward.min is not None:
                metrics[f"reward/{name}_gated"] = int((known < reward.min).sum())
            if len(self.names) > 1:
                metrics[f"reward/{name}_correlation"] = _correlation(values, training)
        return metrics

    def _times(
        self, seconds: float, batch: ScoredBatch, update: Mapping[str, Any]
    ) -> dict[str, float]:
        """The driver's phases add up to the total; the actors' own work stands beside them."""
        phases = dict(self._seconds)
        phases["other"] = max(0.0, seconds - sum(phases.values()))
        times = {f"seconds/{name}": value for name, value in phases.items()}
        times |= {f"share/{name}": value / seconds for name, value in phases.items()}
        times |= {f"work/reward_{name}": value for name, value in batch.reward_seconds.items()}
        return times | {
            "seconds/total": seconds,
            "seconds/checkpoint_before": self._checkpoint_seconds,
            "share/learner_wait": 1 - self._seconds["update"] / seconds,
            "work/rollout": sum(info.seconds for info in batch.rollouts),
            "work/learner": float(update.get("seconds", 0.0)),
            "work/learner_fetch": float(update.get("fetch_seconds", 0.0)),
            **_utilisation(batch, update),
        }

    async def checkpoint(self, policy: Policy, baseline: Baseline) -> None:
        """Write the current version, note it if it is the best, delete what is not kept."""
        path = self.directory.path
        if not await asyncio.to_thread(self._whole, checkpoint_path(path, policy.version)):
            state = await policy.checkpoint(baseline.statistics.buffers)
            await _in_thread(save_checkpoint, path, state)
        if self._best is not None:
            mark_best(path, policy.version, self._best, reward_weights(self.config))
            self._best = None
        await _in_thread(prune, path, self.config.checkpoint.keep_last, self._whole)

    def finish(
        self,
        adapter: Mapping[str, bytes],
        shapes: Mapping[str, LoraShape],
        comparison: Comparison,
        results: tuple[Evaluation, Evaluation] | None,
    ) -> None:
        """Final adapter with its card, the comparison of base and tuned, and the report."""
        scores = comparison.rewards
        self.directory.write_adapter(
            adapter,
            card_info(self.config, shapes, scores, tuple(adapter)),
        )
        if results is not None:
            base, tuned = results
            columns: dict[str, Any] = {"prompt": list(base.prompts), "seed": base.seeds}
            for label, result in (("base", base), ("tuned", tuned)):
                columns |= {
                    f"{label}_{n}": v for n, v in zip(self.names, result.rewards.T, strict=True)
                }
                columns[f"{label}_total"] = result.total
            shown = len(base.shown)
            write_evaluation(
                self.directory.path / "evaluation",
                asdict(comparison),
                columns,
                [("base", base.shown), ("tuned", tuned.shown)],
                base.prompts[:shown],
                [base.total[:shown].tolist(), tuned.total[:shown].tolist()],
            )
        self.directory.report()


def _comparable(run_dir: Path) -> list[dict[str, Any]]:
    """A resumed run's earlier metrics, without totals of other weights of the rewards."""
    changed, found = last_change(run_dir), read_metrics(run_dir)
    return [
        line
        if line["iteration"] >= changed
        else {key: value for key, value in line.items() if not key.startswith("reward/total_")}
        for line in found
    ]


async def _in_thread(function: Callable[..., Any], *given: Any) -> None:
    """Wait for the disk without keeping the actors waiting; never leave it half-way.

    A second writer that starts while the first goes on unseen would be worse than a late stop.
    """
    job = asyncio.ensure_future(asyncio.to_thread(function, *given))
    try:
        await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait([job])
        raise


def _utilisation(batch: ScoredBatch, update: Mapping[str, Any]) -> dict[str, float]:
    """Model FLOPs in a second of work, as a share of the device's measured peak."""
    flops = sum(info.flops for info in batch.rollouts)
    possible = sum(info.seconds * info.peak_flops for info in batch.rollouts)
    metrics = {
        "object_store/trajectory_bytes": float(sum(i.trajectory_bytes for i in batch.rollouts)),
        "object_store/image_bytes": float(sum(info.image_bytes for info in batch.rollouts)),
    }
    if possible:
        metrics |= {"flops/rollout": flops, "mfu/rollout": flops / possible}
    if update.get("flops"):
        possible = update["seconds"] * update["peak_flops"]
        metrics |= {"flops/learner": update["flops"], "mfu/learner": update["flops"] / possible}
    return metrics


def _correlation(values: np.ndarray, training: TrainingBatch) -> float:
    """With the total: near 1, this component decides it alone; near 0, it is drowned."""
    x, y = values[training.mask], training.total[training.mask]
    if len(x) < 2 or not x.std() or not y.std():
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
