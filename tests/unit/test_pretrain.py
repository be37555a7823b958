"""Pre-training of the embedded pipeline can be killed at any step and gives the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusion3Pipeline
from safetensors.numpy import load_file

from texforce_ray.artifacts.location import EMBEDDED
from texforce_ray.errors import ConfigError
from texforce_ray.shapes import flow_pretraining, pretraining
from texforce_ray.shapes.recipe import RECIPES, Recipe

# Two saves in each stage, and odd counts: a stop may fall between them.
TINY = Recipe(vae_steps=3, vae_batch=2, drawings=8, steps=5, batch=2, warmup=1, save_every=2)


def _weights(directory: Path) -> dict[str, np.ndarray]:
    return {
        f"{file.parent.name}/{key}": value
        for file in directory.rglob("*.safetensors")
        for key, value in load_file(file).items()
    }


@pytest.mark.long
def test_a_killed_pretraining_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretraining.pretrain(TINY, tmp_path / "whole", tmp_path / "whole.work")
    updates, done = pretraining.update, 0

    def dies_after(count: int) -> None:
        def update(*arguments: object) -> None:
            nonlocal done
            if done == count:
                raise KeyboardInterrupt
            done += 1
            updates(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(pretraining, "update", update)

    # Kills in the VAE and with the U-Net; each loses at most one step.
    for count in (1, 2, 6, 7, 9):
        dies_after(count)
        with pytest.raises(KeyboardInterrupt):
            pretraining.pretrain(TINY, tmp_path / "killed", tmp_path / "killed.work")
    monkeypatch.setattr(pretraining, "update", updates)
    pretraining.pretrain(TINY, tmp_path / "killed", tmp_path / "killed.work")
    whole, killed = _weights(tmp_path / "whole"), _weights(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(np.array_equal(whole[key], killed[key]) for key in whole)


@pytest.mark.long
def test_a_killed_flow_pretraining_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPES["flow"], drawings=8, steps=4, batch=2, warmup=1, save_every=2)
    flow_pretraining.pretrain_flow(recipe, tmp_path / "whole", tmp_path / "whole.work")
    updates, done = flow_pretraining.update, 0

    def dies(*arguments: object) -> None:
        nonlocal done
        if done == 3:
            raise KeyboardInterrupt
        done += 1
        updates(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(flow_pretraining, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        flow_pretraining.pretrain_flow(recipe, tmp_path / "killed", tmp_path / "killed.work")
    monkeypatch.setattr(flow_pretraining, "update", updates)
    flow_pretraining.pretrain_flow(recipe, tmp_path / "killed", tmp_path / "killed.work")
    whole, killed = _weights(tmp_path / "whole"), _weights(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(np.array_equal(whole[key], killed[key]) for key in whole)
    # What it shares with the DDIM pipeline is not trained.
    shared, own = _weights(EMBEDDED), whole
    body = [key for key in shared if key.startswith("text_encoder/")]
    assert all(np.array_equal(shared[key].astype(np.float16), own[key]) for key in body)
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "whole")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a green circle", num_inference_steps=1, max_sequence_length=20).images[0]
    assert image.size == (64, 64)


@pytest.mark.parametrize("which", ["embedded", "new"])
def test_transformers_of_any_version_finds_all_weights_and_words(
    which: str, tiny_pipeline: Path
) -> None:
    """Before 5.6 CLIP's keys had `text_model.`, before 5 its tokenizer had no tokenizer.json."""
    from transformers import CLIPTextModel

    folder = EMBEDDED if which == "embedded" else tiny_pipeline
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in weights)
    _, info = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert not any(info.values())
    model = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    words = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert words == model["vocab"]
    merges = (folder / "tokenizer" / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert merges[0] == "#version: 0.2"
    assert [line.split(" ") for line in merges[1:]] == [list(pair) for pair in model["merges"]]


def test_a_resumed_pretraining_must_keep_its_recipe(tmp_path: Path) -> None:
    pretraining.check_recipe(TINY, tmp_path / "recipe.json")
    pretraining.check_recipe(TINY, tmp_path / "recipe.json")
    with pytest.raises(ConfigError, match=r"other values of seed"):
        pretraining.check_recipe(Recipe(seed=1), tmp_path / "recipe.json")
