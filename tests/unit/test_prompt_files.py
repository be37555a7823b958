"""Prompt files: every format gives the same prompts, and what is no prompt is refused by line."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.prompt_formats import FORMATS, TEXTS, load
from texforce_ray.config import PromptSource
from texforce_ray.errors import ConfigError, PromptError
from texforce_ray.prompts import Prompt, load_prompts

SHARED = Path(__file__).parents[3] / "shared" / "prompts"


@pytest.mark.parametrize(("ending", "write"), FORMATS)
def test_every_format_holds_the_same_prompts(
    tmp_path: Path, ending: str, write: Callable[[Path], None]
) -> None:
    path = tmp_path / f"prompts{ending}"
    write(path)
    assert [prompt.text for prompt in load(path)] == TEXTS
    assert [prompt.text for prompt in load(path, limit=2)] == TEXTS[:2]


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
        assert load(path, column="text") == expected, path


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"", "holds no prompts"),
        ("a.txt", b"\n  \n", "holds no prompts"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
        ("a.json", b"", "cannot be read"),
        ("a.json", b'{"prompt": " "}', "no prompts"),
        ("a.json", b"[1, 2]", "entry 0: 1 (int) is not text"),
        ("a.json", b"[]", "holds no prompts"),
        ("a.jsonl", b'"a"\n{"prompt": ', "cannot be read"),
        ("a.jsonl", b'"a"\n{"text": "b"}', "line 2: no field 'prompt', only text"),
        ("a.csv", b"id,text\n1,a cat\n", "no field 'prompt', only id, text; set 'column'"),
        ("a.csv", b"prompt\n", "holds no prompts"),
        ("a.csv", b"", "holds no prompts"),
        ("a.parquet", b"not parquet", "cannot be read"),
        ("a.parquet", b"", "cannot be read"),
        ("a.csv", b"prompt\na fox, in snow\n", "line 2 has 2 cells but the header has 1 (prompt)"),
        ("a.csv", b"prompt,n\na\na fox, in snow,1\n", "line 3 has 3 cells but the header has 2"),
        ("a.csv", b"n,prompt\n1,a cat\n2\n", "line 3 has 1 of 2 cells, and none for 'prompt'"),
        ("a.csv", b'prompt,n\na,1\n"b,2\nc,3\nd,4\n', "line 3: unexpected end of data"),
        ("a.csv", b'prompt,n\n"b,2\nc,"3"\nd,4\n', "line 2: ',' expected after"),
        ("a.csv", b"prompt,n,prompt\na,1,b\n", "two columns are named 'prompt'"),
        ("a.tsv", b"prompt\tn\na\tb\t1\n", "line 2 has 3 cells"),
        ("a.csv", "prompt\ncaf\u00e9\n".encode("latin-1"), "line 2 is not UTF-8 (byte 0xe9)"),
        ("a.txt", "a red fox".encode("utf-16-le"), "looks like UTF-16"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": NaN}', "line 2, field 'prompt': nan (float)"),
        ("a.jsonl", b'{"prompt": 1}', "line 1, field 'prompt': 1 (int) is not text"),
        ("a.jsonl", b'{"prompt": true}', "True (bool) is not text"),
        ("a.jsonl", b'{"prompt": ["a", 1]}', "['a', 1] (list) is not text"),
        (
            "a.jsonl",
            b'{"prompt": [{"role": "user", "content": "a"}]}',
            "is not text but a chat's messages",
        ),
        ("a.jsonl", b'{"prompt": {"en": "a"}}', "is not text but an object"),
        ("a.jsonl", b'{"prompt": "a", "x": "\\ud800"}', "line 1, field 'x': not valid text"),
        ("a.json", b'"a"\n"b', "line 2: "),
        ("a.json", b'{"train": ["a"], "test": ["b"]}', "several lists (train, test)"),
        ("a.json", b'{"caption": "a", "by": "b"}', "no 'prompt' among its keys caption, by"),
        ("a.json", b'{"prompt": ["a", "b"], "n": [1]}', "'prompt' has 2, 'n' has 1"),
        ("a.csv.gz", b"prompt", "cannot be read: Not a gzipped file"),
        ("a.xlsx", b"a", "unknown ending '.xlsx'; use one of .txt, .json"),
        ("a", b"a", "unknown ending ''"),
    ],
)
def test_bad_file_is_named_with_what_is_wrong(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PromptError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert problem in str(caught.value)


def test_missing_file_and_directory_are_named(tmp_path: Path) -> None:
    for path, problem in ((tmp_path / "none.txt", "does not exist"), (tmp_path, "no .parquet")):
        with pytest.raises(PromptError, match=problem) as caught:
            load(path)
        assert str(path) in str(caught.value)


def test_metadata_are_plain_data_that_any_service_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.parquet"
    row = {
        "prompt": "a cat",
        "timestamp": datetime(2022, 8, 1, 12, tzinfo=UTC),
        "day": date(2022, 8, 1),
        "nsfw": Decimal("0.10"),
        "missing": float("nan"),
        "tags": [{"score": Decimal("1.5")}],
        "jpg": b"\xff\xd8",
        "images": [{"bytes": b"\xff\xd8", "path": "x.jpg"}],
    }
    table = pa.Table.from_pylist([row])
    nanoseconds = pa.array([1_659_355_200_000_000_123], pa.timestamp("ns"))
    pq.write_table(table.append_column("exact", nanoseconds), path)
    with caplog.at_level(logging.WARNING):
        metadata = load(path)[0].metadata
    assert json.loads(json.dumps(metadata, allow_nan=False)) == {
        "timestamp": "2022-08-01T12:00:00+00:00",
        "day": "2022-08-01",
        "nsfw": 0.1,
        "missing": None,
        "tags": [{"score": 1.5}],
        "exact": "2022-08-01T12:00:00",
    }
    assert "columns of bytes are left out and not passed to rewards: jpg, images" in caplog.text


def test_ids_of_an_object_stay_with_its_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"a1": {"prompt": "x", "n": 1}, "a2": {"prompt": "y", "id": 7}}')
    assert load(path) == [Prompt("x", {"id": "a1", "n": 1}), Prompt("y", {"id": 7})]


def test_text_that_a_parquet_file_stores_as_bytes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": [text.encode() for text in TEXTS]}), path)
    assert [prompt.text for prompt in load(path)] == TEXTS


def test_a_prompt_that_swallowed_rows_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,size\n"a circle,1\na square,2\na sign of 5",3\n')
    assert len(load(path)) == 1
    assert "spans lines 2-4; is a quote missing?" in caplog.text


def test_parquet_files_of_a_folder_are_one_set_and_splits_are_not_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "a=b"
    folder.mkdir()
    for name, texts in (
        ("train-00000-of-00002", ["a"]),
        ("train-00001-of-00002", ["b"]),
        ("test-00000-of-00001", ["c"]),
    ):
        pq.write_table(pa.table({"prompt": texts}), folder / f"{name}.parquet")

    def texts_of(split: str | None) -> list[str]:
        source = PromptSource(set=None, path=str(folder), split=split)
        return [prompt.text for prompt in load_prompts(source)]

    assert texts_of("train") == ["a", "b"]
    assert texts_of("test") == ["c"]
    with pytest.raises(PromptError, match="several splits; set 'split' to one of test, train"):
        texts_of(None)
    with pytest.raises(PromptError, match="no split 'dev'"):
        texts_of("dev")


def test_a_data_set_of_hugging_face_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"caption": text, "image": b"\xff", "when": date(2022, 8, 1)} for text in TEXTS]
    parts = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(rows).select([2, 0]),
            "test": datasets.Dataset.from_list(rows[1:2]),
        }
    )
    saved, plain = tmp_path / "saved", tmp_path / "plain"
    parts.save_to_disk(saved)
    plain.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), plain / "data.parquet")

    def load(**keys: str) -> list[Prompt]:
        return load_prompts(PromptSource(set=None, column="caption", **keys))  # type: ignore[arg-type]

    expected = [Prompt(text, {"when": "2022-08-01"}) for text in TEXTS]
    assert load(dataset=str(saved), split="train") == [expected[2], expected[0]]
    assert load(path=str(saved), split="test") == [expected[1]]
    assert load(dataset=str(plain)) == expected
    with pytest.raises(PromptError, match="several splits; set 'split' to one of train, test"):
        load(dataset=str(saved))
    with pytest.raises(PromptError, match=r"prompts\.dataset: '/no/such' cannot be loaded"):
        load(dataset="/no/such")


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PromptError, match=r"'x/y' needs.*pip install 'texforce-ray\[datasets\]'"):
        load_prompts(PromptSource(set=None, dataset="x/y"))


@pytest.mark.parametrize("uri", ["s3://bucket/p.csv", "gs://b/p.txt", "https://host/p.json"])
def test_a_uri_is_refused_with_what_to_do(uri: str) -> None:
    with pytest.raises(ConfigError, match=rf"prompts\.path: '{uri}' is a URI.*mount the storage"):
        load_prompts(PromptSource(set=None, path=uri))


# ---- real prompt files --------------------------------------------------------------------


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
    prompts = load(path, column)
    raw = path.read_text(encoding="utf-8")
    entries = json.loads(raw) if name.endswith(".json") else raw.split("\n")
    texts = [e[column] if isinstance(e, dict) else e for e in entries]
    assert [p.text for p in prompts] == [text.strip() for text in texts if text.strip()]
