"""A checkpoint of one file draws what its directory draws, or says what it needs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.single_file import write_single_file
from tests.unit.drawing import assert_equal, draw
from texforce_ray.artifacts.location import locate_model
from texforce_ray.errors import ConfigError
from texforce_ray.model.backbone import load_backbone


@pytest.mark.parametrize(
    ("name", "config", "match"),
    [
        ("absent.safetensors", None, "the checkpoint .* does not exist"),
        ("model.ckpt", None, "is a pickle, which may run code"),
        ("model.safetensors", None, r"set model\.single_file_config"),
        ("model.safetensors", "nowhere", r"model\.single_file_config: .*no model_index\.json"),
    ],
)
def test_single_files_say_what_they_need(
    tmp_path: Path, name: str, config: str | None, match: str
) -> None:
    for file in ("model.safetensors", "model.ckpt"):
        (tmp_path / file).write_bytes(b"")
    folder = None if config is None else str(tmp_path / config)
    with pytest.raises(ConfigError, match=match):
        locate_model(str(tmp_path / name), single_file=folder)


def test_a_single_file_draws_what_its_directory_draws(
    pipelines: dict[str, Path], tmp_path: Path
) -> None:
    file, config = tmp_path / "model.safetensors", str(tmp_path / "config")
    write_single_file(pipelines["sd15"], file)
    shutil.copytree(pipelines["sd15"], config, ignore=shutil.ignore_patterns("*.safetensors"))
    assert locate_model(str(file), single_file=config) == str(file)
    assert_equal(draw(file, single_file_config=config), draw(pipelines["sd15"]))


@pytest.mark.parametrize("start", ["cond_stage_model.", "model.diffusion_model.out.2."])
def test_a_single_file_that_lacks_weights_is_refused(
    pipelines: dict[str, Path], tmp_path: Path, start: str
) -> None:
    file = tmp_path / "model.safetensors"
    write_single_file(pipelines["sd15"], file)
    save_file({k: v for k, v in load_file(file).items() if not k.startswith(start)}, file)
    with pytest.raises(ConfigError, match=r"model\.path: .*model\.safetensors"):
        load_backbone(str(file), single_file_config=str(pipelines["sd15"]))


def test_a_config_for_a_single_file_means_nothing_elsewhere() -> None:
    with pytest.raises(ConfigError, match=r"single_file_config: has no effect with model\.path"):
        locate_model("embedded", single_file="somewhere")
