"""The same prompts in every format that can be read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from texforce_ray.config import PromptSource
from texforce_ray.prompts import Prompt, load_prompts

TEXTS = ["a red café", 'he said "hi", twice', "ünï\u2028code"]


def load(path: Path, column: str = "prompt", limit: int | None = None) -> list[Prompt]:
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


def _tsv(path: Path) -> None:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    rows = [f"{i}\t{text}" for i, text in enumerate(quoted)]
    path.write_text("\n".join(["id\tprompt", *rows]), encoding="utf-8")


def _utf16(path: Path) -> None:
    path.write_bytes("\r\n".join(TEXTS).encode("utf-16"))


def _json_columns(path: Path) -> None:
    columns = {"prompt": {str(i): text for i, text in enumerate(TEXTS)}}
    path.write_text(json.dumps(columns), encoding="utf-8")


def _json_under_a_key(path: Path) -> None:
    rows = [{"prompt": text} for text in TEXTS]
    path.write_text(json.dumps({"version": "1", "data": rows}), encoding="utf-8")


def _json_by_id(path: Path) -> None:
    rows = {f"00{i}": {"prompt": text} for i, text in enumerate(TEXTS)}
    path.write_text(json.dumps(rows), encoding="utf-8")


def _json_texts_by_id(path: Path) -> None:
    path.write_text(json.dumps({f"00{i}": text for i, text in enumerate(TEXTS)}), encoding="utf-8")


def _json_split(path: Path) -> None:
    rows = [[i, text] for i, text in enumerate(TEXTS)]
    table = {"columns": ["id", "prompt"], "index": [0, 1, 2], "data": rows}
    path.write_text(json.dumps(table), encoding="utf-8")


def _packed(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def packed(path: Path) -> None:
        write(path)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return packed


def _captions(path: Path) -> None:
    """As image captions are published: several of each image, of which the first one is taken."""
    rows: list[dict] = [{"prompt": [text, "another"]} for text in TEXTS]
    rows += [{"prompt": []}, {"prompt": None}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


FORMATS: list[tuple[str, Callable[[Path], None]]] = [
    (".txt", _txt),
    (".json", _json_texts),
    (".json", _json_objects),
    (".jsonl", _jsonl),
    (".csv", _csv),
    (".CSV", _csv),
    (".parquet", _parquet),
    (".tsv", _tsv),
    (".txt", _utf16),
    (".json", _jsonl),
    (".json", _json_columns),
    (".json", _json_under_a_key),
    (".json", _json_by_id),
    (".json", _json_texts_by_id),
    (".json", _json_split),
    (".csv.gz", _packed(_csv)),
    (".jsonl.gz", _packed(_jsonl)),
    (".txt.gz", _packed(_txt)),
    (".jsonl", _captions),
]
