"""A training run without Ray, in one process: the same units, sampler, rewards and learner.

It trains the adapter that `python -m texforce_ray.run` trains (tests/system/test_objectives.py) and
starts in a second, so that many runs can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from texforce_ray import randomness
from texforce_ray.artifacts.snapshot import PolicySnapshot
from texforce_ray.config import Config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.diffusion.trajectory import concatenate
from texforce_ray.driver.advantages import AdvantageEstimator
from texforce_ray.driver.units import plan_units
from texforce_ray.model.backbone import load_config_backbone
from texforce_ray.model.flops import pass_flops, sample_flops
from texforce_ray.prompts import Prompt, load_prompts, prompts_of_iteration
from texforce_ray.records.looks import Looks
from texforce_ray.rewards import arguments, resolve
from texforce_ray.rewards.base import load_reward
from texforce_ray.rl.objectives import make_learner
from texforce_ray.rl.sharding import UpdateBatch


@dataclass(frozen=True)
class Scored:
    """N images of a policy: rewards, float64 [N] each, by name."""

    prompts: tuple[str, ...]
    rewards: dict[str, np.ndarray]
    looks: Looks


@dataclass(frozen=True)
class _Rewards:
    """What an estimator reads of a scored batch."""

    rewards: np.ndarray
    prompts: tuple[str, ...]


class OneProcess:
    """The run of a config, iteration by iteration."""

    def __init__(self, config: Config, *, gpu: bool = False) -> None:
        self.config = config
        backbone = load_config_backbone(config, float(gpu))
        d = config.diffusion
        self._sample_flops = sample_flops(backbone, d.steps, d.guidance_scale)
        self._pass_flops = pass_flops(backbone, decoder=config.direct is not None)
        self.learner = make_learner(backbone, config)
        # The learner's backbone: its adapter between updates is what samples.
        self.sampler = Sampler.of(backbone, config)
        self.prompts = load_prompts(config.prompts.train)
        self._scorers = {
            r.key: load_reward(resolve(r.name, r.target), arguments(r.name, r.kwargs))
            for r in config.rewards
        }
        self._estimator = AdvantageEstimator(config, {})

    def iterations(self) -> Iterator[dict[str, float]]:
        """Each iteration's metrics, seconds, samples and FLOPs so far."""
        samples, flops = 0, 0.0
        for iteration in range(self.config.iterations):
            began = time.perf_counter()
            units = plan_units(self.config, self.prompts, iteration)
            sampler = self.sampler.at(self.config, iteration)
            parts = []
            for unit in units:
                keep = self.learner.kept_latents(
                    self.config,
                    self.learner.process,
                    iteration,
                    unit.index * self.config.rollout.batch_size,
                    len(unit),
                )
                drawn = sampler.sample(unit.prompts, unit.seeds, iteration, keep)
                scores = self._score(drawn[1], unit.prompts, unit.metadata, trained=True)
                parts.append((*drawn, scores))
            trajectories, _, scored = zip(*parts, strict=True)
            sampled = time.perf_counter()
            prompts = tuple(prompt for unit in units for prompt in unit.prompts)
            rewards = np.concatenate(scored)
            mask = ~np.isnan(rewards).any(axis=1)
            batch: Any = _Rewards(rewards, prompts)
            total, advantages = self._estimator.advantages(batch, mask)
            trajectory = concatenate(trajectories)
            metrics = self.learner.update(UpdateBatch(trajectory, advantages, mask))
            self._estimator.commit()
            samples += len(mask)
            flops += len(mask) * self._sample_flops
            flops += self.learner.update_flops(metrics, self._pass_flops)
            yield metrics | {
                "iteration": iteration + 1,
                "samples": samples,
                "flops": flops,
                "reward": float(total[mask].mean()),
                "bytes": trajectory.nbytes / len(mask),
                "seconds/sampling": sampled - began,
                "seconds/update": time.perf_counter() - sampled,
            }

    def evaluate(self, prompts: Sequence[Prompt], count: int) -> Scored:
        """Draw and score as the run's evaluations do: the same prompts, seeds and guidance."""
        config = self.config
        chosen = prompts_of_iteration(list(prompts), config.eval.seed, 0, count)
        seeds = randomness.noise_seeds(config.eval.seed, 0, count, randomness.EVALUATION)
        sampler = self.sampler.drawing(
            config.evaluation_guidance, config.evaluation_eta, config.evaluation_steps
        )
        size, scores, looks = config.rollout.batch_size, [], []
        with self.evaluated():
            for first in range(0, count, size):
                part = chosen[first : first + size]
                texts = [p.text for p in part]
                _, images = sampler.sample(texts, seeds[first : first + size], 0)
                scores.append(self._score(images, texts, [p.metadata for p in part]))
                looks.append(Looks.of(images))
        columns = np.concatenate(scores).T
        return Scored(
            tuple(p.text for p in chosen),
            dict(zip(self._scorers, columns, strict=True)),
            Looks.joined(looks),
        )

    def exported(self) -> PolicySnapshot:
        """What is evaluated and exported: of NFT, the policy that learns, not the sampling one."""
        learned = self.learner.learned()
        return learned.snapshot if learned.average is None else learned.average

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Within the block, the adapter holds what is exported."""
        sampling = self.learner.learned().snapshot
        self.learner.adapter.load_weights(self.exported().adapters)
        try:
            yield
        finally:
            self.learner.adapter.load_weights(sampling.adapters)

    def _score(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        *,
        trained: bool = False,
    ) -> np.ndarray:
        """float64 [B, R]; `trained`: rewards of weight 0, which are only recorded, are 0."""
        given, columns = (list(prompts), list(metadata)), []
        for reward in self.config.rewards:
            left_out = trained and not reward.weight
            scores = (
                [0.0] * len(images) if left_out else self._scorers[reward.key].score(images, *given)
            )
            columns.append(scores)
        return np.array(columns, dtype=np.float64).T
