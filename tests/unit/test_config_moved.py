"""Keys of earlier versions, and values of a wrong kind where a key has several forms."""

from __future__ import annotations

from pathlib import Path

import pytest

from texforce_ray.config.io import load_config
from texforce_ray.errors import ConfigError, RunDirectoryError
from texforce_ray.records.run_directory import read_config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ppo: {clip_range: 0.1}", "ppo.clip_range: is now objective.clip_range"),
        ("ppo: {num_minibatches: 2}", "ppo.num_minibatches: is now update.minibatches"),
        ("direct: {method: refl}", "direct.method: is now objective.method"),
        ("direct: null", "direct: no longer exists; remove it"),
        ("lora: {rank: 4}", "lora.rank: is now lora.text_encoder.rank"),
        ("lora: {unet: {rank: 4}}", "lora.unet: is now lora.denoiser"),
        ("lora: {unet: null}", "lora.unet: no longer exists; remove it"),
        ("objective: direct", "objective: Input should be a valid dictionary .*'direct'"),
        ("objective: [direct]", "objective: Input should be a valid dictionary"),
        ("objective: {kind: ddpo}", "objective: .*'ddpo'.*'ppo', 'direct', 'nft', .*'custom'"),
        ("lora: {text_encoder_2: other}", r"lora.text_encoder_2: Input should be 'same' \(got 'o"),
        ("lora: {text_encoder_2: 3}", r"lora.text_encoder_2: Input should be .* \(got 3\)"),
        ("lora: {text_encoder_2: {rank: 0}}", r"lora.text_encoder_2.rank: .* \(got 0\)"),
    ],
)
def test_each_gets_one_line_that_says_what_is_right(
    text: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(tmp_path / "config.yaml")
    assert len(str(caught.value).splitlines()) == 2


def test_a_run_of_an_earlier_version_says_what_still_works(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("ppo: {epochs: 1}")
    with pytest.raises(RunDirectoryError, match=r"earlier version.*lora\.init=.*adapter") as caught:
        read_config(tmp_path)
    assert "ppo.epochs: is now update.epochs" in str(caught.value)
