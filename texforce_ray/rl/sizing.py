"""The work whose memory use determines batch sizes: sampling and updates, at any size.

It runs the real sampler and the real learner on dummy data, so that every part that a config adds
is measured: adapters, optimizer, KL pass, the VAE and rewards of direct backpropagation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from texforce_ray.config import Config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.errors import NumericsError
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.backbone import Backbone
from texforce_ray.rl.adapters import adapter_shapes
from texforce_ray.rl.direct_learner import DifferentiableScore, DirectLearner
from texforce_ray.rl.learner import Learner
from texforce_ray.rl.objectives import learner_class
from texforce_ray.rl.sharding import UpdateBatch

Work = Callable[[int], object]
_STEPS = 2  # sampled; further steps need no memory beyond what they store


def sampling(backbone: Backbone, config: Config) -> Work:
    """Sample a unit of work of any size; the policy's adapter stays on the backbone."""
    d = config.diffusion
    Adapter(backbone, adapter_shapes(config, backbone), config.seed)
    # An evaluation with guidance takes twice the memory of a rollout without.
    others = config.evaluation_guidance, *config.eval.guidance_curve
    largest = max(d.guidance_scale, *others)
    sampler = Sampler(
        backbone,
        steps=min(_STEPS, d.steps),
        eta=d.eta,
        guidance_scale=largest,
        kernel=d.kernel,
        storage_dtype=d.storage_dtype,
        decode_batch_size=config.rollout.decode_batch_size,
    )
    return lambda size: sampler.sample(_prompts(config, size), np.arange(size), 0)


def stored_bytes(backbone: Backbone, config: Config) -> int:
    """Bytes that a sample keeps on the device for the steps that `sampling` leaves out.

    For each step, a latent and its noise in float32.
    """
    left_out = max(0, config.diffusion.steps - _STEPS)
    return 2 * 4 * left_out * int(np.prod(backbone.latent_shape))


def update(
    backbone: Backbone, config: Config, reward: DifferentiableScore | None = None
) -> tuple[Work, int]:
    """One minibatch's update by `learner.microbatch_size`, and the largest useful size.

    `reward`: with objective.kind 'direct', the total to maximise.
    """
    # A shard's prompts are encoded together, whatever the microbatch.
    samples = config.shard_size
    if config.direct is not None:
        assert reward is not None
        total, method = reward, config.direct.method
        passes = 1 if method == "refl" else min(config.direct.steps, config.diffusion.steps)
        return (
            _work(config, lambda c: DirectLearner(backbone, c, total), 0, passes),
            samples * passes,
        )
    if config.objective.kind == "ppo":
        pairs = config.trained_timesteps
    else:
        pairs = min(config.noise_levels or 1, config.diffusion.steps)
    return _work(config, lambda c: learner_class(c)(backbone, c), samples), samples * pairs


def _work(config: Config, make: Callable[[Config], Learner], samples: int, passes: int = 1) -> Work:
    """Updates on a minibatch of `samples` samples; 0: as many as the microbatch holds.

    `passes`: in the latter case, pairs of each image.
    """

    def work(size: int) -> None:
        count = samples or max(1, size // passes)
        steps = 1
        if config.objective.kind == "ppo":
            steps = min(max(1, -(-size // count)), config.trained_timesteps)
        learner = make(_one_minibatch(config, size, steps))
        learner.checked = True  # skip the gradient check, which frees its memory
        batch = UpdateBatch(
            _trajectory(learner, config, count), np.ones(count), np.ones(count, dtype=bool)
        )
        try:
            with suppress(NumericsError):  # these samples are not real
                learner.update(batch)
        finally:
            learner.adapter.remove()

    return work


def _one_minibatch(config: Config, size: int, steps: int) -> Config:
    """One epoch of one update, with microbatches of `size` and `steps` timesteps per sample."""
    values: dict[str, Any] = {
        "update.epochs": 1,
        "update.minibatches": 1,
        "update.max_skipped": 1000,
        "learner.num_workers": 1,
        "learner.gradient_shards": 1,
        "learner.microbatch_size": size,
    }
    if config.objective.kind == "ppo":
        values |= {
            "objective.timestep_fraction": steps / config.diffusion.steps,
            "objective.decoupled": "never",
            "objective.target_kl": None,
            "objective.max_ratio_error": math.inf,
        }
    elif config.objective.kind == "raft":  # then all samples count, as they may in a minibatch
        values["objective.anchor_weight"] = max(config.objective.anchor_weight, 1e-9)
    elif config.direct is not None and config.direct.method == "alignprop":
        values["objective.method"] = "draft"  # alignprop draws fewer at times: measure the most
    return config.changed(values)


def _trajectory(learner: Learner, config: Config, count: int) -> Trajectory:
    """`count` dummy samples; their latents share one array, so that they take no memory here."""
    timesteps = learner.process.timesteps.cpu().numpy()
    prompts = _prompts(config, count)
    latent = np.zeros(learner.backbone.latent_shape, dtype=config.diffusion.storage_dtype)
    return Trajectory(
        prompt_ids=tuple(ids.numpy() for ids in learner.backbone.tokenize(prompts).ids),
        latents=np.broadcast_to(latent, (count, len(timesteps) + 1, *latent.shape)),
        slots=np.tile(np.arange(len(timesteps) + 1), (count, 1)),
        timesteps=timesteps,
        log_probs=np.zeros((count, len(timesteps)), dtype=np.float32),
        prompts=tuple(prompts),
        seeds=np.arange(count),
        policy_version=0,
    )


def _prompts(config: Config, count: int) -> list[str]:
    """`count` prompts of common words, as many distinct ones as an iteration has."""
    distinct = min(count, config.prompts.per_iteration)
    texts = [" ".join("red" if bit == "1" else "a" for bit in f"{i:b}") for i in range(distinct)]
    return [texts[i % distinct] for i in range(count)]
