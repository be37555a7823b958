"""The shapes world: true drawings score full marks, wrong ones less, and by how wrong they are."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from texforce_ray.shapes import captions, data, detector, people, scene
from texforce_ray.shapes.appearance import appearance
from texforce_ray.shapes.captions import vocabulary
from texforce_ray.shapes.scene import ABILITIES, Item, Scene, all_scenes, parse, render
from texforce_ray.shapes.tokenizer import MAX_LENGTH, build_tokenizer

EVERY_SCENE = [s for ability in ABILITIES for s in all_scenes(ability)]


def _mean(drawn: str, asked: str, count: int = 40) -> float:
    rng = np.random.default_rng(7)
    scores = [detector.score(render(parse(drawn), rng), parse(asked)) for _ in range(count)]
    return float(np.mean(scores))


@pytest.mark.long
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


@pytest.mark.long
@given(st.integers(0, 2**32), st.sampled_from([4, 8, 64]))
def test_noise_stays_within_bounds_and_earns_little(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    image = coarse.repeat(64 // size, 0).repeat(64 // size, 1)
    score = detector.score(image, EVERY_SCENE[seed % len(EVERY_SCENE)])
    assert 0 <= score <= 0.6


# ---- captions ----------------------------------------------------------------------------


def test_every_caption_reads_back_to_its_scene() -> None:
    said = [s.caption for s in EVERY_SCENE]
    assert [parse(caption) for caption in said] == EVERY_SCENE
    assert len(set(said)) == len(said)
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


@pytest.mark.parametrize("ability", ABILITIES)
def test_plain_captions_are_right_as_often_as_their_rival(ability: str) -> None:
    """What guidance sharpens is the likeliest reading: against a tie it cannot help."""
    rng = np.random.default_rng(0)
    drawn = [s for s in (scene.random_scene(rng) for _ in range(6000)) if s.ability == ability]
    said = [parse(captions.plain_caption(s, rng)) for s in drawn]
    assert {s.ability for s in said} == {ability}
    if ability in ("color", "count"):
        pairs = [(s.items[0].color, t.items[0].color) for s, t in zip(drawn, said, strict=True)]
        right = np.mean([a == b for a, b in pairs])
        rival = np.mean([captions.RIVAL_COLOR[a] == b for a, b in pairs])
        assert right == pytest.approx(0.47, abs=0.06)
        assert rival == pytest.approx(0.47, abs=0.06)
    if ability == "location":
        right = np.mean([s.relation == t.relation for s, t in zip(drawn, said, strict=True)])
        assert right == pytest.approx(0.475, abs=0.06)
    counts = [(s.count, t.count) for s, t in zip(drawn, said, strict=True)]
    exact = np.mean([a == b for a, b in counts])
    assert exact == pytest.approx(0.43, abs=0.06) if ability == "count" else exact == 1


def test_rivals_and_opposites_are_mutual() -> None:
    for table in (captions.RIVAL_COLOR, captions.OPPOSITE):
        assert all(table[table[name]] == name != table[name] for name in table)
    assert set(captions.RIVAL_COLOR) == set(scene.COLORS)
    assert set(captions.OPPOSITE) == set(scene.RELATIONS)


def test_careful_captions_are_right_and_read_back_to_their_scene() -> None:
    for s in EVERY_SCENE:
        for caption in captions.careful_captions(s):
            assert "exactly" in caption
            read = captions.understand(caption)
            # What names both sides says where they are, whether or not the prompt asked for it.
            assert (read.items, read.count) == (s.items, s.count)
            assert read.relation == s.relation or s.ability == "composition"
        assert captions.understand(s.caption) == s


def test_careful_people_say_whether_they_are_well_formed() -> None:
    hand, face = people.HandSpec("light", "left"), people.FaceSpec("tan", True)
    assert captions.careful_hand(hand) == "picture of exactly one light left hand with five fingers"
    assert "wrong" in captions.careful_hand(hand, well_formed=False)
    assert captions.careful_face(face) != captions.careful_face(face, well_formed=False)
    rng = np.random.default_rng(0)
    plain = captions.of_hand(hand, well_formed=False)
    said = {plain(rng, False) for _ in range(100)}
    assert "a hand" in said
    assert not any("wrong" in caption for caption in said)


# ---- drawings ----------------------------------------------------------------------------


def test_drawings_are_a_pure_function_of_seed_and_index() -> None:
    first = [data.draw(3, i) for i in range(12)]
    again = [data.draw(3, i) for i in reversed(range(12))][::-1]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        for careful in (False, True):
            said = [d.caption(np.random.default_rng(1), careful) for d in (one, other)]
            assert said[0] == said[1]
    assert (data.draw(4, 0).image != first[0].image).any()


def test_drawings_of_all_kinds_are_small_images_with_known_words() -> None:
    drawings = [data.draw(0, i) for i in range(60)]
    said = [d.caption(np.random.default_rng(i), i % 2 == 0) for i, d in enumerate(drawings)]
    assert all(d.image.shape == (64, 64, 3) and d.image.dtype == np.uint8 for d in drawings)
    assert {word for caption in said for word in caption.split()} <= set(vocabulary())
    assert any(" hand" in caption for caption in said)
    assert any(" face" in caption for caption in said)


@pytest.mark.long
@pytest.mark.parametrize("ability", ABILITIES)
def test_appearance_is_another_axis_than_content(ability: str) -> None:
    scenes, rng = all_scenes(ability), np.random.default_rng(5)
    chosen = [scenes[rng.integers(len(scenes))] for _ in range(150)]
    true = [render(s, rng) for s in chosen]
    poor = [data.degrade(image, rng) for image in true]
    assert np.mean([appearance(image) for image in true]) >= 0.97
    assert np.mean([appearance(image) for image in poor]) <= 0.65
    content = [detector.score(image, s) for image, s in zip(poor, chosen, strict=True)]
    assert np.mean(content) >= 0.97


def test_an_image_of_nothing_has_no_appearance() -> None:
    assert appearance(np.full((64, 64, 3), 236, dtype=np.uint8)) == 0
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert appearance(noise) <= 0.5


def test_two_things_side_by_side_are_named_from_the_left() -> None:
    rng = np.random.default_rng(0)
    asked = parse("a red circle and a blue square")
    for _ in range(20):
        found = {max(f.colors, key=f.colors.__getitem__): f.x
                 for f in detector.detect(render(asked, rng))}  # fmt: skip
        assert found["red"] < found["blue"]


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
    said = [*(s.caption for s in EVERY_SCENE), *captions.careful_scenes()]
    rows = _tokenizer()(said).input_ids
    assert max(map(len, rows)) <= MAX_LENGTH
    assert len({tuple(row) for row in rows}) == len(said)


def test_unknown_words_get_different_tokens() -> None:
    one, other = _tokenizer()(["a dog", "a cat"]).input_ids
    assert one != other
