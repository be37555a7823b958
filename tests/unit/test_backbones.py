"""Every backbone family in miniature: sampled as stock diffusers does, trained, exported, reloaded.

Random weights, real classes; what differs between families is what the pipeline directory says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from tests.miniatures import FAMILIES, build
from texforce_ray.config import Config
from texforce_ray.config.io import make_config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.adapter_files import export_adapter, read_adapter
from texforce_ray.model.backbone import load_backbone
from texforce_ray.rl.ppo_learner import PpoLearner
from texforce_ray.rl.sharding import UpdateBatch

PROMPTS = ["a green circle", "two red squares"]
SEEDS = np.array([7, 2**40])


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name, directory) of a miniature."""
    path = tmp_path_factory.mktemp(request.param) / "pipeline"
    with torch.random.fork_rng(devices=[]):
        build(path, request.param)
    return request.param, path


def _how(name: str) -> dict[str, Any]:
    _, _, _, _, steps, guidance, _ = FAMILIES[name]
    return {"steps": steps, "eta": 1.0, "guidance_scale": guidance}


def _stock(name: str, path: Path, adapter: Path | None = None) -> np.ndarray:
    """Images of the stock pipeline with its scheduler replaced by DDIM, as ours are sampled."""
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    if adapter is not None:
        pipe.load_lora_weights(adapter)
    how = _how(name)
    images = pipe(
        PROMPTS,
        num_inference_steps=how["steps"],
        eta=how["eta"],
        guidance_scale=how["guidance_scale"],
        generator=[torch.Generator("cpu").manual_seed(int(seed)) for seed in SEEDS],
        output_type="np",
    ).images
    return np.round(images * 255).astype(np.uint8)


def _difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def _config(name: str, path: Path, **lora: Any) -> Config:
    how = _how(name)
    return make_config(
        {
            "iterations": 2,
            "model": {"path": str(path)},
            "lora": {
                "text_encoder": {"rank": 2, "alpha": 2.0, "target_modules": ["q_proj", "v_proj"]}
            }
            | lora,
            "diffusion": {"steps": how["steps"], "guidance_scale": how["guidance_scale"]},
            "prompts": {"per_iteration": 2, "samples_per_prompt": 1},
            "rollout": {"batch_size": 2},
            "advantage": {"mode": "batch"},
            "objective": {"timestep_fraction": 1.0},
            "update": {"minibatches": 1},
            "optimizer": {"lr": 1e-2, "warmup_fraction": 0.0},
        }
    )


def test_our_samples_are_those_of_stock_diffusers(family: tuple[str, Path]) -> None:
    name, path = family
    _, images = Sampler(load_backbone(str(path)), **_how(name)).sample(PROMPTS, SEEDS, 0)
    assert _difference(images, _stock(name, path)) <= 1


@pytest.mark.long
@pytest.mark.parametrize("denoiser", [None, {"rank": 2}], ids=["text", "joint"])
def test_two_iterations_then_export_and_reload(
    family: tuple[str, Path], denoiser: dict | None, tmp_path: Path
) -> None:
    name, path = family
    config = _config(name, path, denoiser=denoiser)
    learner = PpoLearner(load_backbone(str(path)), config)
    sampler = Sampler(learner.backbone, **_how(name))
    for iteration in range(2):
        trajectory, _ = sampler.sample(PROMPTS, SEEDS + iteration, iteration)
        batch = UpdateBatch(trajectory, np.array([1.0, -1.0]), np.ones(2, dtype=bool))
        assert learner.update(batch)["ppo/ratio_error_first_pass"] <= 1e-5
    snapshot = learner.learned().snapshot
    for part, tensors in snapshot.adapters.items():
        assert any(v.any() for k, v in tensors.items() if "lora_B" in k), part
    _, live = sampler.sample(PROMPTS, SEEDS, 2)
    assert _difference(live, _stock(name, path)) > 0
    export_adapter(snapshot, tmp_path / "adapter", str(path))
    assert _difference(_stock(name, path, tmp_path / "adapter"), live) <= 1
    kohya = tmp_path / "adapter" / "kohya.safetensors"
    if name in ("sd15", "sdxl"):  # one and two text encoders
        assert _difference(_stock(name, path, kohya), live) <= 1
    assert read_adapter(kohya).adapters.keys() == snapshot.adapters.keys()
    fresh = load_backbone(str(path))
    read = read_adapter(tmp_path / "adapter")
    Adapter(fresh, read.shapes, seed=9).load_weights(read.adapters)
    _, again = Sampler(fresh, **_how(name)).sample(PROMPTS, SEEDS, 2)
    assert _difference(again, live) == 0


def test_a_pipeline_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(ConfigError, match=r"KandinskyPipeline.*supported: StableDiffusionPipeline"):
        load_backbone(str(tmp_path))
