"""The card says what the adapter is, and its snippets are Python that names the right parts."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from texforce_ray.records.model_card import ModelCardInfo, model_card

INFO = ModelCardInfo(
    base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    parts=("text_encoder",),
    rank=16,
    alpha=16.0,
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
    has_unet=False,
)


def _front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def _snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_front_matter_is_what_the_hub_expects() -> None:
    front = _front(model_card(INFO))
    assert front["library_name"] == "peft"
    assert front["base_model"] == INFO.base_model
    assert {"text-to-image", "stable-diffusion", "lora", "texforce"} <= set(front["tags"])


@pytest.mark.parametrize("path", ["/data/sd 15", "./sd15", 'C:\\models\\"x"'])
def test_local_base_model_is_kept_out_of_the_front_matter(path: str) -> None:
    # The hub rejects a push whose base_model is a path.
    card = model_card(replace(INFO, base_model=path))
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


def test_several_parts_are_each_loaded_from_their_folder() -> None:
    info = replace(INFO, parts=("text_encoder", "text_encoder_2"), has_unet=True)
    peft = _snippets(model_card(info))[1]
    for part in ("text_encoder", "text_encoder_2", "unet"):
        assert f'PeftModel.from_pretrained(pipe.{part}, adapter, subfolder="{part}")' in peft
    listed = replace(info, parts=(*info.parts, "unet"))
    assert model_card(listed) == model_card(info)


def test_tables_keep_their_columns_whatever_the_values() -> None:
    card = model_card(INFO)
    rows = [line for line in card.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows[:9]}
    assert columns == {3}
    assert "<b>" not in re.sub(r"\\<", "", card)
    assert "| image\\_reward | 0.2 | 0.9 | 0.7 | 0.6 to 0.8 | 256 |" in card


def test_without_scores_there_is_no_score_section() -> None:
    assert "Scores" not in model_card(replace(INFO, scores={}))
