"""The card says what the adapter is, and its snippets are Python that names the right parts."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from texforce_ray.artifacts.snapshot import LoraShape
from texforce_ray.config.io import make_config
from texforce_ray.records.card_info import BaseModel, ModelCardInfo, card_info
from texforce_ray.records.model_card import model_card

INFO = ModelCardInfo(
    base=BaseModel("stable-diffusion-v1-5/stable-diffusion-v1-5"),
    shapes={"text_encoder": LoraShape(16, 16.0, ("q_proj",))},
    rewards=(("image_reward", 1.0), ("jpeg|size", -0.5)),
    iterations=40,
    samples=20480,
    settings={"learning rate": 3e-4, "prompts": "a | b\n<b>c</b>"},
    scores={
        "image_reward": {
            "base": 0.2,
            "tuned": 0.9,
            "difference": 0.7,
            "low": 0.6,
            "high": 0.8,
            "images": 256,
        }
    },
    files=("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"),
)


def _front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def _snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_front_matter_is_what_the_hub_expects() -> None:
    front = _front(model_card(INFO))
    assert front["library_name"] == "peft"
    assert front["base_model"] == INFO.base.path
    assert {"text-to-image", "stable-diffusion", "lora", "texforce"} <= set(front["tags"])


@pytest.mark.parametrize("path", ["/data/sd 15", "./sd15", 'C:\\models\\"x"'])
def test_local_base_model_is_kept_out_of_the_front_matter(path: str) -> None:
    # The hub rejects a push whose base_model is a path.
    card = model_card(replace(INFO, base=BaseModel(path)))
    assert "base_model" not in _front(card)
    assert all(path in ast.literal_eval(_argument(code)) for code in _snippets(card))


def _argument(code: str) -> str:
    found = re.search(r"DiffusionPipeline\.from_pretrained\((.*)\)", code)
    assert found is not None
    return found[1]


def test_both_loaders_are_shown_as_valid_python() -> None:
    diffusers, peft = _snippets(model_card(INFO))
    for code in (diffusers, peft):
        ast.parse(code)
    assert "pipe.load_lora_weights(adapter)" in diffusers
    assert "pipe.text_encoder = PeftModel.from_pretrained(pipe.text_encoder, adapter)" in peft
    assert "unet" not in peft


def test_every_part_has_its_own_rank_and_alpha() -> None:
    shapes = {"text_encoder": LoraShape(16, 8.0, ("q",)), "unet": LoraShape(4, 2.5, ("to_q",))}
    card = model_card(replace(INFO, shapes=shapes))
    assert "| LoRA of text\\_encoder | rank 16, alpha 8 |" in card
    assert "| LoRA of unet | rank 4, alpha 2.5 |" in card
    alone = model_card(replace(INFO, shapes={"unet": shapes["unet"]}))
    assert "rank 16" not in alone
    assert "on `unet`, trained" in alone


def test_what_else_the_base_is_made_of_is_loaded_too(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").touch()
    base = BaseModel("a/b", "abc", "fp16", str(tmp_path), ("c/lora",))
    card = model_card(replace(INFO, base=base))
    for code in _snippets(card):
        assert f'from_pretrained("{tmp_path}", subfolder="unet")' in code
        assert 'from_pretrained("a/b", revision="abc", variant="fp16", unet=unet)' in code
    assert "merged into the denoiser: c/lora" in card


def test_a_single_file_is_loaded_with_the_configs_of_its_directory(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    base = BaseModel("/data/xl.safetensors", single_file_config=str(tmp_path))
    for code in _snippets(model_card(replace(INFO, base=base))):
        ast.parse(code)
        assert code.startswith("from diffusers import StableDiffusionXLPipeline\n")
        assert (
            f'StableDiffusionXLPipeline.from_single_file("/data/xl.safetensors", '
            f'config="{tmp_path}")' in code
        )


def test_a_run_that_started_from_an_adapter_says_so() -> None:
    config = make_config({"lora": {"init": "runs/A/adapter"}})
    card = model_card(card_info(config, INFO.shapes, {}, INFO.files))
    assert "| started from the adapter | runs/A/adapter |" in card


def test_direct_backpropagation_is_not_called_reinforcement_learning() -> None:
    config = make_config(
        {"objective": {"kind": "direct", "method": "draft"}, "rewards": [{"name": "shapes_scorer"}]}
    )
    card = model_card(card_info(config, INFO.shapes, {}, INFO.files))
    assert "by DRaFT" in card
    assert "PPO" not in card
    assert "clip range" not in card


def test_the_files_that_are_there_are_listed_with_their_readers() -> None:
    card = model_card(replace(INFO, files=(*INFO.files[:2], "kohya.safetensors")))
    assert "| `kohya.safetensors` | ComfyUI" in card
    assert "| `adapter_config.json` | PEFT" in card
    assert "pytorch_lora" not in card


def test_tables_keep_their_columns_whatever_the_values() -> None:
    card = model_card(INFO)
    rows = [line for line in card.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows[:9]}
    assert columns == {3}
    assert "<b>" not in re.sub(r"\\<", "", card)
    assert "| image\\_reward | 0.2 | 0.9 | 0.7 | 0.6 to 0.8 | 256 |" in card


def test_without_scores_there_is_no_score_section() -> None:
    assert "Scores" not in model_card(replace(INFO, scores={}))
