"""Actors that stand in for rollout and learner: numpy only, with the times and sizes of real ones.

What is measured or broken on purpose is then the system around them: driver, pools, object store.
They do what the real actors promise. Samples are a pure function of unit and policy, the update of
state, trajectories, advantages and mask; so runs can be compared bit for bit. The policy is a
linear-Gaussian one of 256 weights: x_t+1 = x_t + PULL (features(prompt) W - x_t) + SIGMA noise. Its
latents are a few entries of arrays as large as asked for, its image a few pixels, and the reward of
this module is their brightness, so that training shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from texforce_ray.actors.messages import ImagePayload, Info, WorkUnit, pack_images
from texforce_ray.config import Config
from texforce_ray.diffusion.trajectory import Trajectory
from texforce_ray.model.snapshot import LearnerState, LoraShape, PolicySnapshot, Tensors
from texforce_ray.records.looks import Looks

if TYPE_CHECKING:
    from ray import ObjectRef

    from texforce_ray.actors.crew import Roles
    from texforce_ray.actors.learner import Membership

HERE = Path(__file__).parent
REWARD = "stand_ins:Brightness"  # as `target` of a reward
PART, WEIGHTS = "text_encoder", "weights"
FEATURES, LIVE = 32, 8  # W is [FEATURES, LIVE]; LIVE entries of each latent and image are used
PULL, SIGMA = 0.2, 0.3
CAP = 2.0  # of the weight of a sample that another policy drew


@dataclass(frozen=True)
class Settings:
    """What the actors imitate.

    sample_seconds: of one unit; update_seconds: of one iteration's update; their own arithmetic is
    part of it. ballast_bytes: by which a snapshot is larger than the weights; a learner's state has
    it three times, as Adam has. latent_shape, image_size: of one sample; the defaults are those of
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
    from texforce_ray.actors.crew import Roles

    return Roles(
        rollout=type("Rollout", (StandInRollout,), {"settings": settings}),
        learner=type("Learner", (StandInLearner,), {"settings": settings}),
    )


def environment() -> dict[str, Any]:
    """For `ray.init(runtime_env=...)`: workers must be able to import this module."""
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, paths))}}


def read_trace(path: Path) -> list[dict[str, Any]]:
    """All notes of a run, in the order in which they were written."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- the policy ----------------------------------------------------------------------------


def features(prompts: Sequence[str]) -> np.ndarray:
    """Fixed features of each prompt: float64 [B, FEATURES], about unit length."""
    digests = [hashlib.sha256(prompt.encode()).digest() for prompt in prompts]
    numbers = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), FEATURES)
    return (numbers / 127.5 - 1) / FEATURES**0.5


def draw(
    weights: np.ndarray, prompts: Sequence[str], seeds: np.ndarray, steps: int, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Latents [B, T + 1, LIVE] in the storage dtype, log-probabilities float32 [B, T]."""
    goal = np.einsum("bf,fd->bd", features(prompts), weights)
    noise = np.stack([np.random.default_rng(s).standard_normal((steps + 1, LIVE)) for s in seeds])
    latents = np.empty((len(seeds), steps + 1, LIVE), dtype)
    latents[:, 0] = noise[:, 0]
    for t in range(steps):  # each step goes on from the stored value, which the learner will see
        x = latents[:, t].astype(np.float64)
        latents[:, t + 1] = x + PULL * (goal - x) + SIGMA * noise[:, t + 1]
    return latents, log_probs(residuals(weights, prompts, latents))


def residuals(weights: np.ndarray, prompts: Sequence[str], latents: np.ndarray) -> np.ndarray:
    """What each step added beyond the policy's mean: float64 [B, T, LIVE]."""
    x = latents.astype(np.float64)
    goal = np.einsum("bf,fd->bd", features(prompts), weights)[:, None]
    return x[:, 1:] - x[:, :-1] - PULL * (goal - x[:, :-1])


def log_probs(difference: np.ndarray) -> np.ndarray:
    """Mean over the latent's entries, up to a constant: float32 [B, T]."""
    return (-(difference**2).mean(axis=2) / (2 * SIGMA**2)).astype(np.float32)


