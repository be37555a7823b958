"""Every command and setting that takes an adapter, as a function from its file to the images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from texforce_ray import fuse as command
from texforce_ray.actors.rollout import RolloutActor
from texforce_ray.artifacts.location import adapter_files, layers_per_block
from texforce_ray.artifacts.snapshot import LoraShape, PolicySnapshot
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.adapter_files import read_adapter
from texforce_ray.model.backbone import Backbone, load_backbone
from texforce_ray.model.lora_layers import rescaled

TEXT = LoraShape(4, 6.0, ("q_proj", "v_proj", "out_proj", "fc1"))
UNET = LoraShape(3, 5.0, ("to_q", "to_out.0"))
PROMPTS = ["a green circle", "two red squares"]
SEEDS = np.array([1, 22])
HOW: dict[str, Any] = {"steps": 2, "eta": 1.0, "guidance_scale": 3.0}


def draw(backbone: Backbone, snapshot: PolicySnapshot | None = None) -> np.ndarray:
    if snapshot is not None:
        Adapter(backbone, snapshot.shapes, seed=0).load_weights(snapshot.adapters)
    return Sampler(backbone, **HOW).sample(PROMPTS, SEEDS, 0)[1]


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def _through_fuse(path: Path, pipeline: Path, out: Path) -> np.ndarray:
    """The command's result."""
    assert command.main([str(path), "--base", str(pipeline), "--out", str(out)]) == 0
    return draw(load_backbone(str(pipeline)), read_adapter(out))


def through_evaluate(path: Path, pipeline: Path, out: Path) -> np.ndarray:
    """Sent to a rollout actor, which attaches it."""
    backbone = load_backbone(str(pipeline))
    actor = RolloutActor.__new__(RolloutActor)
    actor.backbone = backbone
    _, snapshot = actor.load_policy([(1.0, str(path), adapter_files(path))])
    return draw(backbone, snapshot)


def through_denoiser_adapters(path: Path, pipeline: Path, out: Path) -> np.ndarray:
    """Merged into the frozen U-Net."""
    return draw(load_backbone(str(pipeline), denoiser_adapters=[str(path)]))


def _through_init(path: Path, pipeline: Path, out: Path) -> np.ndarray:
    """Taken over by a policy of the same ranks and layers, with other alphas of its own."""
    snapshot = read_adapter(path, None, layers_per_block(str(pipeline)))
    own = {"text_encoder": TEXT, "unet": UNET}
    shapes = {p: replace(own[p], alpha=2 * own[p].alpha) for p in snapshot.adapters}
    return draw(load_backbone(str(pipeline)), rescaled(snapshot, shapes))


DOORS = {
    "fuse": _through_fuse,
    "evaluate --adapter": through_evaluate,
    "lora.init": _through_init,
    "model.denoiser_adapters": through_denoiser_adapters,
}
