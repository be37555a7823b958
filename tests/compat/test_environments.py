"""What is exported draws the same images in older versions of the libraries that read it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from texforce_ray.artifacts.location import EMBEDDED
from texforce_ray.artifacts.snapshot import LoraShape
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.adapter_files import export_adapter
from texforce_ray.model.backbone import load_backbone
from texforce_ray.rewards.isolation import Environment, build, default_root

pytestmark = [pytest.mark.slow, pytest.mark.environments, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
# Of late 2024: CLIP has `text_model.`, LoRA files no metadata.
OLD = (
    "torch==2.13.0",
    "diffusers==0.31.0",
    "transformers==4.46.3",
    "peft==0.13.2",
    "accelerate==1.1.1",
    "huggingface-hub==0.26.5",
    "tokenizers<0.21",
)
SHAPES = {
    "text": {"text_encoder": LoraShape(4, 6.0, ("q_proj", "k_proj", "v_proj", "out_proj"))},
    "text, no out_proj": {"text_encoder": LoraShape(4, 6.0, ("q_proj", "fc1"))},
    "joint": {
        "text_encoder": LoraShape(4, 6.0, ("q_proj", "fc1")),
        "unet": LoraShape(3, 5.0, ("to_q", "to_out.0")),
    },
}


def _lowest() -> tuple[str, ...]:
    """pyproject's lower bounds as pins; Ray, which the environments' builder adds, is its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = [b for b in project["dependencies"] if not re.match(r"(ray|uv)\b", b)]
    assert all(">=" in bound for bound in bounds)
    return tuple(bound.replace(">=", "==") for bound in bounds)


def _interpreter(name: str) -> str:
    requirements = OLD if name == "old" else (*_lowest(), "pytest", "pytest-timeout", "hypothesis")
    imports = ("torch", "diffusers", "peft")
    environment = Environment(f"compat-{name}", requirements, imports)
    return build(environment, default_root(), 3000, print)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict]]:
    """Exported adapters and their images in this environment, by name."""
    found = {}
    for name, shapes in SHAPES.items():
        folder = tmp_path_factory.mktemp("adapter") / "adapter"
        adapter = Adapter(load_backbone("embedded"), shapes, seed=0)
        noise = torch.Generator().manual_seed(0)
        for parameter in adapter.parameters():
            parameter.data = torch.randn(parameter.shape, generator=noise) * 0.3
        export_adapter(adapter.snapshot(0), folder, "embedded")
        found[name] = folder, _draw(sys.executable, folder)
    return found


def _draw(python: str, adapter: Path) -> dict[str, np.ndarray]:
    out = adapter.parent / "images.npz"
    script = Path(__file__).with_name("draw.py")
    ran = subprocess.run(
        [python, str(script), str(EMBEDDED), str(adapter), str(out)],
        capture_output=True, text=True, check=False, cwd=adapter.parent,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    with np.load(out) as images:
        return dict(images)


@pytest.mark.parametrize("name", ["old", "lowest"])
def test_exported_files_draw_the_same_images(
    name: str, drawn: dict[str, tuple[Path, dict[str, np.ndarray]]]
) -> None:
    python = _interpreter(name)
    for kind, (folder, here) in drawn.items():
        there = _draw(python, folder)
        assert there.keys() == here.keys()
        tuned = here["pytorch_lora_weights.safetensors"].astype(int)
        assert np.abs(tuned - here["base"]).max() > 10
        for loader in there:
            expected = here["base"].astype(int) if loader == "base" else tuned
            for images in (here[loader], there[loader]):
                assert np.abs(images - expected).max() <= 1, (kind, loader)


def test_the_product_runs_at_its_lower_bounds() -> None:
    """Sampler, learner, export and reload of every family, with the oldest allowed libraries."""
    areas = (
        "adapter", "backbones", "begin", "effect", "encoders", "flow", "flow_backbones",
        "flow_loras", "flow_world", "fusion", "loading", "precision", "sampler",
    )  # fmt: skip
    tests = [f"test_{area}.py" for area in areas]
    ran = subprocess.run(
        [_interpreter("lowest"), "-m", "pytest", "-q", *(f"tests/unit/{t}" for t in tests)],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:]
