"""Actors that stand in for rollout and learner: numpy only, with the times and sizes of real ones.

With them, tests measure, or break on purpose, the system around them: driver, pools, object store.
They keep the promises of the real actors: samples are a pure function of unit and policy, and the
update of state, trajectories, advantages and mask, so runs can be compared bit for bit. The policy
is that of `linear_policy`: its latents are a few entries of arrays of any size, its image is a few
pixels, and the reward of this module is their brightness, so training has a visible effect.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from texforce_ray.actors.messages import (
    ImagePayload,
    Membership,
    Refs,
    SampleInfo,
    Updated,
    UpdateTask,
    Whereabouts,
    WorkUnit,
    pack_images,
    whereabouts,
)
from texforce_ray.artifacts.snapshot import (
    Learned,
    LoraShape,
    PolicySnapshot,
)
from texforce_ray.config import Config
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.records.looks import Looks
from texforce_ray.testing.linear_policy import (
    FEATURES,
    LIVE,
    PART,
    WEIGHTS,
    ballast,
    draw,
    fresh,
    learn,
    paint,
)

if TYPE_CHECKING:
    from texforce_ray.actors.learner import Published
    from texforce_ray.actors.roles import Learner, Roles, Rollout

REWARD = f"{__name__}:Brightness"  # as `target` of a reward


@dataclass(frozen=True)
class Settings:
    """What the actors imitate.

    sample_seconds: of one unit; update_seconds: of one iteration's update; both include their own
    arithmetic. ballast_bytes: how much larger a snapshot is than its weights; a learner's state has
    it three times, as with Adam. latent_shape, image_size: of one sample; the defaults are those of
    Stable Diffusion 1.5 and, with 50 steps and float16, make a trajectory of 1.7 MB. trace: file to
    which every actor appends what it did and when.
    """

    sample_seconds: float = 0.0
    update_seconds: float = 0.0
    ballast_bytes: int = 0
    latent_shape: tuple[int, int, int] = (4, 64, 64)
    image_size: int = 512
    trace: str | None = None


def roles(settings: Settings) -> Roles:
    """For `train(config, roles=...)`."""
    from texforce_ray.actors.roles import Roles

    return Roles(
        rollout=type("Rollout", (StandInRollout,), {"settings": settings}),
        learner=type("Learner", (StandInLearner,), {"settings": settings}),
    )


def read_trace(path: Path) -> list[dict[str, Any]]:
    """All entries of a run's trace, in the order in which they were written."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- actors --------------------------------------------------------------------------------


class _StandIn:
    settings = Settings()

    def __init__(self, config: Config) -> None:
        self.config = config

    def ready(self) -> Whereabouts:
        if "torch" in sys.modules:
            raise RuntimeError("a stand-in imported torch: its start time and memory mean nothing")
        return whereabouts("stand-in")

    def _note(self, what: str, **facts: Any) -> None:
        """Append one line to the trace; short lines written in one call do not mix."""
        if self.settings.trace is not None:
            line = {"what": what, "pid": os.getpid(), "time": time.time(), **facts}
            with open(self.settings.trace, "ab", buffering=0) as file:
                file.write(json.dumps(line).encode() + b"\n")


