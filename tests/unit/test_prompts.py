"""Prompts from files and built-in sets, and which of them an iteration uses."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from texforce_ray.config import PromptSource
from texforce_ray.errors import PromptError
from texforce_ray.prompts import Prompt, load_prompts, prompts_of_iteration
from texforce_ray.prompts.sets import BUILT_IN
from texforce_ray.shapes.scene import parse

SHARED = Path(__file__).parents[3] / "shared" / "prompts"
TEXTS = ["a red café", 'he said "hi", twice', "ünï\u2028code"]


def _load(path: Path, column: str = "prompt", limit: int | None = None) -> list[Prompt]:
    return load_prompts(PromptSource(set=None, path=str(path), column=column, limit=limit))


def _txt(path: Path) -> None:
    path.write_bytes("\ufeff  a red café \r\n\r\n".encode() + "\n".join(TEXTS[1:]).encode())


def _json_texts(path: Path) -> None:
    path.write_text(json.dumps([*TEXTS, "  "]), encoding="utf-8")


def _json_objects(path: Path) -> None:
    path.write_text(json.dumps([{"prompt": text} for text in TEXTS]), encoding="utf-8")


def _jsonl(path: Path) -> None:
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in TEXTS[:2]]
    path.write_text("\n\n".join([*lines, json.dumps(TEXTS[2], ensure_ascii=False)]), "utf-8")


def _csv(path: Path) -> None:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    path.write_text("\n".join(["prompt", *quoted]), encoding="utf-8")


def _parquet(path: Path) -> None:
    pq.write_table(pa.table({"prompt": [*TEXTS, None, ""]}), path)


@pytest.mark.parametrize(
    ("ending", "write"),
    [
        (".txt", _txt),
        (".json", _json_texts),
        (".json", _json_objects),
        (".jsonl", _jsonl),
        (".csv", _csv),
        (".CSV", _csv),
        (".parquet", _parquet),
    ],
)
def test_every_format_holds_the_same_prompts(
    tmp_path: Path, ending: str, write: Callable[[Path], None]
) -> None:
    path = tmp_path / f"prompts{ending}"
    write(path)
    assert [prompt.text for prompt in _load(path)] == TEXTS
    assert [prompt.text for prompt in _load(path, limit=2)] == TEXTS[:2]


def test_other_fields_become_metadata(tmp_path: Path) -> None:
    expected = [
        Prompt("a cat", {"id": "7", "author": "x"}),
        Prompt("a dog", {"id": "8", "author": ""}),
    ]
    csv, parquet, lines = (tmp_path / f"p.{ending}" for ending in ("csv", "parquet", "jsonl"))
    csv.write_text("id,text,author\n7,a cat,x\n8,a dog,\n")
    rows = [{"text": p.text, **p.metadata} for p in expected]
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    lines.write_text("\n".join(map(json.dumps, rows)))
    for path in (csv, parquet, lines):
        assert _load(path, column="text") == expected, path


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"", "holds no prompts"),
        ("a.txt", b"\n  \n", "holds no prompts"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
        ("a.json", b"", "cannot be read"),
        ("a.json", b'{"prompt": "x"}', "a list of texts or objects"),
        ("a.json", b"[1, 2]", "entry 0: int is neither"),
        ("a.json", b"[]", "holds no prompts"),
        ("a.jsonl", b'"a"\n{"prompt": ', "cannot be read"),
        ("a.jsonl", b'"a"\n{"text": "b"}', "entry 1: no field 'prompt', only text"),
        ("a.csv", b"id,text\n1,a cat\n", "no field 'prompt', only id, text; set 'column'"),
        ("a.csv", b"prompt\n", "holds no prompts"),
        ("a.csv", b"", "holds no prompts"),
        ("a.parquet", b"not parquet", "cannot be read"),
        ("a.parquet", b"", "cannot be read"),
        ("a.xlsx", b"a", "ending '.xlsx' is unknown; one of .txt, .json"),
        ("a", b"a", "ending '' is unknown"),
    ],
)
def test_bad_file_is_named_with_what_is_wrong(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PromptError) as caught:
        _load(path)
    assert str(path) in str(caught.value)
    assert problem in str(caught.value)


def test_missing_file_and_directory_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(PromptError, match="does not exist") as caught:
            _load(path)
        assert str(path) in str(caught.value)


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


# "shapes-phrases" is the paper's own choice of phrases, and one of them is held out elsewhere.
SHAPES = [name for name in BUILT_IN if name.startswith("shapes") and name != "shapes-phrases"]


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


# ---- real prompt files ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("drawbench.txt", "prompt"),
        ("hps_v2_all.txt", "prompt"),
        ("hps_v2_all_eval.txt", "prompt"),
        ("imagereward_benchmark.json", "prompt"),
        ("refl_data.json", "text"),
    ],
)
def test_published_prompt_files_can_be_read(name: str, column: str) -> None:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    prompts = _load(path, column)
    raw = path.read_text(encoding="utf-8")
    entries = json.loads(raw) if name.endswith(".json") else raw.split("\n")
    texts = [e[column] if isinstance(e, dict) else e for e in entries]
    assert [p.text for p in prompts] == [text.strip() for text in texts if text.strip()]


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
