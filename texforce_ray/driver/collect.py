"""From prompts to scored samples: samples, scores and gathers one iteration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from texforce_ray.actors.messages import SampleInfo, WorkUnit
from texforce_ray.artifacts.snapshot import Effect
from texforce_ray.cluster.answers import gather
from texforce_ray.config import Config, DType
from texforce_ray.errors import EffectError, RewardError
from texforce_ray.prompts import Prompt

if TYPE_CHECKING:
    from ray import ObjectRef

    from texforce_ray.crew.crew import Crew

# Small changes measure slightly differently on another kind of device or in half precision.
_CHANGE_TOLERANCE = 0.1
_CHANGE_ROUNDING = {"float32": 1e-5, "float16": 5e-4, "bfloat16": 4e-3}


@dataclass(frozen=True)
class ScoredBatch:
    """N samples of one iteration, in index order, with R rewards.

    units: the work that produced them; trajectories: one ref for each unit, never fetched by the
    driver.
    rewards: float64 [N, R], raw, NaN where a sample could not be scored.
    errors: the last error of each reward that had one.
    rollouts: the rollout actors' report on each unit.
    reward_seconds: compute time of each reward's servers.
    """

    iteration: int
    policy_version: int
    prompts: tuple[str, ...]
    seeds: np.ndarray
    units: tuple[WorkUnit, ...]
    trajectories: tuple[ObjectRef, ...]
    rewards: np.ndarray
    errors: dict[str, str]
    rollouts: tuple[SampleInfo, ...]
    reward_seconds: dict[str, float]


@dataclass(frozen=True)
class TrainingBatch:
    """A scored batch and what the update learns from it.

    mask: bool [N], False where a sample is left out of the update; total: float64 [N], weighted
    reward; advantages: float64 [N]; both 0 where masked.
    """

    scored: ScoredBatch
    mask: np.ndarray
    total: np.ndarray
    advantages: np.ndarray


async def collect(
    crew: Crew, units: Sequence[WorkUnit], policy: ObjectRef, effect: Effect | None = None
) -> ScoredBatch:
    """Sample all units under `policy` and score each as soon as its images are ready.

    `effect`: the learner's measurement of that policy, if known.

    Raises:
        ActorError: a rollout actor failed permanently.
        EffectError: a rollout actor does not sample with that policy.
    """
    to_sample = {unit.index for unit in units}
    parts = await gather(
        *(_sample_and_score(crew, unit, policy, effect, to_sample) for unit in units)
    )
    errors: dict[str, str] = {}
    seconds = {reward.key: 0.0 for reward in crew.config.rewards}
    for part in parts:
        errors |= part.errors
        for key, value in part.reward_seconds.items():
            seconds[key] += value
    return ScoredBatch(
        iteration=units[0].iteration,
        policy_version=units[0].policy_version,
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        seeds=np.concatenate([part.seeds for part in parts]),
        units=tuple(units),
        trajectories=tuple(ref for part in parts for ref in part.trajectories),
        rewards=np.concatenate([part.rewards for part in parts]),
        errors=errors,
        rollouts=tuple(info for part in parts for info in part.rollouts),
        reward_seconds=seconds,
    )


async def _sample_and_score(
    crew: Crew, unit: WorkUnit, policy: ObjectRef, effect: Effect | None, to_sample: set[int]
) -> ScoredBatch:
    """`to_sample`: indices of the iteration's units that are not sampled yet."""

    async def attempt() -> tuple[Any, ...]:
        info, trajectory, images = await crew.sample(unit, [policy])
        check_effect(info, effect, unit.policy_version, crew.config.dtypes)
        to_sample.discard(unit.index)
        scores = score(crew, images, unit.prompts, unit.metadata, hurry=not to_sample)
        return info, trajectory, await scores

    async with crew.backlog:
        info, trajectory, (rewards, errors, seconds) = await crew.redo_if_lost(attempt)
    return ScoredBatch(
        iteration=unit.iteration,
        policy_version=unit.policy_version,
        prompts=unit.prompts,
        seeds=unit.seeds,
        units=(unit,),
        trajectories=(trajectory,),
        rewards=rewards,
        errors=errors,
        rollouts=(info,),
        reward_seconds=seconds,
    )


