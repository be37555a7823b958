"""The presets of real flow-matching models; `test_config_files.py` runs the checks of a dry run."""

from __future__ import annotations

from pathlib import Path

import pytest

from texforce_ray.config.io import load_config

PRESETS = sorted((Path(__file__).parents[2] / "configs" / "flow").glob("*.yaml"))


def test_every_model_objective_and_part_has_one() -> None:
    names = {path.stem for path in PRESETS}
    assert names == {
        f"{model}-{objective}-{part}"
        for model in ("sd35-medium", "flux1-dev")
        for objective in ("ppo", "nft")
        for part in ("encoders", "transformer", "both")
    }


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_what_its_name_says(path: Path) -> None:
    config = load_config(path)
    part = path.stem.rpartition("-")[2]
    assert bool(config.lora.encoders) == (part != "transformer")
    assert (config.lora.denoiser is not None) == (part != "encoders")
    assert config.objective.kind in path.stem
    assert (config.diffusion.window is not None) == (config.objective.kind == "ppo")
    assert config.evaluation_steps > config.diffusion.steps
    assert config.evaluation_eta == 0
