"""What the unit tests of policy, sampler and learner share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import settings

from tests.miniatures import build
from tests.unit import references
from texforce_ray.artifacts.snapshot import LoraShape, PolicySnapshot
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.backbone import Backbone, load_backbone

# The same examples at every run, and no deadline: other work may share the machine.
settings.register_profile("unit", deadline=None, derandomize=True, database=None)
settings.load_profile("unit")

LoadStock = Callable[[], StableDiffusionPipeline]
StockImages = Callable[..., np.ndarray]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Actors made in this process set their own number; two processes of two threads each crawl."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_backbone(tiny_pipeline: Path) -> Callable[[], Backbone]:
    """Loads a fresh backbone at each call: adapters change it."""
    return lambda: load_backbone(str(tiny_pipeline))


@pytest.fixture
def stock_pipeline(tiny_pipeline: Path) -> LoadStock:
    """Loads the miniature as any user of diffusers would."""

    def load() -> StableDiffusionPipeline:
        pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


@pytest.fixture
def stock_images() -> StockImages:
    """Images of a stock pipeline, uint8 [B, H, W, 3]."""

    def draw(
        pipe: StableDiffusionPipeline,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        eta: float,
        guidance_scale: float,
    ) -> np.ndarray:
        generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
        images = pipe(
            list(prompts),
            num_inference_steps=steps,
            eta=eta,
            guidance_scale=guidance_scale,
            generator=generators,
        ).images
        return np.stack([np.asarray(image) for image in images])

    return draw


@pytest.fixture
def randomize() -> Callable[..., None]:
    """Sets all of an adapter's weights, A and B, to noise: a policy that is not the base."""

    def fill(adapter: Adapter, seed: int, scale: float = 0.3) -> None:
        rng = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            parameter.data = (noise * scale).to(parameter.dtype)

    return fill


@pytest.fixture
def make_policy(
    tiny_backbone: Callable[[], Backbone], randomize: Callable[..., None]
) -> Callable[..., PolicySnapshot]:
    """A policy of the miniature's that is not the base, with adapters of these shapes."""

    def new(shapes: Mapping[str, LoraShape]) -> PolicySnapshot:
        adapter = Adapter(tiny_backbone(), shapes, seed=0)
        randomize(adapter, seed=5)
        return adapter.snapshot(0)

    return new


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package upcasts to float32 is upcast to float64, so that gradients are exact."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Miniatures of SD and SDXL; to be copied before they are changed."""
    folder = tmp_path_factory.mktemp("pipelines")
    with torch.random.fork_rng(devices=[]):
        for name in ("sd15", "sdxl"):
            build(folder / name, name)
    return {name: folder / name for name in ("sd15", "sdxl")}


@pytest.fixture
def changed_pipeline(pipelines: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of one of these whose JSON file has other values."""

    def make(file: str, changes: dict[str, Any], name: str = "sd15") -> Path:
        folder = tmp_path / name
        shutil.copytree(pipelines[name], folder)
        values = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(values))
        return folder

    return make


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors are plain objects, which are given `references.Ref`."""
    monkeypatch.setattr("ray.get", references.get)
    # To measure the machine takes longer than all else that they do here.
    monkeypatch.setattr("texforce_ray.model.flops.matmul_peak", lambda *_: 1.0)
