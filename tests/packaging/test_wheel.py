"""The wheel: built, installed into an empty environment, its command run from another folder.

The dependencies are those of this environment, made visible by a .pth file: installing torch again
would take minutes.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from texforce_ray import __version__
from texforce_ray.cli import COMMANDS

REPO = Path(__file__).parents[2]
HEAVY = {"diffusers", "omegaconf", "peft", "pyarrow", "ray", "torch", "transformers"}


def uv(*arguments: str, cwd: Path = REPO) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "uv", *arguments],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    uv("build", "--quiet", "--out-dir", str(out), str(REPO))
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the wheel, and no checkout."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    uv("venv", "--quiet", "--python", sys.executable, str(folder))
    python = folder / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    uv("pip", "install", "--quiet", "--offline", "--no-deps", "--python", str(python), str(wheel))
    (site,) = folder.glob("lib/python*/site-packages")
    # Not by a .pth of its own folder: that would run the checkout's editable .pth too.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(*command: str, cwd: Path, **more: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=100
    )


def test_the_wheel_holds_weights_configs_and_no_tests(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "texforce_ray/shapes/weights/model_index.json",
        "texforce_ray/shapes/weights/unet/diffusion_pytorch_model.safetensors",
        "texforce_ray/shapes/scorer.safetensors",
        "texforce_ray/configs/shapes.yaml",
        "texforce_ray/configs/paper/table3-joint.yaml",
        f"texforce_ray-{__version__}.dist-info/licenses/LICENSE",
    ):
        assert name in names, name
    assert all(name.startswith("texforce_ray") for name in names)
    assert wheel.stat().st_size < 30e6  # an upload limit is 100 MB
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        members = [Path(name).parts[1:2] for name in archive.getnames()]
    assert {("tests",), ("cluster",), ("docs",), ("mkdocs.yml",)} <= set(members)
    assert not {(".venv",), ("runs",), ("shared",)} & set(members)


def test_the_command_answers_at_once_without_torch(installed: Path, tmp_path: Path) -> None:
    command = str(installed / "texforce-ray")
    done = run(command, "--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "texforce_ray.cli" in imported
    assert not imported & HEAVY
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert run(command, "--version", cwd=tmp_path).stdout == f"{__version__}\n"
    wrong = run(command, "trian", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "no command 'trian'" in wrong.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_with_main(name: str) -> None:
    assert callable(importlib.import_module(COMMANDS[name][0]).main)


def test_a_shipped_config_is_found_from_anywhere(installed: Path, tmp_path: Path) -> None:
    """And the code that runs is the wheel's."""
    command = str(installed / "texforce-ray")
    done = run(command, "run", "--config", "shapes", "--dry-run", "seed=7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "seed: 7" in done.stdout
    assert f"results go to {tmp_path}/runs/shapes-" in done.stdout
    where = run(str(installed / "python"), "-c", "import texforce_ray as t; print(t.__file__)",
                cwd=tmp_path)  # fmt: skip
    assert where.stdout.startswith(str(installed.parent)), where.stdout + where.stderr
    missing = run(command, "run", "--config", "nonsense", "--dry-run", cwd=tmp_path)
    assert missing.returncode == 1
    assert "shipped configs:" in missing.stderr
    assert "paper/table3-unet" in missing.stderr
