"""Prompt files: .txt, .json, .jsonl, .csv, .tsv (each also as .gz), .parquet, and folders."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import logging
import zlib
from collections import Counter
from pathlib import Path

from texforce_ray.config import PromptSource
from texforce_ray.errors import PromptError
from texforce_ray.paths import check_local
from texforce_ray.prompts.json_files import read_json, read_jsonl
from texforce_ray.prompts.records import Item, Record, record_of
from texforce_ray.prompts.tables import read_dataset, read_folder, read_parquet

log = logging.getLogger(__name__)

TEXT_ENDINGS = (".txt", ".json", ".jsonl", ".csv", ".tsv")
_BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, which is a prefix of it
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_records(source: PromptSource) -> list[Record]:
    """(text, other fields) of each non-empty prompt of a file, folder or data set.

    .txt: a prompt per line. .json: a list of texts or objects; the same under one key or by id; or
    columns. .jsonl: a text or an object per line. Objects and tables hold the text in `column`.

    Raises:
        PromptError: naming the file and place, what is wrong, and how to fix it.
    """
    if source.dataset is not None:
        name = f"data set {source.dataset}"
        items = read_dataset(
            source.dataset, source.column, source.split, source.subset, source.revision
        )
    else:
        name = f"prompt file {source.path}"
        items = _read_path(str(source.path), source)
    records = [record_of(item, source.column, f"{name}, {where}") for where, item in items]
    kept = [record for record in records if record[0]]
    if not kept:
        raise PromptError(f"{name} holds no prompts")
    return kept


def stem(file: Path) -> str:
    """The name without its endings, `a` for a.txt.gz."""
    return Path(file.stem).stem if file.suffix.lower() == ".gz" else file.stem


def _read_path(path: str, source: PromptSource) -> list[Item]:
    check_local(path, "prompts.path")
    file = Path(path).expanduser()
    if not file.exists():
        raise PromptError(f"prompt file {path} does not exist")
    try:
        if file.is_dir():
            return read_folder(file, source.column, source.split)
        return _read_file(file, path, source.column)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise PromptError(f"prompt file {path} cannot be read: {error}") from None


def _read_file(file: Path, path: str, column: str) -> list[Item]:
    ending = file.suffix.lower()
    if ending == ".parquet":
        return read_parquet(file, column)
    packed = ending == ".gz"
    if packed:
        ending = Path(file.stem).suffix.lower()
    if ending not in TEXT_ENDINGS:
        raise PromptError(
            f"prompt file {path}: unknown ending {file.suffix!r}; use one of "
            f"{', '.join(TEXT_ENDINGS)} (each also with .gz) or .parquet"
        )
    text = _decoded(gzip.decompress(file.read_bytes()) if packed else file.read_bytes())
    if ending == ".json":
        return read_json(text, column)
    if ending == ".jsonl":
        return read_jsonl(text)
    if ending == ".txt":
        return [(f"line {i}", line) for i, line in enumerate(_lines(text), 1)]
    return _csv(text, column, "," if ending == ".csv" else "\t", path)


def _decoded(data: bytes) -> str:
    """Text in UTF-8, or in the encoding that its byte order mark names.

    Raises:
        ValueError: another encoding.
    """
    encoding = next((name for bom, name in _BOMS.items() if data.startswith(bom)), "utf-8")
    start = data[:4096]
    if encoding == "utf-8" and start.count(0) > len(start) // 4:
        raise ValueError(
            "it looks like UTF-16 without a byte order mark; convert it: iconv -f UTF-16LE -t UTF-8"
        )
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line} is not {encoding.upper()} (byte {data[error.start]:#04x}); if it is "
            "Latin-1, convert it: iconv -f LATIN1 -t UTF-8"
        ) from None


def _lines(text: str) -> list[str]:
    # Not splitlines(): texts may hold U+2028 and other characters on which it splits.
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _csv(text: str, column: str, delimiter: str, path: str) -> list[Item]:
    """Rows as mappings; the first one names the columns.

    Raises:
        ValueError: an unclosed quote, or a row with more cells than the header; both would put
            wrong text into the prompts.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    items: list[Item] = []
    header: list[str] | None = None
    spanning: list[str] = []
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise ValueError(
                f"line {first}: {error} (an unclosed quote, or a text that begins with one? write "
                '" inside a quoted cell as "")'
            ) from None
        if not row:
            continue
        if header is None:
            header = _header(row)
            continue
        item = _mapping(row, header, column, first)
        if reader.line_num > first and delimiter in (item.get(column) or ""):
            spanning.append(f"{first}-{reader.line_num}")
        items.append((f"line {first}", item))
    if spanning:
        log.warning(
            "prompt file %s: a quoted prompt spans lines %s%s; is a quote missing?",
            path,
            spanning[0],
            f", and {len(spanning) - 1} more do" if len(spanning) > 1 else "",
        )
    return items


def _header(row: list[str]) -> list[str]:
    if twice := [name for name, count in Counter(row).items() if name and count > 1]:
        raise ValueError(f"line 1: two columns are named {twice[0]!r}")
    return row


def _mapping(row: list[str], header: list[str], column: str, line: int) -> dict[str, str | None]:
    if len(row) > len(header):
        raise ValueError(
            f"line {line} has {len(row)} cells but the header has {len(header)} "
            f"({', '.join(header)}): put texts that contain the separator in double quotes, or "
            "write one prompt per line into a .txt file"
        )
    if column in header and header.index(column) >= len(row):
        raise ValueError(
            f"line {line} has {len(row)} of {len(header)} cells, and none for {column!r}"
        )
    cells: list[str | None] = [*row, *[None] * (len(header) - len(row))]
    return {name: cell for name, cell in zip(header, cells, strict=True) if name or cell}
