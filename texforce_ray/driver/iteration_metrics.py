"""One iteration's line of `metrics.jsonl`, apart from what the learner and the actors report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from texforce_ray.actors.messages import Updated
from texforce_ray.config import Config
from texforce_ray.driver.collect import ScoredBatch, TrainingBatch


def reward_metrics(config: Config, training: TrainingBatch) -> dict[str, Any]:
    """Metrics of rewards and advantages; those of the total are None if every sample is masked."""
    batch, mask, total = training.scored, training.mask, training.total
    advantages = training.advantages
    metrics: dict[str, Any] = {
        "policy_version": batch.policy_version,
        "reward/total_mean": float(total[mask].mean()) if mask.any() else None,
        "reward/total_std": float(total[mask].std()) if mask.any() else None,
    }
    for reward, values in zip(config.rewards, batch.rewards.T, strict=True):
        name, scored = reward.key, values[~np.isnan(values)]
        metrics[f"reward/{name}_masked"] = len(values) - len(scored)
        if not len(scored):
            continue
        metrics[f"reward/{name}_mean"] = float(scored.mean())
        metrics[f"reward/{name}_std"] = float(scored.std())
        if reward.min is not None:
            metrics[f"reward/{name}_gated"] = int((scored < reward.min).sum())
        if len(config.rewards) > 1:
            both = mask & ~np.isnan(values)
            metrics[f"reward/{name}_correlation"] = _correlation(values[both], total[both])
    return metrics | {
        "reward/masked": int((~mask).sum()),
        "advantage/mean": float(advantages[mask].mean()) if mask.any() else None,
        "advantage/std": float(advantages[mask].std()) if mask.any() else None,
        "advantage/abs_max": float(np.abs(advantages).max()),
    }


def _correlation(values: np.ndarray, total: np.ndarray) -> float:
    """Correlation with the total: near 1, this reward decides it; near 0, the others drown it."""
    if len(values) < 2 or not values.std() or not total.std():
        return 0.0
    return float(np.corrcoef(values, total)[0, 1])


def time_metrics(
    phases: Mapping[str, float], seconds: float, batch: ScoredBatch, updated: Updated
) -> dict[str, float]:
    """Times of the driver's phases, which add up to the total, and of the actors' own work."""
    phases = dict(phases)
    update = phases.get("update", 0.0)
    phases["other"] = max(0.0, seconds - sum(phases.values()))
    times = {f"seconds/{name}": value for name, value in phases.items()}
    times |= {f"share/{name}": value / seconds for name, value in phases.items()}
    times |= {f"work/reward_{name}": value for name, value in batch.reward_seconds.items()}
    return times | {
        "seconds/total": seconds,
        "share/learner_wait": 1 - update / seconds,
        "work/rollout": sum(info.seconds for info in batch.rollouts),
        "work/learner": updated.seconds,
        "work/learner_fetch": updated.fetch_seconds,
    }


def cost_metrics(batch: ScoredBatch, updated: Updated) -> dict[str, float]:
    """Bytes in the object store; model FLOPs, also as a share of the device's measured peak."""
    flops = sum(info.flops for info in batch.rollouts)
    possible = sum(info.seconds * info.peak_flops for info in batch.rollouts)
    metrics = {
        "object_store/trajectory_bytes": float(sum(i.trajectory_bytes for i in batch.rollouts)),
        "object_store/image_bytes": float(sum(info.image_bytes for info in batch.rollouts)),
    }
    if possible:
        metrics |= {"flops/rollout": flops, "mfu/rollout": flops / possible}
    if updated.flops:
        possible = updated.seconds * updated.peak_flops
        metrics |= {"flops/learner": updated.flops, "mfu/learner": updated.flops / possible}
    return metrics
