"""What an iteration costs as the work grows: samples, steps, image size, LoRA rank, rewards.

    python benchmarks/growth.py [--rounds 3]

The plain classes on the embedded pipeline, one thread pool for all; each row changes one setting of
the first. Ways take turns in one process; ratios are of medians. Writes
benchmarks/results/growth.json and growth.md.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from common import ROOT, Clock, as_in_an_actor, medians, write

from texforce_ray.config import Config
from texforce_ray.config.io import load_config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.diffusion.trajectory import concatenate
from texforce_ray.model.backbone import load_backbone
from texforce_ray.rewards import arguments, resolve
from texforce_ray.rewards.base import load_reward
from texforce_ray.rl.ppo_learner import PpoLearner
from texforce_ray.rl.sharding import UpdateBatch

BASE = (
    "diffusion.guidance_scale=5",
    "objective.timestep_choice=random",
    "objective.kl_weight=0",
    "prompts.per_iteration=2",
    "prompts.samples_per_prompt=8",
    "rollout.batch_size=16",
    "update.minibatches=2",
    "lora.text_encoder.rank=16",
)
ROWS = {
    "16 samples, 10 steps, rank 16, one reward": (),
    "32 samples": ("prompts.samples_per_prompt=16",),
    "20 steps": ("diffusion.steps=20",),
    "images of 128 x 128": ("size=16",),
    "rank 64": ("lora.text_encoder.rank=64",),
    "two rewards": ("rewards=[{name: shapes}, {name: jpeg_incompressibility}]",),
}


@dataclass
class Iteration:
    """One iteration of the plain classes, phase by phase."""

    config: Config
    size: int | None

    def __post_init__(self) -> None:
        config = self.config
        self.backbone = load_backbone(config.model.path)
        if self.size is not None:
            # The U-Net is convolutional: a larger latent makes a larger image.
            self.backbone.denoiser.register_to_config(sample_size=self.size)
        d = config.diffusion
        self.learner = PpoLearner(self.backbone, config)
        self.sampler = Sampler(
            self.backbone,
            steps=d.steps,
            eta=d.eta,
            guidance_scale=d.guidance_scale,
            decode_batch_size=config.rollout.decode_batch_size,
        )
        self.rewards = [
            load_reward(resolve(r.name, r.target), arguments(r.name, r.kwargs))
            for r in config.rewards
        ]

    def run(self) -> dict[str, float]:
        """Seconds of each phase."""
        count, unit = self.config.samples_per_iteration, self.config.rollout.batch_size
        prompts = ["a green circle" if 2 * i < count else "three red squares" for i in range(count)]
        clock = Clock()
        parts, images = [], []
        for first in range(0, count, unit):
            rows = slice(first, first + unit)
            trajectory, drawn = self.sampler.sample(
                prompts[rows], np.arange(count)[rows], self.learner.version
            )
            parts.append(trajectory)
            images.append(drawn)
        clock.stop("rollout")
        for reward in self.rewards:
            for drawn, part in zip(images, parts, strict=True):
                reward.score(drawn, list(part.prompts), [{}] * len(part))
        clock.stop("reward")
        advantages = np.random.default_rng(0).standard_normal(count)
        self.learner.update(UpdateBatch(concatenate(parts), advantages, np.ones(count, dtype=bool)))
        clock.stop("learner")
        return clock.seconds


def make(overrides: tuple[str, ...]) -> Iteration:
    size = next((int(o.partition("=")[2]) for o in overrides if o.startswith("size=")), None)
    given = [o for o in overrides if not o.startswith("size=")]
    return Iteration(load_config(ROOT / "configs" / "shapes.yaml", [*BASE, *given]), size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    as_in_an_actor()
    found = medians(options.rounds, {name: make(changes).run for name, changes in ROWS.items()})
    first = next(iter(found.values()))
    whole = sum(first.values())
    table = [
        "| | whole iteration | rollout | reward | learner |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = {}
    for name, seconds in found.items():
        ratios = {phase: value / first[phase] for phase, value in seconds.items()}
        rows[name] = {"seconds": seconds, "ratio": sum(seconds.values()) / whole, "phases": ratios}
        cells = " | ".join(f"x {ratios[phase]:.2f}" for phase in ("rollout", "reward", "learner"))
        table.append(f"| {name} | x {rows[name]['ratio']:.2f} | {cells} |")
    result = {"threads": torch.get_num_threads(), "rows": rows}
    write("growth", result, table)


if __name__ == "__main__":
    main()
