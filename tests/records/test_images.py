"""Grids show every image and every caption, legibly and without overlap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from texforce_ray.records.captions import text_width, wrap
from texforce_ray.records.images import comparison, grid, save_png

COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)], np.uint8)


def _solid(size: int = 64, count: int = 5) -> np.ndarray:
    return np.broadcast_to(COLOURS[:count, None, None], (count, size, size, 3)).copy()


def _count(picture: np.ndarray, colour: np.ndarray) -> int:
    return int((picture == colour).all(-1).sum())


def test_small_images_are_enlarged_whole_and_in_full() -> None:
    picture = grid(_solid(), 3)
    assert picture.dtype == np.uint8
    assert picture.shape == (2 * (128 + 8) + 8, 3 * (128 + 8) + 8, 3)
    assert [_count(picture, colour) for colour in COLOURS] == [128 * 128] * 5
    assert (picture[:8] == 255).all()
    assert (picture[-100:, -100:] == 255).all()  # the place of a sixth image stays white


def test_large_images_are_reduced_unless_scaled() -> None:
    assert grid(_solid(512, 1), 1).shape == (256 + 16, 256 + 16, 3)
    assert grid(_solid(512, 1), 1, scale=2).shape == (512 + 16, 512 + 16, 3)
    assert grid(np.zeros((1, 256, 512, 3), np.uint8), 1).shape == (128 + 16, 256 + 16, 3)


def test_captions_are_drawn_beside_images_and_never_over_them() -> None:
    titles = ["a green circle", "x" * 300, "two blue squares " * 30, "", "Ü 日本"]
    picture = grid(_solid(), 3, titles=titles, header="iteration 12")
    assert [_count(picture, colour) for colour in COLOURS] == [128 * 128] * 5
    plain = grid(_solid(), 3)
    assert picture.shape[0] > plain.shape[0]
    assert picture.shape[1] == plain.shape[1]
    assert (picture[:30] < 128).any(), "the header is blank"
    first = picture[30 + 128 + 4 : 30 + 128 + 30, 8:136]
    assert (first < 128).any(), "the first caption is blank"
    for column in range(136, 143):  # the gap; antialiasing may reach one pixel into it
        assert (picture[30:, column] == 255).all(), "a caption runs into the next column"


def test_wrapped_text_fits_and_says_when_it_was_cut() -> None:
    text = "a very long prompt, masterpiece, " + "x" * 80 + " trending on artstation"
    lines = wrap(text, 128, 13, 3)
    assert len(lines) == 3
    assert all(text_width(line, 13) <= 128 for line in lines)
    assert lines[-1].endswith("…")
    assert wrap("a red\n circle", 128, 13, 3) == ["a red circle"]
    assert "".join(wrap("x" * 30, 128, 13, 3)) == "x" * 30


def test_accents_are_drawn_as_letters_and_not_as_boxes() -> None:
    images = _solid(count=1)
    drawn = grid(images, 1, titles=["café Öl"])
    np.testing.assert_array_equal(drawn, grid(images, 1, titles=["cafe Ol"]))


def test_comparison_has_a_row_per_policy_and_a_column_per_prompt() -> None:
    rows = [("base", _solid()), ("tuned", _solid()[::-1])]
    picture = comparison(rows, ["a"] * 5, columns=5)
    places = np.argwhere((picture == COLOURS[0]).all(-1))
    upper = places[:, 0] < places[:, 0].mean()
    base, tuned = places[upper], places[~upper]
    assert base[:, 1].max() < tuned[:, 1].min()  # red is first in one row and last in the other
    assert [_count(picture, colour) for colour in COLOURS] == [2 * 128 * 128] * 5
    margin = places[:, 1].min()
    assert (picture[:, : margin - 8] < 128).any(), "the names of the policies are blank"


def test_comparison_wraps_many_prompts_and_marks_the_better_score() -> None:
    rows = [("base", _solid()), ("tuned", _solid())]
    best = np.array((17, 122, 61))
    scores = [[0.1, 0.5, 0.5, float("nan"), 0.9], [0.9, 0.5, 0.4, 0.2, 0.1]]
    picture = comparison(rows, ["p"] * 5, scores=scores, columns=3, header="Held out")
    wide = comparison(rows, ["p"] * 5, scores=scores, columns=5)
    assert picture.shape[1] < wide.shape[1]
    assert picture.shape[0] > wide.shape[0]
    assert [_count(picture, colour) for colour in COLOURS] == [2 * 128 * 128] * 5
    assert _count(picture, best) > 0
    equal = comparison(rows, ["p"] * 5, scores=[[0.5] * 5, [0.50001] * 5])
    assert _count(equal, best) == 0, "a tie as shown has no winner"


def test_wrong_input_is_refused_with_its_shape() -> None:
    with pytest.raises(ValueError, match=r"float64 \[1, 4, 4, 3\]"):
        grid(np.zeros((1, 4, 4, 3)), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="N >= 1"):
        grid(np.zeros((0, 4, 4, 3), np.uint8), 1)
    with pytest.raises(ValueError, match="2 for 5"):
        grid(_solid(), 1, titles=["a", "b"])
    with pytest.raises(ValueError, match=r"\[5, 5, 4\]"):
        comparison([("base", _solid()), ("tuned", _solid(count=4))], ["a"] * 5)


def test_png_round_trip(tmp_path: Path) -> None:
    picture = grid(_solid(), 3, titles=list("abcde"))
    save_png(tmp_path / "images" / "iteration-00000.png", picture)
    with Image.open(tmp_path / "images" / "iteration-00000.png") as image:
        np.testing.assert_array_equal(np.asarray(image), picture)
