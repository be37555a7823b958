"""The work whose memory decides batch sizes: what rollout actors and learners do, at any size.

The real sampler and the real learner on made-up data, so that every part that a config adds is
measured: adapters, optimizer, KL pass, the VAE and rewards of direct backpropagation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from texforce_ray.config import Config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.errors import NumericsError
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.backbone import Backbone
from texforce_ray.rl.direct import DifferentiableScore, DirectLearner
from texforce_ray.rl.learner import Learner
from texforce_ray.rl.trainer import Trainer, UpdateBatch, adapter_shapes

Work = Callable[[int], object]
_STEPS = 2  # that are sampled: the others take no more memory but for what they store


def sampling(backbone: Backbone, config: Config) -> Work:
    """A unit of work by its samples, under a policy; it leaves the adapter on the backbone."""
    d = config.diffusion
    Adapter(backbone, adapter_shapes(config, backbone), config.seed)
    # An evaluation with guidance takes twice the memory of a rollout without.
    given = config.evaluation_guidance, *config.eval.guidance_curve
    largest = max(d.guidance_scale, *given)
    sampler = Sampler(
        backbone,
        steps=min(_STEPS, d.steps),
        eta=d.eta,
        guidance_scale=largest,
        storage_dtype=d.storage_dtype,
        decode_batch_size=config.rollout.decode_batch_size,
    )
    return lambda size: sampler.sample(_prompts(config, size), np.arange(size), 0)


def stored_bytes(backbone: Backbone, config: Config) -> int:
    """What a sample keeps on the device through the steps that `sampling` leaves out.

    A latent and the noise of each, in float32.
    """
    left_out = max(0, config.diffusion.steps - _STEPS)
    return 2 * 4 * left_out * int(np.prod(backbone.latent_shape))


def update(
    backbone: Backbone, config: Config, reward: DifferentiableScore | None = None
) -> tuple[Work, int]:
    """One minibatch's update by `learner.microbatch_size`, and the largest size that is of use.

    `reward`: with `direct`, the total that is raised.
    """
    # A shard's prompts are encoded together, whatever the microbatch.
    samples = config.minibatch_size // config.learner.gradient_shards
    if config.direct is not None:
        assert reward is not None
        given, method = reward, config.direct.method
        passes = 1 if method == "refl" else min(config.direct.steps, config.diffusion.steps)
        return (
            _work(config, lambda c: DirectLearner(backbone, c, given), 0, passes),
            samples * passes,
        )
    most = samples * config.trained_timesteps
    return _work(config, lambda c: Learner(backbone, c), samples), most


def _work(config: Config, make: Callable[[Config], Trainer], samples: int, passes: int = 1) -> Work:
    """Updates of a minibatch of `samples`, or (0) of as many as the microbatch has.

    `passes`: pairs of each image in a microbatch of the latter.
    """

    def work(size: int) -> None:
        count = samples or max(1, size // passes)
        steps = min(max(1, -(-size // count)), config.trained_timesteps)
        learner = make(_one_minibatch(config, size, steps))
        learner.checked = True  # the check of the first gradient frees what it takes
        batch = UpdateBatch(
            _trajectory(learner, config, count), np.ones(count), np.ones(count, dtype=bool)
        )
        try:
            with suppress(NumericsError):  # these are no real samples
                learner.update(batch)
        finally:
            learner.adapter.remove()

    return work


def _one_minibatch(config: Config, size: int, steps: int) -> Config:
    """One update of one pass, with the microbatch of `size` and `steps` timesteps a sample."""
    ppo = {
        "epochs": 1,
        "num_minibatches": 1,
        "timestep_fraction": steps / config.diffusion.steps,
        "decoupled": "never",
        "target_kl": None,
        "max_skipped": 1000,
        "max_ratio_error": float("inf"),
    }
    learner = {"num_workers": 1, "gradient_shards": 1, "microbatch_size": size}
    changed = {
        "ppo": config.ppo.model_copy(update=ppo),
        "learner": config.learner.model_copy(update=learner),
    }
    if config.direct is not None and config.direct.method == "alignprop":
        # It draws how many steps: the most of them count.
        changed["direct"] = config.direct.model_copy(update={"method": "draft"})
    return config.model_copy(update=changed)


def _trajectory(learner: Trainer, config: Config, count: int) -> Trajectory:
    """`count` made-up samples; their latents are one, so that they take no memory here."""
    timesteps = learner.table.timesteps.cpu().numpy()
    prompts = _prompts(config, count)
    latent = np.zeros(learner.backbone.latent_shape, dtype=config.diffusion.storage_dtype)
    return Trajectory(
        prompt_ids=tuple(ids.numpy() for ids in learner.backbone.tokenize(prompts).ids),
        latents=np.broadcast_to(latent, (count, len(timesteps) + 1, *latent.shape)),
        timesteps=timesteps,
        log_probs=np.zeros((count, len(timesteps)), dtype=np.float32),
        prompts=tuple(prompts),
        seeds=np.arange(count),
        policy_version=0,
    )


def _prompts(config: Config, count: int) -> list[str]:
    """`count` prompts, as many of them distinct as an iteration has: words that all models know."""
    distinct = min(count, config.prompts.per_iteration)
    texts = [" ".join("red" if bit == "1" else "a" for bit in f"{i:b}") for i in range(distinct)]
    return [texts[i % distinct] for i in range(count)]