def paint(latents: np.ndarray) -> np.ndarray:
    """The image's live pixels: uint8 [B, LIVE], of the last latents [B, LIVE]."""
    return np.round(255 / (1 + np.exp(-latents.astype(np.float64)))).astype(np.uint8)


def learn(
    state: LearnerState,
    trajectory: Trajectory,
    advantages: np.ndarray,
    mask: np.ndarray,
    lr: float,
) -> tuple[dict[str, float], LearnerState]:
    """One Adam step on the importance-weighted policy gradient; nothing given is changed."""
    weights = state.adapters[PART][WEIGHTS].astype(np.float64)
    live = trajectory.latents.reshape(*trajectory.latents.shape[:2], -1)[:, :, :LIVE]
    difference = residuals(weights, trajectory.prompts, live)
    change = (log_probs(difference) - trajectory.log_probs).mean(axis=1, dtype=np.float64)
    factor = np.where(mask, advantages * np.minimum(np.exp(change), CAP), 0.0)
    slope = difference.mean(axis=1) * PULL / SIGMA**2
    gradient = -np.einsum("b,bf,bd->fd", factor, features(trajectory.prompts), slope)
    gradient /= max(1, int(mask.sum()))
    step = state.updates + 1
    first = 0.9 * state.optimizer["0/exp_avg"] + 0.1 * gradient
    second = 0.999 * state.optimizer["0/exp_avg_sq"] + 0.001 * gradient**2
    scale = np.sqrt(second / (1 - 0.999**step)) + 1e-8
    weights = weights - lr * first / (1 - 0.9**step) / scale
    metrics = {
        "ppo/ratio_error_first_pass": float(np.abs(np.expm1(change)).max()),
        "ppo/grad_norm": float(np.sqrt((gradient**2).sum())),
    }
    size = state.adapters[PART]["ballast"].size
    return metrics, _state(state.version + 1, step, weights, first, second, size)


