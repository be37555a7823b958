"""Fenced blocks of the Markdown files, and the commands of the package in them."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]
FENCE = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<mark>[^\n]*?) -->\n(?P=indent))?"
    r"(?P<fence>```+)(?P<language>[^\n]*)\n(?P<text>.*?)\n(?P=indent)(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)
MARK = re.compile(
    r"not run: (?P<reason>.{10,})|run: as (?P<file>[\w./]+)|"
    r"tested by: (?P<tests>tests/[\w/]+\.py::\w+(?:, tests/[\w/]+\.py::\w+)*)"
)
SEPARATORS = {"&&", ";", "|", "||", "&"}


@dataclass(frozen=True)
class Block:
    """mark: what the comment in the line above says, or None."""

    page: Path
    line: int
    language: str
    mark: str | None
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(REPO)}:{self.line}"

    @property
    def says(self) -> dict[str, str | None]:
        found = MARK.fullmatch(self.mark or "")
        return found.groupdict() if found else {}


def pages() -> list[Path]:
    """Everything that people read; results pages are written by a command."""
    folders = [REPO / name for name in ("docs", "examples", "cluster", "configs")]
    nested = [page for folder in folders for page in sorted(folder.rglob("*.md"))]
    return [*sorted(REPO.glob("*.md")), *(p for p in nested if "results" not in p.parts)]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        indent = match["indent"]
        body = "\n".join(line.removeprefix(indent) for line in match["text"].split("\n"))
        line = text.count("\n", 0, match.start("fence")) + 1
        found.append(Block(page, line, match["language"].strip(), match["mark"], body))
    return found


def commands(text: str) -> Iterator[list[str]]:
    """Each command of a shell block as its words; comments and redirections are left out."""
    for line in text.replace("\\\n", " ").split("\n"):
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in SEPARATORS:
                words.append(word)
            elif words:
                yield words
                words = []


def of_package(words: list[str]) -> tuple[str, list[str]] | None:
    """(module, arguments) of a command of this package, also inside `ray job submit -- ...`."""
    from texforce_ray.cli import COMMANDS

    for index, word in enumerate(words):
        rest = words[index + 1 :]
        if re.search(r"python\d?$", word) and rest[:1] == ["-m"] and "texforce_ray" in rest[1]:
            return rest[1], rest[2:]
        if word == "texforce-ray" and rest and rest[0] in COMMANDS:
            return COMMANDS[rest[0]][0], rest[1:]
    return None


class Parsed(Exception):
    """The command line was understood."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


@contextmanager
def stopping_after_the_arguments() -> Iterator[None]:
    """Inside, every argparse parser raises `Parsed` instead of returning."""
    names = ("parse_args", "parse_intermixed_args")
    kept = {name: getattr(argparse.ArgumentParser, name) for name in names}

    def stopping(original: Any) -> Any:
        def parse(self: Any, *given: Any, **named: Any) -> Any:
            raise Parsed(original(self, *given, **named))

        return parse

    for name, original in kept.items():
        setattr(argparse.ArgumentParser, name, stopping(original))
    try:
        yield
    finally:
        for name, original in kept.items():
            setattr(argparse.ArgumentParser, name, original)


def parse(module: str, arguments: list[str]) -> argparse.Namespace:
    """What the module's own `main` makes of a command line; SystemExit if it is wrong."""
    loaded = importlib.import_module(
        f"{module}.__main__" if (REPO / Path(*module.split("."))).is_dir() else module
    )
    with stopping_after_the_arguments(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        try:
            loaded.main()
        except Parsed as parsed:
            return parsed.options
    raise AssertionError(f"{module} has parsed nothing")
