"""Rewards: the contract, how they are found and loaded, and the scores that they may give."""

from __future__ import annotations

import ast
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from texforce_ray.errors import RewardError
from texforce_ray.rewards import BUILT_IN, find, resolve
from texforce_ray.rewards.base import Reward, checked_scores, load_reward
from texforce_ray.rewards.check import check_variety
from texforce_ray.rewards.isolation import SETS
from texforce_ray.shapes import scene

ROOT = Path(__file__).parents[2]


def _images(count: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    images[0] = 200
    images.flags.writeable = False
    return images


def _score(name: str, images: np.ndarray, prompts: list[str], **kwargs: Any) -> list[float]:
    reward = load_reward(resolve(name, None), kwargs)
    assert isinstance(reward, Reward)
    scores = reward.score(images, prompts, [{}] * len(prompts))
    return checked_scores(scores, len(images), name)


def _jpeg_bytes(image: np.ndarray, quality: int) -> int:
    buffer = io.BytesIO()
    Image.fromarray(image, "RGB").save(buffer, "jpeg", quality=quality)
    return len(buffer.getvalue())


@pytest.mark.parametrize("quality", [95, 50])
def test_jpeg_rewards_are_file_sizes_of_opposite_sign(quality: int) -> None:
    images = _images()
    expected = [_jpeg_bytes(image, quality) / 1000 for image in images]
    more = _score("jpeg_incompressibility", images, [""] * 3, quality=quality)
    less = _score("jpeg_compressibility", images, [""] * 3, quality=quality)
    assert more == expected
    assert less == [-size for size in expected]
    assert less[0] > less[1]


def test_jpeg_default_quality_is_95() -> None:
    images = _images()
    by_default = _score("jpeg_incompressibility", images, [""] * 3)
    assert by_default == _score("jpeg_incompressibility", images, [""] * 3, quality=95)


def test_shapes_reward_reads_the_image_and_the_prompt() -> None:
    prompts = ["a green circle", "two red squares"]
    rng = np.random.default_rng(0)
    images = np.stack([scene.render(scene.parse(prompt), rng) for prompt in prompts])
    assert _score("shapes", images, prompts) == pytest.approx([1, 1], abs=0.05)
    assert max(_score("shapes", images, prompts[::-1])) < 0.5
    with pytest.raises(ValueError, match="not a prompt of the shapes world"):
        _score("shapes", images, ["a dog", "two red squares"])


@pytest.mark.parametrize("name", [*BUILT_IN, "iqa:piqe"])
def test_every_built_in_reward_is_where_the_table_says(name: str) -> None:
    entry = find(name)
    assert entry.packages in SETS
    module, _, name = entry.target.partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    if entry.packages == "light":
        assert isinstance(load_reward(entry.target, {}), Reward)


def test_own_target_wins_and_unknown_names_list_the_known() -> None:
    assert resolve(None, "my.module:Mine") == "my.module:Mine"
    with pytest.raises(RewardError, match=r"'shape'.*jpeg_compressibility.*shapes.*target"):
        resolve("shape", None)


OWN_REWARDS = """
class Mine:
    def score(self, images, prompts, metadata):
        return [1]

class WithoutScore:
    pass

class Unwilling(Mine):
    def __init__(self, size=1):
        raise OSError(f"no weights of size {size}")
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_reward_ok.py").write_text(OWN_REWARDS)
    (tmp_path / "own_reward_broken.py").write_text("import no_such_library_at_all")
    (tmp_path / "own_reward_syntax.py").write_text("def (")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("target", "kwargs", "parts"),
    [
        ("no.such.module:Mine", {}, ["cannot import no.such.module", "ModuleNotFoundError"]),
        ("own_reward_broken:Mine", {}, ["cannot import", "no_such_library_at_all"]),
        ("own_reward_syntax:Mine", {}, ["cannot import", "SyntaxError"]),
        ("own_reward_ok:Yours", {}, ["own_reward_ok has no class Yours"]),
        ("own_reward_ok:WithoutScore", {}, ["has no method score(images, prompts, metadata)"]),
        ("own_reward_ok:Mine", {"size": 3}, ["{'size': 3}", "TypeError", "size"]),
        ("own_reward_ok:Unwilling", {"size": 3}, ["OSError: no weights of size 3"]),
    ],
)
def test_unusable_reward_is_named_with_the_reason(
    own_module: None, target: str, kwargs: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(RewardError) as caught:
        load_reward(target, kwargs)
    for part in [f"reward {target}", *parts]:
        assert part in str(caught.value)


def test_own_reward_needs_no_base_class(own_module: None) -> None:
    assert load_reward("own_reward_ok:Mine", {}).score(_images(1), [""], [{}]) == [1]


def test_a_reward_that_says_the_same_of_all_images_fails_the_check() -> None:
    images = list(_images(3))
    with pytest.raises(RewardError, match=r"all 3 different images have the same score, 0\.5"):
        check_variety("mine", [0.5] * 3, images)
    check_variety("mine", [0.5, 0.5, 0.6], images)
    check_variety("mine", [0.5], images[:1])
    check_variety("mine", [0.5] * 2, [images[0], images[0]])


@pytest.mark.parametrize(
    "scores", [[1, 2.5, -3], np.array([1, 2.5, -3], dtype=np.float32), (1.0, np.float64(2.5), -3)]
)
def test_any_sequence_of_numbers_becomes_floats(scores: Any) -> None:
    values = checked_scores(scores, 3, "mine")
    assert values == [1.0, 2.5, -3.0]
    assert {type(value) for value in values} == {float}


def test_nan_says_could_not_score() -> None:
    assert math.isnan(checked_scores([math.nan, 1], 2, "mine")[0])


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        ([1.0], "returned 1 numbers for 2 images"),
        ([1.0, 2.0, 3.0], "returned 3 numbers for 2 images"),
        ([], "returned 0 numbers for 2 images"),
        ([1.0, math.inf], "1 infinite numbers; use NaN"),
        ([-math.inf, math.inf], "2 infinite numbers"),
        (None, "returned NoneType"),
        (3.0, "returned float"),
        (["a", "b"], "returned list, which is not a list of numbers"),
        ([None, 1.0], "not a list of numbers"),
        ([[1.0, 2.0], [3.0, 4.0]], "not a list of numbers"),
    ],
)
def test_wrong_scores_name_the_reward_and_the_fault(scores: Any, problem: str) -> None:
    with pytest.raises(RewardError, match="reward mine") as caught:
        checked_scores(scores, 2, "mine")
    assert problem in str(caught.value)
