"""Resolves batch sizes that the config leaves to the device's memory."""

from __future__ import annotations

import asyncio

import ray
from ray.exceptions import RayError

from texforce_ray.actors.autoscaling import patience
from texforce_ray.actors.fit import needs
from texforce_ray.actors.placement import options
from texforce_ray.actors.pool import readable
from texforce_ray.config import Config


def needs_sizes(config: Config) -> bool:
    return not (config.rollout.batch_size and config.learner.microbatch_size)


async def with_sizes(config: Config) -> Config:
    """The config with every 'auto' size replaced by what fits.

    A size decides how results round, so it is found once, here, and stored with the run.

    Raises:
        ResourceError: one sample does not fit.
        ActorError: the model could not be loaded there.
    """
    if not needs_sizes(config):
        return config
    role = config.rollout if not config.rollout.batch_size else config.learner
    where = options(needs(config, role))
    task = ray.remote(find_sizes).options(**where, max_retries=0).remote(config)
    timeout = config.ray.start_timeout_s + patience(config)
    try:
        batch, micro = await asyncio.wait_for(asyncio.wrap_future(task.future()), timeout)
    except RayError as error:
        raise readable("sizing", "finding batch sizes", error) from None
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"batch_size": batch}),
            "learner": config.learner.model_copy(update={"microbatch_size": micro}),
        }
    )


def find_sizes(config: Config) -> tuple[int, int]:
    """(rollout.batch_size, learner.microbatch_size) for the device of this process."""
    from texforce_ray.actors.rollout import quiet_libraries
    from texforce_ray.model import sizing
    from texforce_ray.model.backbone import load_config_backbone

    candidates = sizing.batch_candidates(config)
    batch, micro = config.rollout.batch_size, config.learner.microbatch_size
    device = config.model.device
    if device == "cpu" or (device == "auto" and not config.rollout.num_gpus):
        most = max(n for n in candidates if n <= sizing.CPU_BATCH)
        return batch or most, micro or sizing.CPU_MICROBATCH
    quiet_libraries()
    backbone = load_config_backbone(config.model, config.rollout.num_gpus)
    if not batch:
        room = sizing.budget(backbone, config.rollout.num_gpus)
        batch = sizing.largest_that_fits(sizing.rollout_bytes(backbone, config), candidates, room)
    if not micro:
        room = sizing.budget(backbone, config.learner.num_gpus)
        measure = sizing.update_bytes(backbone, config)
        micro = sizing.largest_that_fits(measure, sizing.microbatch_candidates(), room)
    return batch, micro