def fresh(ballast_bytes: int) -> LearnerState:
    """Version 0."""
    zeros = np.zeros((FEATURES, LIVE))
    return _state(0, 0, zeros, zeros, zeros, ballast_bytes // 4)


def snapshot(state: LearnerState) -> PolicySnapshot:
    """What rollout actors need of a state."""
    return PolicySnapshot(state.version, {PART: LoraShape(1, 1.0, (WEIGHTS,))}, state.adapters)


def _state(
    version: int,
    updates: int,
    weights: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    size: int,
) -> LearnerState:
    optimizer: Tensors = {"0/exp_avg": first, "0/exp_avg_sq": second}
    optimizer |= {f"1/{key}": _ballast(size, updates) for key in ("exp_avg", "exp_avg_sq")}
    adapter = {WEIGHTS: weights.astype(np.float32), "ballast": _ballast(size, version)}
    return LearnerState(version, updates, {PART: adapter}, optimizer)


def _ballast(size: int, value: int) -> np.ndarray:
    return np.full(size, value, np.float32)


# ---- actors --------------------------------------------------------------------------------


class _StandIn:
    settings = Settings()

    def __init__(self, config: Config) -> None:
        self.config = config

    def ready(self) -> str:
        if "torch" in sys.modules:
            raise RuntimeError("a stand-in has imported torch: its start and memory say nothing")
        return f"stand-in, pid {os.getpid()}"

    def _note(self, what: str, **facts: Any) -> None:
        """One line of the trace; short ones that are appended at once do not mix."""
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

    def sample(
        self, unit: WorkUnit, policy: Sequence[ObjectRef]
    ) -> tuple[Info, Trajectory, ImagePayload]:
        began, start = time.perf_counter(), time.time()
        self._load(policy)
        d = self.config.diffusion
        live, probs = draw(self._weights, unit.prompts, unit.seeds, d.steps, d.storage_dtype)
        # Filled rather than empty: untouched pages would cost nothing to copy, and not be pure.
        latents = np.full((*live.shape[:2], *self.settings.latent_shape), 0.5, live.dtype)
        latents.reshape(*live.shape[:2], -1)[:, :, :LIVE] = live
        trajectory = Trajectory(
            prompt_ids=(np.zeros((len(unit), 77), np.int64),),
            latents=latents,
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
        return Info(seconds, trajectory_bytes=trajectory.nbytes), trajectory, images

    def generate(
        self,
        prompts: Sequence[str],
        seeds: np.ndarray,
        policy: Sequence[ObjectRef],
        guidance_scale: float,
    ) -> tuple[Info, ImagePayload]:
        del guidance_scale
        began = time.perf_counter()
        self._load(policy)
        d = self.config.diffusion
        live, _ = draw(self._weights, prompts, seeds, d.steps, d.storage_dtype)
        images = self._images(live)
        _rest(began, self.settings.sample_seconds)
        return Info(time.perf_counter() - began, Looks.of(images)), pack_images(images)

    def export(self, policy: Sequence[ObjectRef]) -> dict[str, bytes]:
        import ray
        from safetensors.numpy import save

        given: PolicySnapshot = ray.get(policy[0])
        return {
            "adapter_config.json": json.dumps({"stand_in": given.version}).encode(),
            "adapter_model.safetensors": save({WEIGHTS: given.adapters[PART][WEIGHTS].copy()}),
        }

    def _load(self, policy: Sequence[ObjectRef]) -> None:
        """As the real one: only where the task names another policy; without one, the base."""
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
            given.adapters[PART]["ballast"].copy()  # as onto a device
            self._note("load", version=given.version, seconds=time.perf_counter() - began)
        self._loaded = wanted

    def _images(self, live: np.ndarray) -> np.ndarray:
        size = self.settings.image_size
        images = np.full((len(live), size, size, 3), 127, np.uint8)
        images.reshape(len(live), -1)[:, :LIVE] = paint(live[:, -1])
        return images


class StandInLearner(_StandIn):
    """The methods of `LearnerActor` that a run calls; several each do the whole update."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._address: str | None = None
        self._state = fresh(self.settings.ballast_bytes)

    def meeting(self) -> str | None:
        return self._address

    def meeting_point(self) -> str:
        return f"stand-in-{os.getpid()}"

    def initialize(self, state: Sequence[ObjectRef]) -> tuple[Any, ...]:
        import ray

        if state:
            self._state = ray.get(state[0])
        return self._published({})

    def update(
        self,
        version: int,
        trajectories: Sequence[ObjectRef],
        advantages: np.ndarray,
        mask: np.ndarray,
        state: Sequence[ObjectRef],
        behaviour: Sequence[ObjectRef],
        membership: Membership,
    ) -> tuple[Any, ...]:
        import ray

        began, start, used = time.perf_counter(), time.time(), store_bytes()
        self._address = membership.address
        if self._state.version != version:
            self._state = ray.get(state[0])
        if behaviour:
            ray.get(behaviour[0])
        parts = [_live(part) for part in ray.get(list(trajectories))]
        fetched = time.perf_counter() - began
        used = max(used, store_bytes())
        metrics, self._state = learn(
            self._state, _joined(parts), advantages, mask, self.config.optimizer.lr
        )
        _rest(began, self.settings.update_seconds)
        seconds = time.perf_counter() - began
        self._note("update", start=start, version=self._state.version, store_bytes=used)
        if membership.rank:
            return {}, None, None, None
        return self._published(metrics | {"seconds": seconds, "fetch_seconds": fetched})

    def _published(self, metrics: dict[str, Any]) -> tuple[Any, ...]:
        return metrics, self._state, snapshot(self._state), snapshot(self._state)


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
    """Bytes of the object stores in use, of all nodes."""
    import ray

    name = "object_store_memory"
    return ray.cluster_resources().get(name, 0.0) - ray.available_resources().get(name, 0.0)


def _rest(began: float, seconds: float) -> None:
    time.sleep(max(0.0, began + seconds - time.perf_counter()))


def _live(trajectory: Trajectory) -> Trajectory:
    """The part that is learned from: a learner holds a few timesteps of its batch at a time."""
    from dataclasses import replace

    latents = trajectory.latents
    return replace(trajectory, latents=latents.reshape(*latents.shape[:2], -1)[:, :, :LIVE].copy())


def _joined(parts: Sequence[Trajectory]) -> Trajectory:
    from texforce_ray.diffusion.trajectory import concatenate

    return concatenate(parts)
