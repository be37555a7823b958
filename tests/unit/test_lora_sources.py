"""Where adapters come from and what they fit: hub, bases, parts, ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.lora_doors import TEXT, UNET, difference, draw, through_denoiser_adapters
from texforce_ray import fuse as command
from texforce_ray.artifacts.location import adapter_files
from texforce_ray.artifacts.snapshot import PolicySnapshot
from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter_files import export_adapter
from texforce_ray.model.backbone import load_backbone
from texforce_ray.model.lora_layers import rescaled


@pytest.mark.long
def test_a_hub_repository_is_read_from_its_cache(
    make_policy: Callable[..., PolicySnapshot], tiny_pipeline: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from huggingface_hub.errors import LocalEntryNotFoundError

    from texforce_ray.model import frozen

    export_adapter(make_policy({"unet": UNET}), tmp_path / "hub", "base")

    def download(repository: str, name: str) -> str:
        if repository == "some/lora" and (tmp_path / "hub" / name).is_file():
            return str(tmp_path / "hub" / name)
        raise LocalEntryNotFoundError("offline")

    def files(repository: str) -> list[str]:
        raise OSError("offline")

    monkeypatch.setattr(frozen, "hf_hub_download", download)
    monkeypatch.setattr(frozen, "list_repo_files", files)
    expected = through_denoiser_adapters(tmp_path / "hub", tiny_pipeline, tmp_path)
    for removed in ("", "adapter_config.json"):
        if removed:
            (tmp_path / "hub" / removed).unlink()
        backbone = load_backbone(str(tiny_pipeline), denoiser_adapters=["some/lora"])
        assert difference(draw(backbone), expected) <= 1
    with pytest.raises(ConfigError, match="no/lora is not a path and cannot be downloaded"):
        load_backbone(str(tiny_pipeline), denoiser_adapters=["no/lora"])


def test_one_base_under_several_names_is_one(
    make_policy: Callable[..., PolicySnapshot], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sd15").mkdir()
    snapshot = make_policy({"text_encoder": TEXT})
    names = [f"{tmp_path}/sd15", f"{tmp_path}/sd15/", f"{tmp_path}/./sd15", "runwayml/sd15"]
    for index, base in enumerate(names):
        export_adapter(snapshot, tmp_path / str(index), base)
    given = [str(tmp_path / str(index)) for index in range(4)]
    assert command.main([*given[:3], "--out", str(tmp_path / "out")]) == 0
    assert command.main([*given, "--out", str(tmp_path / "out")]) == 1
    assert "--base NAME" in capsys.readouterr().err
    arguments = [*given, "--base", "sd-legacy/sd15", "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sd-legacy/sd15"


def test_a_policy_of_another_rank_or_part_is_named(
    make_policy: Callable[..., PolicySnapshot],
) -> None:
    snapshot = make_policy({"text_encoder": TEXT})
    with pytest.raises(ConfigError, match="text_encoder has rank 4, the policy rank 8"):
        rescaled(snapshot, {"text_encoder": replace(TEXT, rank=8)})
    with pytest.raises(ConfigError, match="on text_encoder, the policy on unet"):
        rescaled(snapshot, {"unet": UNET})


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_a_parts_folder_says_which_part_it_is_wherever_it_is_sent(
    part: str, make_policy: Callable[..., PolicySnapshot], tmp_path: Path
) -> None:
    export_adapter(make_policy({"text_encoder": TEXT, "unet": UNET}), tmp_path, "base")
    (tmp_path / part).rename(tmp_path / "text_encoder_2")
    names = adapter_files(tmp_path / "text_encoder_2")
    assert set(names) == {
        f"text_encoder_2/adapter_{n}" for n in ("config.json", "model.safetensors")
    }