class StandInRollout(_StandIn):
    """The methods of `RolloutActor` that a run calls."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._loaded: str | None = None
        self._weights = np.zeros((FEATURES, LIVE))

    def count_truncated(self, prompts: Sequence[str]) -> int:
        return 0 * len(prompts)

    def sample(self, unit: WorkUnit, policy: Refs) -> tuple[SampleInfo, Trajectory, ImagePayload]:
        began, start = time.perf_counter(), time.time()
        self._load(policy)
        d = self.config.diffusion
        live, probs = draw(self._weights, unit.prompts, unit.seeds, d.steps, d.storage_dtype)
        # Filled rather than empty: untouched pages cost nothing to copy and hold arbitrary values.
        latents = np.full((*live.shape[:2], *self.settings.latent_shape), 0.5, live.dtype)
        latents.reshape(*live.shape[:2], -1)[:, :, :LIVE] = live
        trajectory = Trajectory(
            prompt_ids=(np.zeros((len(unit), 77), np.int64),),
            latents=latents,
            slots=np.tile(np.arange(d.steps + 1), (len(unit), 1)),
            timesteps=np.arange(d.steps)[::-1].copy(),
            log_probs=probs,
            prompts=tuple(unit.prompts),
            seeds=np.array(unit.seeds),
            policy_version=unit.policy_version,
        )
        images = pack_images(self._images(live))
        _rest(began, self.settings.sample_seconds)
        self._note("sample", start=start, iteration=unit.iteration, index=unit.index)
        seconds = time.perf_counter() - began
        return SampleInfo(seconds, trajectory_bytes=trajectory.nbytes), trajectory, images

    def generate(
        self,
        prompts: Sequence[str],
        seeds: np.ndarray,
        policy: Refs,
        guidance_scale: float,
    ) -> tuple[SampleInfo, ImagePayload]:
        del guidance_scale
        began = time.perf_counter()
        self._load(policy)
        d = self.config.diffusion
        live, _ = draw(self._weights, prompts, seeds, d.steps, d.storage_dtype)
        images = self._images(live)
        _rest(began, self.settings.sample_seconds)
        return SampleInfo(time.perf_counter() - began, Looks.of(images)), pack_images(images)

    def export(self, policy: Refs) -> dict[str, bytes]:
        import ray
        from safetensors.numpy import save

        given: PolicySnapshot = ray.get(policy[0])
        return {
            "adapter_config.json": json.dumps({"stand_in": given.version}).encode(),
            "adapter_model.safetensors": save({WEIGHTS: given.adapters[PART][WEIGHTS].copy()}),
        }

    def load_policy(
        self, adapters: Sequence[tuple[float, str, dict[str, bytes]]]
    ) -> tuple[None, PolicySnapshot]:
        from safetensors.numpy import load

        terms = [
            np.float32(weight) * load(files["adapter_model.safetensors"])[WEIGHTS]
            for weight, _, files in adapters
        ]
        adapter = {WEIGHTS: np.sum(terms, axis=0), "ballast": ballast(0, 0)}
        return None, PolicySnapshot(0, {PART: LoraShape(1, 1.0, (WEIGHTS,))}, {PART: adapter})

    def _load(self, policy: Refs) -> None:
        """Like the real one: load only if the task names another policy; without one, the base."""
        import ray

        wanted = policy[0].hex() if policy else None
        if wanted == self._loaded:
            return
        began = time.perf_counter()
        if wanted is None:
            self._weights = np.zeros((FEATURES, LIVE))
        else:
            given: PolicySnapshot = ray.get(policy[0])
            self._weights = given.adapters[PART][WEIGHTS].astype(np.float64)
            given.adapters[PART]["ballast"].copy()  # as if onto a device
            self._note("load", version=given.version, seconds=time.perf_counter() - began)
        self._loaded = wanted

    def _images(self, live: np.ndarray) -> np.ndarray:
        size = self.settings.image_size
        images = np.full((len(live), size, size, 3), 127, np.uint8)
        images.reshape(len(live), -1)[:, :LIVE] = paint(live[:, -1])
        return images


class StandInLearner(_StandIn):
    """The methods of `LearnerActor` that a run calls; each of several does the whole update."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._address: str | None = None
        self._learned = fresh(self.settings.ballast_bytes)

    def meeting(self) -> str | None:
        return self._address

    def meeting_point(self) -> str:
        return f"stand-in-{os.getpid()}"

    def initialize(self, learned: Refs, begin: Refs = ()) -> Published:
        import ray

        del begin
        if learned:
            self._learned = Learned(*ray.get(list(learned)))
        return Updated({}), *self._learned

    def update(self, task: UpdateTask, membership: Membership) -> Published:
        import ray

        began, start, used = time.perf_counter(), time.time(), store_bytes()
        self._address = membership.address
        if self._learned.state.version != task.version:
            self._learned = Learned(*ray.get(list(task.learned)))
        if task.behaviour:
            ray.get(task.behaviour[0])
        parts = [_live(part) for part in ray.get(list(task.trajectories))]
        fetched = time.perf_counter() - began
        used = max(used, store_bytes())
        metrics, self._learned = learn(
            self._learned, _joined(parts), task.advantages, task.mask, self.config.optimizer.lr
        )
        _rest(began, self.settings.update_seconds)
        seconds = time.perf_counter() - began
        version = self._learned.state.version
        self._note("update", start=start, version=version, store_bytes=used)
        if membership.rank:
            return Updated({}), None, None, None
        return Updated(metrics, seconds=seconds, fetch_seconds=fetched), *self._learned


class Brightness:
    """A reward: brightness of the live pixels, 0 to 1; `seconds` for each image."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def score(
        self,
        images: np.ndarray,
        prompts: list[str],
        metadata: list[dict[str, Any]],  # noqa: ARG002 - what a reward is given
    ) -> list[float]:
        began = time.perf_counter()
        pixels = images.reshape(len(images), -1)[:, :LIVE].astype(np.float64)
        _rest(began, self.seconds * len(prompts))
        return (pixels.mean(axis=1) / 255).tolist()


def store_bytes() -> float:
    """Bytes in use in the object stores of all nodes."""
    import ray

    name = "object_store_memory"
    return ray.cluster_resources().get(name, 0.0) - ray.available_resources().get(name, 0.0)


def _rest(began: float, seconds: float) -> None:
    time.sleep(max(0.0, began + seconds - time.perf_counter()))


def _live(trajectory: Trajectory) -> Trajectory:
    """The part used for learning: a learner holds a few timesteps of its batch at a time."""
    from dataclasses import replace

    latents = trajectory.latents
    return replace(trajectory, latents=latents.reshape(*latents.shape[:2], -1)[:, :, :LIVE].copy())


def _joined(parts: Sequence[Trajectory]) -> Trajectory:
    from texforce_ray.diffusion.trajectory import concatenate

    return concatenate(parts)


if TYPE_CHECKING:  # they implement their roles
    _ROLLOUT: type[Rollout] = StandInRollout
    _LEARNER: type[Learner] = StandInLearner
