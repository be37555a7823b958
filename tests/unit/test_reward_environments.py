"""The environments of rewards: what rewards may import there, and how they are made."""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from texforce_ray.rewards import isolation
from texforce_ray.rewards.isolation import Environment, build

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "module",
    [
        "texforce_ray",
        "texforce_ray.errors",
        "texforce_ray.rewards",
        "texforce_ray.rewards.shapes",
        "texforce_ray.rewards.jpeg",
        "texforce_ray.rewards.environments",
        "texforce_ray.rewards.hand",
        "texforce_ray.rewards.face",
        "texforce_ray.actors.reward",
    ],
)
def test_reward_environments_need_no_heavy_library(module: str) -> None:
    heavy = ["torch", "diffusers", "transformers", "peft", "pydantic", "omegaconf"]
    code = (
        f"import sys\nfor name in {heavy}: sys.modules[name] = None\n"
        f"import {module}\nprint(*[n for n in sys.modules if sys.modules[n] is not None])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {*heavy, "ray"}


def test_an_environment_whose_python_is_gone_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = Environment("nothing", ())
    monkeypatch.setattr(Environment, "all_requirements", lambda _: [])
    made = []

    def uv(arguments: list[str], *_: Any) -> None:
        if arguments[0] == "venv":
            made.append(arguments)
            python = Path(arguments[-1]) / "bin/python"
            python.parent.mkdir(parents=True)
            python.symlink_to(sys.executable)

    monkeypatch.setattr(isolation, "_uv", uv)
    root = tmp_path / "with a space"
    python = Path(build(environment, root, 60, print))
    assert build(environment, root, 60, print) == str(python)
    assert len(made) == 1
    python.unlink()
    python.symlink_to("/no/such/python")
    assert build(environment, root, 60, print) == str(python)
    assert len(made) == 2
    subprocess.run([python, "-c", ""], check=True)
    monkeypatch.setattr(sysconfig, "get_platform", lambda: "linux-riscv64")
    assert build(environment, root, 60, print) != str(python)


def test_an_isolated_interpreter_is_started_without_the_clusters_paths(tmp_path: Path) -> None:
    from texforce_ray.cluster.environments import isolated_command

    python = tmp_path / "with a space" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    code = (
        "import os; print([os.environ.get(n) for n in ('PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV')])"
    )
    ours = ["/tmp/ray/s/runtime_resources/py_modules_files/a", "/x y/runtime_resources/b"]
    for given, kept in (
        (["/leak", *ours, "/other leak"], ours),
        (["/leak"], []),
        ([], []),
    ):
        done = subprocess.run(
            ["bash", "-c", f"exec {isolated_command(str(python))} -c {shlex.quote(code)}"],
            env=os.environ
            | {"PYTHONPATH": ":".join(given), "PYTHONHOME": "/x", "VIRTUAL_ENV": "/y"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ast.literal_eval(done.stdout) == [":".join(kept), None, None]
