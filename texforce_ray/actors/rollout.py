"""Rollout actor: a thin shell around the sampler. Heavy imports wait until it is created."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from texforce_ray.actors.messages import (
    ImagePayload,
    Refs,
    SampleInfo,
    Whereabouts,
    WorkUnit,
    pack_images,
    whereabouts,
)
from texforce_ray.actors.torch_trace import TorchTrace
from texforce_ray.artifacts.snapshot import UNET, PolicySnapshot
from texforce_ray.config import Config
from texforce_ray.records.looks import Looks

if TYPE_CHECKING:
    from texforce_ray.diffusion.sampler import Sampler
    from texforce_ray.diffusion.trajectory import Trajectory


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and advice out of the run's output."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("torchao").setLevel(logging.ERROR)


class RolloutActor:
    """Generates trajectories and images with the policy version that each task names."""

    def __init__(self, config: Config) -> None:
        import torch

        from texforce_ray.diffusion.sampler import Sampler
        from texforce_ray.model.adapter import Adapter
        from texforce_ray.model.backbone import load_config_backbone
        from texforce_ray.model.effect import EffectProbe
        from texforce_ray.model.flops import matmul_peak, sample_flops

        quiet_libraries()
        torch.set_num_threads(config.rollout.num_threads)
        self.config = config
        d = config.diffusion
        self.backbone = load_config_backbone(config.of_rollouts, config.rollout.num_gpus)
        self.sampler = Sampler.of(self.backbone, config)
        self._sample_flops = sample_flops(self.backbone, d.steps, d.guidance_scale)
        self._peak_flops = matmul_peak(self.backbone.device, self.backbone.dtype)
        self._adapter: Adapter | None = None
        self._loaded: str | None = None
        self._where: Whereabouts | None = None
        self._probe = EffectProbe(self.backbone)
        self._effect = self._probe.measure(None)

    def ready(self) -> Whereabouts:
        """Where this actor runs, once it has started."""
        self._where = self._where or whereabouts(self.backbone.device)
        return self._where

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the encoder's limit."""
        return sum(self.backbone.tokenize(prompts).truncated)

    def sample(self, unit: WorkUnit, policy: Refs) -> tuple[SampleInfo, Trajectory, ImagePayload]:
        """Sample one unit of work under the policy that `policy[0]` refers to."""
        start = time.perf_counter()
        sampler = self.sampler.at(self.config, unit.iteration)
        profiled = unit.iteration in self.config.profile and unit.index == 0
        with self._policy(policy), TorchTrace(profiled) as trace:
            trajectory, images = sampler.sample(
                unit.prompts, unit.seeds, unit.policy_version, self._keep(unit, sampler)
            )
        info = SampleInfo(
            time.perf_counter() - start,
            flops=float(self._sample_flops * len(unit)),
            peak_flops=self._peak_flops,
            trajectory_bytes=trajectory.nbytes,
            image_bytes=images.nbytes,
            trace=trace.data,
            effect=self._effect,
            actor=self.ready(),
        )
        return info, trajectory, pack_images(images)

    def _keep(self, unit: WorkUnit, sampler: Sampler) -> np.ndarray:
        from texforce_ray.rl.objectives import learner_class

        first, process = unit.index * self.config.rollout.batch_size, sampler.denoiser.process
        kept = learner_class(self.config).kept_latents
        return kept(self.config, process, unit.iteration, first, len(unit))

    def generate(
        self,
        prompts: Sequence[str],
        seeds: np.ndarray,
        policy: Refs,
        guidance_scale: float,
    ) -> tuple[SampleInfo, ImagePayload]:
        """Generate only images, for evaluation; without a policy, those of the base model."""
        start = time.perf_counter()
        config = self.config
        sampler = self.sampler.drawing(
            guidance_scale, config.evaluation_eta, config.evaluation_steps
        )
        with self._policy(policy):
            _, images = sampler.sample(prompts, seeds, policy_version=0)
        return SampleInfo(time.perf_counter() - start, Looks.of(images)), pack_images(images)

    def export(self, policy: Refs) -> dict[str, bytes]:
        """The adapter's files by name; the driver writes them."""
        import ray

        from texforce_ray.model.adapter_files import export_adapter

        with tempfile.TemporaryDirectory() as folder:
            unet = self.backbone.family.denoiser == UNET
            export_adapter(ray.get(policy[0]), Path(folder), self.config.model.path, kohya=unet)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            return {str(file.relative_to(folder)): file.read_bytes() for file in files}

    def load_policy(
        self, adapters: Sequence[tuple[float, str, dict[str, bytes]]]
    ) -> tuple[None, PolicySnapshot]:
        """Weighted sum of exported adapters: (weight, name for errors, files) each."""
        from texforce_ray.artifacts.location import most_layers
        from texforce_ray.model.adapter_files import read_adapter
        from texforce_ray.model.fusion import fuse

        pipeline = self.backbone.family.pipeline
        per_block, terms = most_layers(self.backbone.denoiser.config), []
        for weight, origin, files in adapters:
            with tempfile.TemporaryDirectory() as folder:
                for name, data in files.items():
                    (Path(folder) / name).parent.mkdir(exist_ok=True)
                    (Path(folder) / name).write_bytes(data)
                terms.append(
                    (weight, read_adapter(Path(folder), origin, per_block, pipeline=pipeline))
                )
        # A single adapter is returned unchanged, bit for bit.
        if len(terms) == 1 and terms[0][0] == 1.0:
            return None, terms[0][1]
        return None, fuse(terms)

    @contextmanager
    def _policy(self, policy: Refs) -> Iterator[None]:
        """Within the block, the task's policy is loaded; without one, the base model is.

        It stays loaded until a task names another, so a restarted actor recovers by itself.
        """
        import ray

        wanted = policy[0].hex() if policy else None
        if wanted == self._loaded:
            yield
            return
        self._loaded = "nothing whole"  # if loading fails half-way, the next task loads again
        if wanted is None:
            self._remove()
        else:
            self._load(ray.get(policy[0]))
        self._effect = self._probe.measure(self._adapter)
        self._loaded = wanted
        yield

    def _load(self, snapshot: PolicySnapshot) -> None:
        from texforce_ray.model.adapter import Adapter

        if self._adapter is None or self._adapter.shapes != snapshot.shapes:
            self._remove()
            self._adapter = Adapter(self.backbone, snapshot.shapes, seed=0)
        self._adapter.load_weights(snapshot.adapters)

    def _remove(self) -> None:
        if self._adapter is not None:
            self._adapter.remove()
        self._adapter = None
