"""The model card's code is run as it stands, beside an adapter of each kind that runs export."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.flow_miniatures import MINIATURES, build
from texforce_ray.artifacts.location import DIFFUSERS_FILE
from texforce_ray.artifacts.lora_header import parts_apart
from texforce_ray.artifacts.snapshot import LoraShape
from texforce_ray.config.io import make_config
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.adapter_files import export_adapter
from texforce_ray.model.backbone import load_backbone, load_config_backbone
from texforce_ray.records.card_info import card_info
from texforce_ray.records.model_card import model_card
from texforce_ray.rl.adapters import adapter_shapes

_DRAW = re.compile(r'^image = pipe\("a photo of a cat"(.*)\)\.images\[0\]$', re.MULTILINE)
_QUICK = (
    "import torch\npipe.set_progress_bar_config(disable=True)\n"
    r'image = pipe("a green circle"\1, num_inference_steps=2, output_type="np", '
    "generator=torch.Generator().manual_seed(0)).images[0]"
)
DRAWING = {"height": 32, "width": 64, "clip_skip": 1, "negative_prompt": 'two "red" squares'}


def _drawn(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The image that a snippet draws, quicker and at a fixed seed, in the adapter's directory."""
    quick, count = _DRAW.subn(_QUICK, code)
    assert count == 1
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(quick, names)
    return names["image"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "lora", "parts", "drawing"),
    [
        ("sd15", {}, ("text_encoder",), {}),
        ("sd15", {}, ("text_encoder",), DRAWING),
        ("sd15", {"text_encoder": None, "denoiser": {"rank": 3}}, ("unet",), {}),
        ("sd15", {"denoiser": {"rank": 3}}, ("text_encoder", "unet"), {}),
        ("sdxl", {}, ("text_encoder", "text_encoder_2"), {}),
        ("sdxl", {"text_encoder": None, "denoiser": {}}, ("unet",), {}),
    ],
    ids=["text", "other drawing", "unet", "joint", "sdxl text", "sdxl unet"],
)
def test_both_snippets_draw_the_policy_s_image(
    pipelines: dict[str, Path],
    name: str,
    lora: dict[str, Any],
    parts: tuple[str, ...],
    drawing: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = str(pipelines[name])
    # alpha / rank of 2: a loader that leaves the scale out would be seen.
    config = make_config(
        {
            "model": {"path": base},
            "lora": {"text_encoder": {"rank": 2, "alpha": 4.0}} | lora,
            "diffusion": drawing,
        }
    )
    backbone = load_backbone(base)
    adapter = Adapter(backbone, adapter_shapes(config, backbone), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    snapshot = adapter.snapshot(1)
    assert tuple(snapshot.shapes) == parts
    export_adapter(snapshot, tmp_path, base)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = tuple(str(path.relative_to(tmp_path)) for path in files)
    card = model_card(card_info(config, snapshot.shapes, {}, names))
    drawn = _check_card(card, tmp_path, monkeypatch)
    assert drawn.shape == ((32, 64, 3) if drawing else (64, 64, 3))


def _check_card(card: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Both snippets draw the same image, which is not the base's; returns that one."""
    (folder / "README.md").write_text(card)
    diffusers, peft = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    plain = re.sub(
        r"^pipe\.(load_lora_weights|text_encoder\w* = Peft).*\n", "", diffusers, flags=re.M
    )
    drawn = [_drawn(code, folder, monkeypatch) for code in (plain, diffusers, peft)]
    assert np.abs(drawn[1] - drawn[0]).max() > 0.02, "the adapter changes the image"
    np.testing.assert_allclose(drawn[1], drawn[2], atol=1e-3)
    return drawn[0]


@pytest.mark.long
@pytest.mark.parametrize("name", ["sd3", "sd3_no_t5", "flux_dev", "z_image"])
def test_snippets_of_flow_models_load_what_diffusers_cannot(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mini, base = MINIATURES[name], tmp_path / "pipeline"
    with torch.random.fork_rng(devices=[]):
        build(base, name)
    config = make_config(
        {
            "model": {"path": str(base)},
            "diffusion": {"process": "flow", "height": 64, "width": 64, "kernel": "cps",
                          "max_sequence_length": mini.length, "window": {}},
        }
    )  # fmt: skip
    backbone = load_config_backbone(config, 0)
    named = {k.replace("denoiser", "transformer"): tuple(v) for k, v in mini.lora.items()}
    shapes = {part: LoraShape(2, 4.0, modules) for part, modules in named.items()}
    adapter = Adapter(backbone, shapes, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    export_adapter(adapter.snapshot(1), tmp_path, str(base), kohya=False)
    files = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    names = tuple(file for file in files if not file.startswith("pipeline/"))
    apart = parts_apart(shapes, (tmp_path / DIFFUSERS_FILE).read_bytes())
    assert set(apart) == set(shapes) - set(mini.loadable)
    card = model_card(card_info(config, shapes, {}, names, apart))
    assert "- flow-matching" in card
    assert "3 of steps" in card
    _check_card(card, tmp_path, monkeypatch)
