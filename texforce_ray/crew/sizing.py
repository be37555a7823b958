"""Resolves batch sizes that the config leaves to the device's memory."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Literal, TypeAlias

import ray
from ray.exceptions import RayError

from texforce_ray.cluster.answers import readable
from texforce_ray.cluster.autoscaling import patience
from texforce_ray.cluster.placement import actor_options, free_nodes, has_room
from texforce_ray.cluster.requests import Request, needs, shortage
from texforce_ray.config import Config, LearnerConfig, RolloutConfig
from texforce_ray.errors import ResourceError

Role: TypeAlias = Literal["rollout", "learner"]
_KEYS: dict[Role, str] = {"rollout": "rollout.batch_size", "learner": "learner.microbatch_size"}


def needs_sizes(config: Config) -> bool:
    return not config.rollout.batch_size or _needs_microbatch(config)


def _needs_microbatch(config: Config) -> bool:
    return not config.learner.microbatch_size or config.learner.gradient_checkpointing == "auto"


async def with_sizes(config: Config) -> Config:
    """The config with every 'auto' of these replaced by what fits.

    Sizes affect how results round, so they are found once, here, and stored with the run. Each
    role's size is measured with the resources of its actors.

    Raises:
        ResourceError: one sample does not fit, or the measurement timed out.
        ActorError: the model could not be loaded there.
    """
    if not config.rollout.batch_size:
        config = config.changed(await _found(config, "rollout"))
    if _needs_microbatch(config):
        config = config.changed(await _found(config, "learner"))
    return config


async def _found(config: Config, role: Role) -> dict[str, Any]:
    resources = needs(config, _host(config, role))
    task = (
        ray.remote(find_sizes)
        .options(**actor_options(resources), max_retries=0)
        .remote(config, role)
    )
    timeout = config.ray.start_timeout_s + patience(config)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(task.future()), timeout)
    except RayError as error:
        raise readable("sizing", f"finding {_KEYS[role]}", error) from None
    except TimeoutError:
        asked, nodes = [Request(f"measurement of {_KEYS[role]}", 1, resources)], free_nodes()
        key = _KEYS[role]
        if role == "learner" and config.learner.microbatch_size:
            key = "learner.gradient_checkpointing"
        cause = "it was still running"
        if not has_room(asked, nodes):
            cause = "; ".join(["the cluster has no room for it", *shortage(asked, nodes)])
        raise ResourceError(
            f"{key}: 'auto' was not found within {timeout:.0f} s (ray.start_timeout_s and "
            f"the time to wait for room): {cause}; raise ray.start_timeout_s, or set it "
            "yourself"
        ) from None
    finally:  # however the wait ends, the run needs the device
        with contextlib.suppress(RayError, ValueError):
            ray.cancel(task, force=True)


def _host(config: Config, role: Role) -> RolloutConfig | LearnerConfig:
    """The part of the config that sets what the role's actor may use."""
    shared = role == "learner" and config.learner.colocated
    return config.rollout if role == "rollout" or shared else config.learner


def find_sizes(config: Config, role: Role) -> dict[str, Any]:
    """Values of the role's keys for the device of this process."""
    from texforce_ray.actors.rollout import quiet_libraries
    from texforce_ray.model import sizing
    from texforce_ray.model.backbone import load_config_backbone
    from texforce_ray.model.padding import padded

    candidates = sizing.batch_candidates(config)
    on_cpu = _sizes(role, max(n for n in candidates if n <= sizing.CPU_BATCH))
    asked = config.learner.gradient_checkpointing
    if role == "learner":
        microbatch = config.learner.microbatch_size or sizing.CPU_MICROBATCH
        on_cpu = _sizes(role, microbatch, asked is True)
    gpus = _host(config, role).num_gpus
    if config.model.device == "cpu" or (config.model.device == "auto" and not gpus):
        return on_cpu
    quiet_libraries()
    model = config.of_rollouts if role == "rollout" else config
    backbone = load_config_backbone(model, gpus)
    device = backbone.device
    if device.type != "cuda":
        return on_cpu
    from texforce_ray.rl.sizing import sampling, stored_bytes, update

    room = sizing.budget(device, gpus)
    size = padded if config.model.compile else int
    if role == "rollout":
        work, stored = sampling(backbone, config), stored_bytes(backbone, config)
        with backbone.eager():  # compiled for each size, it takes minutes, and no more memory
            return _sizes(
                role,
                sizing.largest_that_fits(
                    lambda n: sizing.peak(device, lambda: work(size(n))) + n * stored,
                    candidates,
                    room,
                ),
            )
    reward = None
    if config.direct is not None:
        from texforce_ray.rewards.differentiable import total_of

        reward = total_of(config.rewards, device.type)

    _, most = update(backbone, config, reward)
    candidates = [config.learner.microbatch_size]
    if not config.learner.microbatch_size:
        candidates = sizing.microbatch_candidates(most)

    def found(recompute: bool) -> int:  # once switched on, it stays so in this process
        changed = config.changed({"learner.gradient_checkpointing": recompute})
        work, _ = update(backbone, changed, reward)
        with backbone.eager():
            return sizing.largest_that_fits(
                lambda n: sizing.peak(device, lambda: work(size(n))), candidates, room
            )

    if asked != "auto":
        return _sizes(role, found(asked), asked)
    return _sizes(role, *sizing.keeping_if_enough(found, min(most, candidates[-1])))


def _sizes(role: Role, size: int, recompute: bool = False) -> dict[str, Any]:
    if role == "rollout":
        return {_KEYS[role]: size}
    return {_KEYS[role]: size, "learner.gradient_checkpointing": recompute}
