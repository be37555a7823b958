"""TexForce in one file, without Ray: reinforcement learning of a diffusion model's text encoder.

    python examples/texforce_one_file.py --iterations 10 --out one-file

The method as the product runs it, from the same pieces, in one process and in reading order. It
leaves out what the rest of the package is for: distribution, exact resume, records, half precision,
a penalty for leaving the base model, other objectives and rewards.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from texforce_ray import randomness
from texforce_ray.artifacts.snapshot import LoraShape
from texforce_ray.diffusion.denoiser import Denoiser
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.diffusion.trajectory import Trajectory, concatenate
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.adapter_files import export_adapter
from texforce_ray.model.backbone import load_backbone
from texforce_ray.rewards.shapes import ShapesReward
from texforce_ray.rl import ppo
from texforce_ray.rl.advantage import group_advantages
from texforce_ray.rl.likelihood import Likelihood, Pairs

PROMPTS = [
    "a green circle",
    "three red squares",
    "a red triangle and a blue square",
    "a green triangle above a yellow circle",
]
LORA = LoraShape(rank=32, alpha=32.0, target_modules=("q_proj", "k_proj", "v_proj", "out_proj"))
STEPS, ETA, GUIDANCE = 10, 1.0, 1.0  # of the sampling that is trained on
TRAINED = 5  # the noisiest steps: they decide what is in the image
CLIP_RANGE, LR = 1e-3, 3e-3
MINIBATCHES = 4
BATCH, CHUNK = 32, 64  # samples drawn at once; (sample, step) pairs in one pass


def sample(
    sampler: Sampler, seed: int, iteration: int, each: int
) -> tuple[Trajectory, np.ndarray, list[str]]:
    """`each` trajectories of every prompt and their images, uint8 [N, H, W, 3]."""
    prompts = [prompt for prompt in PROMPTS for _ in range(each)]
    seeds = randomness.noise_seeds(seed, iteration, len(prompts))
    parts = [slice(first, first + BATCH) for first in range(0, len(prompts), BATCH)]
    drawn = [sampler.sample(prompts[part], seeds[part], iteration) for part in parts]
    trajectories, images = zip(*drawn, strict=True)
    return concatenate(trajectories), np.concatenate(images), prompts


def policy_gradient(
    denoiser: Denoiser,
    parameters: Sequence[Tensor],
    trajectory: Trajectory,
    advantages: np.ndarray,
    rows: np.ndarray,
    clip_range: float = CLIP_RANGE,
) -> list[Tensor]:
    """Gradient of PPO's loss (TexForce, eq. 6) over the samples `rows` and the trained steps.

    Each denoising step is an action of a Gaussian policy. Its log-probability under the current
    weights is differentiated through the frozen U-Net into the text encoder's adapter.
    """
    likelihood = Likelihood(denoiser, CHUNK)
    steps = np.tile(denoiser.process.trainable[:TRAINED], (len(trajectory), 1))
    pairs = Pairs.of(rows, steps)
    for parameter in parameters:
        parameter.grad = None
    for chunk in pairs.chunks(CHUNK):
        some = pairs[chunk]
        samples, which = np.unique(some.sample, return_inverse=True)
        conditioning, prompt = likelihood.encode(trajectory, samples)  # the policy's forward pass
        prepared = denoiser.prepare(conditioning)
        mean, step = likelihood.mean(trajectory, some, prepared, prompt[which])
        now = likelihood.density(trajectory, some, step, mean)
        then = torch.from_numpy(trajectory.log_probs[some.sample, some.step])
        advantage = torch.from_numpy(advantages[some.sample]).float()
        loss = ppo.clipped_loss(now, then, advantage, clip_range).loss
        (loss.sum() / len(pairs)).backward()
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def train(iterations: int, each: int, seed: int, out: Path | None) -> Iterator[float]:
    """Yield each iteration's mean reward; write the adapter into `out` at the end."""
    backbone = load_backbone("embedded")
    sampler = Sampler(backbone, steps=STEPS, eta=ETA, guidance_scale=GUIDANCE)
    adapter = Adapter(backbone, {"text_encoder": LORA}, seed)
    parameters = adapter.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.98), weight_decay=1e-4)
    reward, everyone = ShapesReward(), np.ones(each * len(PROMPTS), dtype=bool)
    for iteration in range(iterations):
        trajectory, images, prompts = sample(sampler, seed, iteration, each)
        rewards = np.array(reward.score(images, prompts, [{}] * len(prompts)))
        # Compared with other images of the same prompt: which of them are better?
        advantages = group_advantages(rewards, everyone, prompts).clip(-5, 5)
        for rows in randomness.minibatches(seed, iteration, 0, len(prompts), MINIBATCHES):
            policy_gradient(sampler.denoiser, parameters, trajectory, advantages, rows)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        yield float(rewards.mean())
    if out is not None:
        export_adapter(adapter.snapshot(iterations), out, "embedded")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--samples", type=int, default=64, help="per prompt and iteration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the adapter")
    options = parser.parse_args(arguments)
    rewards = train(options.iterations, options.samples, options.seed, options.out)
    for iteration, reward in enumerate(rewards):
        print(f"iteration {iteration + 1}: reward {reward:.3f}", flush=True)


if __name__ == "__main__":
    main()