def check_effect(
    info: SampleInfo, expected: Effect | None, version: int, dtypes: Sequence[DType]
) -> None:
    """Reject samples from an actor that does not hold the published policy.

    Args:
        info: what the actor says of itself.
        expected: the learner's effect.
        version: of the policy.
        dtypes: of both models.

    Raises:
        EffectError: naming the actor, what it holds, and what was published.
    """
    if expected is None or info.effect is None:
        return
    held = info.effect
    if held.digest != expected.digest:
        raise EffectError(
            f"rollout actor ({info.actor}) does not hold the adapter of policy version {version}: "
            f"its weights have digest {held.digest:x}, the learner's {expected.digest:x}"
        )
    what = {
        "change": "the change of a probe prompt's embedding",
        "denoiser": "the change of the output of the U-Net's first adapted layer",
        "layers": "the number of layers with the adapter switched on",
    }
    rounding = max(_CHANGE_ROUNDING[dtype] for dtype in dtypes)
    mixed = len(set(dtypes)) > 1
    for name, words in what.items():
        here, there = getattr(held, name), getattr(expected, name)
        unbound = not here and there > rounding
        differs = not abs(here - there) <= _CHANGE_TOLERANCE * there + rounding
        # In another dtype, a small change drowns in rounding; the digest has shown the weights.
        if unbound or (differs and not (mixed and name != "layers")):
            raise EffectError(
                f"rollout actor ({info.actor}) holds the adapter of policy version {version}, but "
                f"its effect differs: {words} is {here:.3g}, at the learner {there:.3g}"
            )


async def sample_again(
    crew: Crew, units: Sequence[WorkUnit], policy: ObjectRef
) -> tuple[ObjectRef, ...]:
    """Resample lost trajectories: they are bit-identical, so existing scores still apply."""
    parts = await gather(*(crew.sample(unit, [policy]) for unit in units))
    return tuple(trajectory for _, trajectory, _ in parts)


async def score(
    crew: Crew,
    images: ObjectRef,
    prompts: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    *,
    hurry: bool = True,
) -> tuple[np.ndarray, dict[str, str], dict[str, float]]:
    """Score a batch with all rewards: float64 [B, R] with NaN for failures, errors, seconds.

    `hurry`: see `RewardPool.score`.
    """
    rewards = crew.config.rewards
    pools = [crew.rewards[reward.key] for reward in rewards]
    answers = await gather(*(pool.score(images, prompts, metadata, hurry=hurry) for pool in pools))
    columns, errors, seconds = [], {}, {}
    for reward, answer in zip(rewards, answers, strict=True):
        if answer.error is not None:
            errors[reward.key] = answer.error
        scores = answer.scores if answer.scores is not None else [np.nan] * len(prompts)
        columns.append(np.array(scores, dtype=np.float64))
        seconds[reward.key] = answer.seconds
    return np.stack(columns, axis=1), errors, seconds


def is_scored(config: Config, rewards: np.ndarray) -> np.ndarray:
    """Of scores, float64 [N, R]: bool [N], True where no reward failed that is not held out."""
    failed = np.isnan(rewards) & [not reward.held_out for reward in config.rewards]
    return ~failed.any(axis=1)


def check_masked(config: Config, rewards: np.ndarray, errors: dict[str, str], what: str) -> None:
    """Stop instead of training on the rest if too many samples could not be scored.

    Raises:
        RewardError: naming the reward, how many samples it failed on, and its last error.
    """
    for column, reward in enumerate(config.rewards):
        failed = int(np.isnan(rewards[:, column]).sum())
        if not reward.held_out and failed > config.advantage.max_masked * len(rewards):
            cause = errors.get(reward.key, "score() returned NaN")
            raise RewardError(
                f"reward {reward.key} could not score {failed} of {len(rewards)} samples of "
                f"{what} (advantage.max_masked allows {config.advantage.max_masked:.0%}); "
                f"last error: {cause}"
            )


async def count_truncated(crew: Crew, prompts: Sequence[Prompt]) -> tuple[int, str]:
    """How many distinct prompts the text encoder truncates, and a warning if there are any."""
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    cut = await crew.count_truncated(texts)
    if not cut:
        return 0, ""
    return cut, (
        f"warning: {cut} of {len(texts)} prompts are longer than the text encoder's limit; "
        "their ends are cut off"
    )
