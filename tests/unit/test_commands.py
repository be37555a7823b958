"""Every command answers --help without the libraries that it works with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_architecture import COMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = {"diffusers", "omegaconf", "peft", "pyarrow", "ray", "torch", "transformers"}


@pytest.mark.parametrize("module", sorted(COMMANDS))
def test_help_needs_no_heavy_library(module: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{module!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_module({module.removesuffix('.__main__')!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said, _, loaded = done.stdout.rpartition("LOADED")
    assert "usage" in said
    assert not set(loaded.split()) & HEAVY
