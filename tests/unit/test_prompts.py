"""Built-in sets, parts and filters, and which prompts an iteration uses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from texforce_ray import randomness
from texforce_ray.config import PromptSource
from texforce_ray.errors import PromptError
from texforce_ray.prompts import Prompt, load_prompts, prompts_of_iteration
from texforce_ray.prompts.sets import BUILT_IN
from texforce_ray.shapes.scene import parse


def test_unknown_set_lists_the_known() -> None:
    with pytest.raises(PromptError, match=r"'shape'.*shapes-unseen.*faces"):
        load_prompts(PromptSource(set="shape", path=None))


# ---- which prompts an iteration uses -------------------------------------------------------

_sizes = {
    "available": st.integers(1, 40),
    "count": st.integers(1, 25),
    "seed": st.integers(0, 2**40),
}


@given(**_sizes)
def test_every_prompt_comes_once_in_each_epoch(available: int, count: int, seed: int) -> None:
    prompts = [Prompt(str(i)) for i in range(available)]
    epochs = 3
    stream: list[str] = []
    iteration = 0
    while len(stream) < epochs * available:
        stream += [p.text for p in prompts_of_iteration(prompts, seed, iteration, count)]
        iteration += 1
    for epoch in range(epochs):
        part = stream[epoch * available : (epoch + 1) * available]
        assert Counter(part) == Counter(str(i) for i in range(available))


def test_an_epochs_order_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    generator = randomness.generator
    monkeypatch.setattr(randomness, "generator", lambda *key: drawn.append(key) or generator(*key))
    prompts = [Prompt(str(i)) for i in range(10)]
    seed = 987_654_321  # of no other test
    stream = [p for i in range(5) for p in prompts_of_iteration(prompts, seed, i, 4)]
    assert len(drawn) == 2
    orders = [generator(seed, randomness.PROMPTS, epoch).permutation(10) for epoch in range(2)]
    assert stream == [prompts[place] for order in orders for place in order]


def test_choice_is_a_pure_function_of_its_arguments() -> None:
    prompts = [Prompt(str(i)) for i in range(30)]
    choice = prompts_of_iteration(prompts, 5, 3, 10)
    prompts_of_iteration(prompts, 5, 9, 7)
    assert prompts_of_iteration(list(prompts), 5, 3, 10) == choice
    assert prompts_of_iteration(prompts, 6, 3, 10) != choice
    epochs = [
        [p for i in range(3 * e, 3 * e + 3) for p in prompts_of_iteration(prompts, 5, i, 10)]
        for e in range(2)
    ]
    assert epochs[0] != epochs[1]


# ---- built-in sets -------------------------------------------------------------------------


def _set(name: str) -> list[str]:
    return [prompt.text for prompt in load_prompts(PromptSource(set=name, path=None))]


# "shapes-phrases" are the paper's own choice of phrases, and one of them is held out elsewhere; its
# careful ones are no captions that the detector reads.
_APART = ("shapes-phrases", "shapes-phrases-careful")
SHAPES = [name for name in BUILT_IN if name.startswith("shapes") and name not in _APART]


@pytest.mark.parametrize("name", SHAPES)
def test_held_out_combinations_are_in_the_unseen_set_alone(name: str) -> None:
    held_out = {parse(text).held_out for text in _set(name)}
    assert held_out == {name.endswith("-unseen")}


@pytest.mark.parametrize(
    "name", ["shapes", "shapes-unseen", "shapes-phrases", "shapes-phrases-unseen"]
)
def test_mixed_sets_have_as_many_prompts_of_each_ability(name: str) -> None:
    counts = Counter(parse(text).ability for text in _set(name))
    assert set(counts) == {"color", "count", "composition", "location"}
    assert len(set(counts.values())) == 1


@pytest.mark.parametrize("ability", ["color", "count", "composition", "location"])
def test_sets_of_one_ability_hold_nothing_else(ability: str) -> None:
    texts = _set(f"shapes-{ability}")
    assert {parse(text).ability for text in texts} == {ability}
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_every_set_has_prompts(name: str) -> None:
    texts = _set(name)
    assert texts
    assert all(text == text.strip() and text for text in texts)


# ---- parts and filters -------------------------------------------------------------------------


def test_train_and_test_share_no_prompt_and_adding_one_moves_no_other(tmp_path: Path) -> None:
    texts = [f"prompt number {i} of many" for i in range(300)]
    file = tmp_path / "p.txt"
    file.write_text("\n".join(texts))

    def part(name: str) -> list[str]:
        source = PromptSource(set=None, path=str(file), part=name, test_share=0.2)  # type: ignore[arg-type]
        return [prompt.text for prompt in load_prompts(source)]

    train, test = part("train"), part("test")
    assert sorted(train + test) == sorted(texts)
    assert 30 < len(test) < 90
    file.write_text("\n".join(["a new one", *texts, "another new one"]))
    assert [text for text in part("test") if "new" not in text] == test


def test_prompts_are_filtered_by_length_and_nothing_left_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("one\none two\none two three\n")
    source = PromptSource(set=None, path=str(file), min_words=2, max_words=2)
    assert [prompt.text for prompt in load_prompts(source)] == ["one two"]
    with pytest.raises(PromptError, match=r"none of the 3 prompts of .*min_words=9"):
        load_prompts(PromptSource(set=None, path=str(file), min_words=9))


def test_the_papers_sets_have_their_sizes() -> None:
    def texts(name: str) -> list[str]:
        return [prompt.text for prompt in load_prompts(PromptSource(set=name, path=None))]

    assert len(set(texts("animals"))) == 45
    assert "an ant" in texts("animals")
    assert len(set(texts("animals-unseen"))) == 24
    assert not {t.split()[1] for t in texts("animals-unseen")} & {
        t.split()[1] for t in texts("animals")
    }
    assert texts("dpok-count") == ["Four wolves in the park."]
    assert len(texts("dpok")) == len(texts("dpok-unseen")) == 4
