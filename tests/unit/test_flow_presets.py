"""The presets of real flow-matching models are configs that a dry run accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from texforce_ray.config.io import load_config
from texforce_ray.driver.inputs import check_inputs

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "flow").glob("*.yaml"))


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two lists of prompts, under the names that the presets give."""
    for name in ("hps_v2_all.txt", "drawbench.txt"):
        (tmp_path / name).write_text("A red colored car.\nA black colored car.\n" * 30)
    monkeypatch.setenv("TEXFORCE_PROMPTS", str(tmp_path))
    return tmp_path


def test_every_model_objective_and_part_has_one() -> None:
    names = {path.stem for path in PRESETS}
    assert names == {
        f"{model}-{objective}-{part}"
        for model in ("sd35-medium", "flux1-dev")
        for objective in ("ppo", "nft")
        for part in ("encoders", "transformer", "both")
    }


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_what_its_name_says(path: Path, prompts: Path) -> None:
    config = load_config(path)
    check_inputs(config)
    part = path.stem.rpartition("-")[2]
    assert bool(config.lora.encoders) == (part != "transformer")
    assert (config.lora.denoiser is not None) == (part != "encoders")
    assert config.objective.kind in path.stem
    assert (config.diffusion.window is not None) == (config.objective.kind == "ppo")
    assert config.evaluation_steps > config.diffusion.steps
    assert config.evaluation_eta == 0
