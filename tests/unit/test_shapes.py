"""The shapes world: true drawings score full marks, wrong ones less, and by how wrong they are."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from texforce_ray.shapes import data, detector, people, scene
from texforce_ray.shapes.pretrain import vocabulary
from texforce_ray.shapes.scene import ABILITIES, Item, Scene, all_scenes, parse, render
from texforce_ray.shapes.tokenizer import MAX_LENGTH, build_tokenizer

EVERY_SCENE = [s for ability in ABILITIES for s in all_scenes(ability)]


def _mean(drawn: str, asked: str, count: int = 40) -> float:
    rng = np.random.default_rng(7)
    scores = [detector.score(render(parse(drawn), rng), parse(asked)) for _ in range(count)]
    return float(np.mean(scores))


@pytest.mark.parametrize("ability", ABILITIES)
def test_true_drawings_get_full_marks(ability: str) -> None:
    scenes, rng = all_scenes(ability), np.random.default_rng(1)
    scores = []
    for i in range(500):
        wanted = scenes[i * len(scenes) // 500 % len(scenes)]
        scores.append(detector.score(render(wanted, rng), wanted))
    assert np.mean(scores) >= 0.99
    assert np.mean(np.array(scores) < 0.9) <= 0.01


@pytest.mark.parametrize(
    ("drawn", "asked", "low", "high"),
    [
        ("a red circle", "a green circle", 0.1, 0.4),
        ("a green square", "a green circle", 0.1, 0.4),
        ("a red square", "a green circle", 0.0, 0.2),
        ("two red squares", "three red squares", 0.6, 0.72),
        ("four red squares", "three red squares", 0.7, 0.8),
        ("a red square", "three red squares", 0.3, 0.38),
        ("a red circle", "a red circle and a blue square", 0.45, 0.55),
        ("a red square and a blue circle", "a red circle and a blue square", 0.1, 0.45),
        (
            "a green triangle below a yellow circle",
            "a green triangle above a yellow circle",
            0.55,
            0.65,
        ),
        (
            "a green triangle to the left of a yellow circle",
            "a green triangle above a yellow circle",
            0.55,
            0.85,
        ),
        (
            "a yellow circle above a green triangle",
            "a green triangle above a yellow circle",
            0.55,
            0.65,
        ),
    ],
)
def test_wrong_drawings_score_by_how_wrong_they_are(
    drawn: str, asked: str, low: float, high: float
) -> None:
    assert low <= _mean(drawn, asked) <= high


def test_more_mistakes_cost_more() -> None:
    asked = "a green triangle above a yellow circle"
    ladder = [
        asked,
        "a green triangle below a yellow circle",
        "a red triangle below a yellow circle",
        "a red square below a yellow circle",
        "a red square below a blue square",
    ]
    scores = [_mean(drawn, asked) for drawn in ladder]
    assert (np.diff(scores) < -0.05).all(), scores


def test_same_relation_said_the_other_way_round_is_right() -> None:
    assert (
        _mean("a yellow circle below a green triangle", "a green triangle above a yellow circle")
        > 0.99
    )


@pytest.mark.parametrize("value", [0, 127, 255])
def test_blank_images_score_nothing(value: int) -> None:
    image = np.full((64, 64, 3), value, dtype=np.uint8)
    assert detector.detect(image) == []
    assert {detector.score(image, s) for s in EVERY_SCENE[::97]} == {0.0}


@given(st.integers(0, 2**32), st.sampled_from([4, 8, 64]))
def test_noise_stays_within_bounds_and_earns_little(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    image = coarse.repeat(64 // size, 0).repeat(64 // size, 1)
    score = detector.score(image, EVERY_SCENE[seed % len(EVERY_SCENE)])
    assert 0 <= score <= 0.6


# ---- captions ----------------------------------------------------------------------------


def test_every_caption_reads_back_to_its_scene() -> None:
    captions = [s.caption for s in EVERY_SCENE]
    assert [parse(caption) for caption in captions] == EVERY_SCENE
    assert len(set(captions)) == len(captions)
    assert [s.ability for s in EVERY_SCENE] == [a for a in ABILITIES for _ in all_scenes(a)]


def test_case_spaces_and_full_stop_do_not_matter() -> None:
    assert parse("  A Green   circle. ") == Scene((Item("green", "circle"),))


@pytest.mark.parametrize(
    "prompt", ["", "a dog", "a green hexagon", "five red squares", "two red square"]
)
def test_other_prompts_are_refused_with_examples(prompt: str) -> None:
    with pytest.raises(
        ValueError, match=r"not a prompt of the shapes world.*three red squares"
    ) as e:
        parse(prompt)
    assert repr(prompt) in str(e.value)


def test_unknown_ability_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"'size'.*color, count, composition, location"):
        all_scenes("size")


def test_every_colour_and_form_is_seen_in_training() -> None:
    seen = [item for s in all_scenes("color") if not s.held_out for item in s.items]
    assert {item.color for item in seen} == set(scene.COLORS)
    assert {item.form for item in seen} == set(scene.FORMS)
    unseen = [s for s in all_scenes("color") if s.held_out]
    assert 0 < len(unseen) < len(seen)


def test_captions_are_true_without_noise_and_wrong_as_often_as_asked() -> None:
    rng = np.random.default_rng(0)
    scenes = [scene.random_scene(rng) for _ in range(600)]
    assert all(scene.noisy_caption(s, rng, 0.0) == s.caption for s in scenes)
    single = [s for s in scenes if s.ability == "color"]
    wrong = np.mean([parse(scene.noisy_caption(s, rng, 0.5)) != s for s in single])
    # A swapped attribute may be drawn right again: 1 - (1 - 0.5 * 5/6) (1 - 0.5 * 2/3).
    assert wrong == pytest.approx(0.61, abs=0.12)
    assert {parse(scene.noisy_caption(s, rng, 1.0)).ability for s in single} == {"color"}


def test_people_are_captioned_truly_without_noise() -> None:
    rng = np.random.default_rng(0)
    hand, face = people.HandSpec("light", "left"), people.FaceSpec("tan", True)
    hands = {data._hand_caption(hand, rng, 0.0) for _ in range(40)}
    faces = {data._face_caption(face, rng, 0.0) for _ in range(40)}
    assert hands == {"a hand", "a light left hand"}
    assert faces == {"a face", "a tan smiling face"}


# ---- drawings ----------------------------------------------------------------------------


def test_drawings_are_a_pure_function_of_seed_and_index() -> None:
    first = [data.draw(3, i) for i in range(12)]
    again = [data.draw(3, i) for i in reversed(range(12))][::-1]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        captions = [d.caption(np.random.default_rng(1), 0.5) for d in (one, other)]
        assert captions[0] == captions[1]
    assert (data.draw(4, 0).image != first[0].image).any()


def test_drawings_of_all_kinds_are_small_images_with_known_words() -> None:
    drawings = [data.draw(0, i) for i in range(60)]
    captions = [d.caption(np.random.default_rng(i), 0.3) for i, d in enumerate(drawings)]
    assert all(d.image.shape == (64, 64, 3) and d.image.dtype == np.uint8 for d in drawings)
    assert {word for caption in captions for word in caption.split()} <= set(vocabulary())
    assert any(" hand" in caption for caption in captions)
    assert any(" face" in caption for caption in captions)


# ---- tokenizer ---------------------------------------------------------------------------


@functools.cache
def _tokenizer():
    return build_tokenizer(vocabulary())


@given(st.text())
def test_any_text_can_be_encoded(text: str) -> None:
    tokenizer = _tokenizer()
    ids = tokenizer(text, padding="max_length", truncation=True).input_ids
    assert len(ids) == MAX_LENGTH
    assert all(0 <= i < len(tokenizer) for i in ids)
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_every_word_is_one_token_of_its_own() -> None:
    words = vocabulary()
    ids = [_tokenizer()(word, add_special_tokens=False).input_ids for word in words]
    assert [len(row) for row in ids] == [1] * len(words)
    assert len({row[0] for row in ids}) == len(words)


def test_every_caption_fits_and_differs() -> None:
    captions = [s.caption for s in EVERY_SCENE]
    rows = _tokenizer()(captions).input_ids
    assert max(map(len, rows)) <= MAX_LENGTH
    assert len({tuple(row) for row in rows}) == len(captions)


def test_unknown_words_are_told_apart() -> None:
    one, other = _tokenizer()(["a dog", "a cat"]).input_ids
    assert one != other
