"""Every code block of README and docs is run, is tested elsewhere, or says why not.

The line above a block says which: `<!-- not run: reason -->`,
`<!-- tested by: tests/FILE.py::test_name -->`, `<!-- run: as FILE -->` (Python, written to FILE
first). Blocks without such a line are run, in order, in a folder where `runs/A`, `runs/B` and
`runs/NAME` are finished runs. Commands of the package are parsed and their configs checked
whatever the mark.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.docs.blocks import MARK, REPO, Block, blocks, commands, of_package, pages, parse
from texforce_ray.config import Config
from texforce_ray.config.io import load_config

ALL = [block for page in pages() for block in blocks(page)]
SHELL = [block for block in ALL if block.language == "bash"]
PLAIN = {"text", "json", "yaml", "dockerfile", "css"}
# Commands of a shell block that is run which set things up for a person's own shell.
SET_UP = {"export", "source", "cd"}


def named(block: Block) -> str:
    return block.name


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPO)))
def test_blocks_have_a_language_and_marks_that_can_be_read(page: Path) -> None:
    for block in blocks(page):
        assert block.language in PLAIN | {"bash", "python"}, f"{block.name}: {block.language!r}"
        assert block.mark is None or MARK.fullmatch(block.mark), f"{block.name}: {block.mark}"
    text = page.read_text()
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(blocks(page)), page
    marks = re.findall(r"<!-- (?:not run|run|tested by)[ :].*-->", text)
    inline = re.findall(r"`<!-- .*? -->`", text)
    used = [block for block in blocks(page) if block.mark]
    assert len(marks) <= len(used) + len(inline), f"{page}: a mark stands above no block"


@pytest.mark.parametrize("block", [b for b in ALL if b.says.get("tests")], ids=named)
def test_a_test_that_is_named_exists(block: Block) -> None:
    for name in (block.says["tests"] or "").split(", "):
        file, _, function = name.partition("::")
        tree = ast.parse((REPO / file).read_text())
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, name


@pytest.mark.parametrize("block", SHELL, ids=named)
def test_commands_can_be_given_so(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """Options exist, configs exist, keys are right, files and make targets are there."""
    for words in commands(block.text):
        _check(words, block, capsys)


def _check(words: list[str], block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, f"{block.name}: make {words[1]}"
    for word in words:
        if re.fullmatch(r"(benchmarks|examples|tests|cluster|configs)/[\w./-]+", word):
            # A name of the reader's own stands in capitals.
            assert (REPO / word).exists() or re.search("[A-Z]{2}", word), f"{block.name}: {word}"
    if (command := of_package(words)) is None:
        return
    module, arguments = command
    try:
        options = parse(module, arguments)
    except SystemExit:
        pytest.fail(f"{block.name}: {' '.join(words)}\n{capsys.readouterr().err}")
    overrides = list(getattr(options, "overrides", None) or [])
    file = getattr(options, "config", None)
    if file is not None and not re.search("[A-Z]{2}", str(file)):
        load_config(re.sub(r"^/opt/texforce/", f"{REPO}/", str(file)), overrides)
    elif overrides:
        load_config("shapes", overrides)


@pytest.mark.parametrize("block", [b for b in ALL if b.language in ("yaml", "json")], ids=named)
def test_data_can_be_read_and_is_right(block: Block) -> None:
    if block.language == "json":
        json.loads(block.text)
        return
    tree = yaml.safe_load(block.text)
    if isinstance(tree, dict) and tree.keys() <= Config.model_fields.keys():
        load_config("smoke", [f"{key}={json.dumps(value)}" for key, value in tree.items()])


@pytest.fixture(scope="module")
def workspace(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of the blocks that are run."""
    folder = tmp_path_factory.mktemp("workspace")
    for name in ("configs", "examples", "texforce_ray"):
        (folder / name).symlink_to(REPO / name)
    (folder / "runs").mkdir()
    for name in ("NAME", "A", "B", "hands", "shapes", "shapes-20260101-120000"):
        (folder / "runs" / name).symlink_to(trained)
    before = Path.cwd()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    os.chdir(before)


@pytest.mark.parametrize(
    "page",
    [p for p in pages() if any(b.language in ("bash", "python") for b in blocks(p))],
    ids=lambda page: str(page.relative_to(REPO)),
)
def test_blocks_run(page: Path, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A page's blocks that are not marked otherwise, in order."""
    namespace: dict[str, object] = {"__name__": "block"}
    for block in blocks(page):
        file = block.says.get("file")
        if block.language not in ("bash", "python") or (block.mark and not file):
            continue
        if block.language == "bash":
            _run_shell(block, capsys)
            continue
        if file:
            (workspace / file).write_text(block.text + "\n")
        exec(compile(block.text, block.name, "exec"), namespace)


def _run_shell(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process: importing torch once is enough."""
    for words in commands(block.text):
        if words[0] in SET_UP:
            continue
        command = of_package(words)
        assert command, f"{block.name}: {' '.join(words)} is not run here; mark the block"
        module, arguments = command
        trains = module.endswith(".run") and not {"--dry-run", "--help-config"} & set(arguments)
        assert not trains, f"{block.name}: trains; mark the block"
        code = importlib.import_module(module).main(arguments)
        assert code == 0, f"{block.name}: {' '.join(words)}\n{capsys.readouterr().err}"


def test_the_reward_of_the_pages_scores(workspace: Path) -> None:
    """`my_rewards.py` as README and docs write it, through the contract of every reward."""
    import numpy as np

    from texforce_ray.rewards.base import checked_scores, load_reward

    images = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    images[1, ..., 0] = 200
    for page in pages():
        for block in blocks(page):
            if block.says.get("file") != "my_rewards.py":
                continue
            (workspace / "my_rewards.py").write_text(block.text + "\n")
            sys.modules.pop("my_rewards", None)
            importlib.invalidate_caches()
            reward = load_reward("my_rewards:Redness", {"scale": 2.0})
            given = reward.score(images, ["a", "b"], [{}, {}])
            assert checked_scores(given, 2, "Redness") == [0.0, 400.0], block.name


def test_the_reward_of_the_pages_can_be_tried(workspace: Path) -> None:
    """The second step of docs/write-a-reward.md, as a reader gives it."""
    done = subprocess.run(
        [sys.executable, "-m", "texforce_ray.rewards.check", "my_rewards:Redness", "--repeat", "1"],
        cwd=workspace, env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])["my_rewards:Redness"]
    assert result["error"] is None
    assert len(result["scores"]) == 5
    assert None not in result["scores"]
