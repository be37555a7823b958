"""Actors: how many there are, what each may use, on which nodes; and how to reach Ray."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from texforce_ray.config.fields import AutoSize, DType, Section, free


class RolloutConfig(Section):
    """Actors that generate trajectories."""

    num_workers: int = free(1, "rollout actors", ge=1)
    min_workers: int | None = free(
        None,
        "rollout actors needed to start; the others join when the cluster has room "
        "for them. Default: num_workers",
        ge=1,
    )
    batch_size: AutoSize = Field(
        32,
        ge=0,
        description="samples in one unit of work; 'auto': as many as memory allows, measured "
        "before the run starts and stored in its config",
    )
    dtype: DType | None = Field(
        None,
        description="dtype of the frozen weights of rollout actors; null: model.dtype. Another one "
        "needs an objective on the forward process, which trains on finished samples however they "
        "were drawn",
    )
    decode_batch_size: int = Field(8, ge=1, description="latents that the VAE decodes at once")
    num_threads: int = Field(2, ge=1, description="CPU threads of one actor (changes rounding)")
    num_cpus: float = free(1.0, "CPUs that Ray reserves for each actor", ge=0)
    num_gpus: float = free(0.0, "GPUs that Ray reserves for each actor", ge=0)
    resources: dict[str, float] = free({}, "custom Ray resources for each actor")
    timeout_s: float = free(1800.0, "deadline for one unit of work", gt=0)
    max_unscored: int | None = free(
        None,
        "rollouts wait while this many units are being sampled or scored; default: "
        "2 x num_workers + 2",
        ge=1,
    )

    @property
    def unscored_units(self) -> int:
        return self.max_unscored or 2 * self.num_workers + 2


class LearnerConfig(Section):
    """The actor that trains."""

    num_workers: int = free(
        1, "learner actors that share each update; must divide gradient_shards", ge=1
    )
    microbatch_size: AutoSize = Field(
        64,
        ge=0,
        description="(sample, timestep or noise level) pairs in one pass through the U-Net; with "
        "objective.kind 'direct', counted over all steps with gradient, but at least one image; "
        "'auto': as for rollout.batch_size",
    )
    gradient_shards: int = Field(
        1,
        ge=1,
        description="fixed parts of a minibatch whose gradients are summed in a fixed order, so "
        "that the result is bit-identical on any number of learners",
    )
    gradient_checkpointing: bool | Literal["auto"] = free(
        False,
        "recompute the denoiser's activations instead of keeping them: a third slower; 'auto': if "
        "otherwise the device's memory holds fewer than 8 pairs",
    )
    colocated: bool = free(
        False,
        "run the learner in the rollout actor, which takes turns on one set of weights and one "
        "device; for one GPU. learner.num_cpus and num_gpus are then not reserved",
    )
    num_threads: int = Field(2, ge=1, description="CPU threads of each learner (changes rounding)")
    num_cpus: float = free(0.5, "CPUs that Ray reserves for each learner", ge=0)
    num_gpus: float = free(0.0, "GPUs that Ray reserves for each learner", ge=0)
    resources: dict[str, float] = free({}, "custom Ray resources for each learner")
    timeout_s: float = free(7200.0, "deadline for one iteration's updates", gt=0)
    min_gradient_agreement: float = free(
        0.9,
        "in half precision, the minimum cosine of the first gradient to that in float32; below it, "
        "the run stops before its first update",
        ge=-1,
        le=1,
    )


class PlacementConfig(Section):
    """Which nodes may run which actors.

    Each value names a custom Ray resource that nodes offer, e.g. `ray start --resources
    '{"rollout": 1}'`. Every actor of the role takes a tiny part of it, so any number of them fits.
    """

    rollout: str | None = free(
        None, "custom resource of the nodes for rollout actors, e.g. 'rollout'; null: any node"
    )
    reward: str | None = free(None, "custom resource of the nodes for reward servers")
    learner: str | None = free(None, "custom resource of the nodes for learners")

    @model_validator(mode="after")
    def _custom(self) -> PlacementConfig:
        for role in ("rollout", "reward", "learner"):
            name = getattr(self, role)
            if name is not None and (name != name.strip() or not name):
                raise ValueError(f"{role}: {name!r} is not a resource name; null: any node")
            if name in ("CPU", "GPU", "memory", "object_store_memory"):
                raise ValueError(
                    f"{role}: {name!r} is not a custom resource: every node has it; start nodes "
                    f"with e.g. --resources '{{\"{role}\": 1}}' and use {role!r}"
                )
        return self


class RayConfig(Section):
    """How to reach Ray."""

    address: str | None = free(
        None, "'auto' or an address: join that cluster; null: RAY_ADDRESS if set, else a new one"
    )
    start_timeout_s: float = free(180.0, "deadline for all actors to be ready", gt=0)
    resource_timeout_s: float = free(20.0, "how long to wait for resources on the cluster", gt=0)
    max_restarts: int = free(
        3,
        "restarts of each rollout actor and learner; those of reward servers only count against "
        "max_run_restarts",
        ge=0,
    )
    max_run_restarts: int = free(100, "actor failures that one run tolerates before it stops", ge=0)
    watchdog_s: float = free(
        300.0, "after this long without a result, the run logs what it is waiting for", gt=0
    )
    task_retries: int = free(3, "retries of a unit of work whose actor died", ge=0)
    environments: str | None = free(
        None,
        "folder of the rewards' environments on every node; default: TEXFORCE_ENVIRONMENTS, "
        "else ~/.cache/texforce_ray/environments",
    )
    environment_timeout_s: float = free(1800.0, "deadline for building one environment", gt=0)
    dashboard: bool = free(False, "start the dashboard with a new local cluster")
    autoscale: Literal["auto"] | bool = free(
        "auto",
        "request the run's resources from the cluster's autoscaler and release them at the end; "
        "'auto': if an autoscaler is running",
    )
    autoscale_timeout_s: float = free(
        900.0, "how long to wait for resources while an autoscaler adds nodes", gt=0
    )
