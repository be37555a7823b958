"""The examples, with small numbers. `submit_to_cluster.sh` runs in tests/system/test_job.py."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.docs.blocks import REPO
from texforce_ray.rewards.environments import Environment, default_root


def load(name: str) -> ModuleType:
    """In this process: importing torch once is enough."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", REPO / f"examples/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_reward_with_its_own_requirement_trains_from_python(
    trained_output: tuple[Path, str],
) -> None:
    directory, output = trained_output
    assert "adapter: " in output
    assert re.search(r"best sample: '.*', seed \d+: \d", output), output
    own = Environment("custom", ("webcolors==25.10.0",)).directory(default_root())
    assert list(own.glob("**/site-packages/webcolors")), "no environment of the reward's own"
    lines = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1]
    for line in lines:
        assert 0 < line["reward/NamedColour_mean"] < 1
        assert line["reward/masked"] == 0


def test_blended_images_are_those_of_the_exact_sum(trained: Path, tmp_path: Path) -> None:
    """What diffusers draws with two adapters is what the fused adapter draws; all rows differ."""
    from PIL import Image

    from texforce_ray.fuse import main as fuse
    from texforce_ray.model.location import EMBEDDED

    blend = load("blend_adapters").main
    one, other = trained / "adapter", tmp_path / "other"
    assert fuse([f"{one}=-0.7", "--out", str(other)]) == 0
    assert fuse([f"{one}=1.0", f"{other}=0.5", "--out", str(tmp_path / "sum")]) == 0
    given = ["--images", "2", "--steps", "4", "--prompt", "a green circle"]
    given += ["--out", str(tmp_path / "blend.png")]
    blend([str(EMBEDDED), str(one), str(other), "--weights", "1.0", "0.5", *given])
    rows = np.split(np.asarray(Image.open(tmp_path / "blend.png")).astype(int), 4)
    blend([str(EMBEDDED), str(tmp_path / "sum"), str(other), "--weights", "1.0", "0.0", *given])
    summed = np.split(np.asarray(Image.open(tmp_path / "blend.png")).astype(int), 4)
    assert np.array_equal(summed[0], rows[0])
    assert np.abs(summed[1] - rows[3]).max() <= 1
    for index in range(1, 4):
        assert np.abs(rows[index] - rows[0]).max() > 2, "an adapter changed nothing"
    assert np.abs(rows[3] - rows[1]).max() > 2


@pytest.mark.parametrize("wrong", ["optimizer.lrr=1"])
def test_the_example_says_what_is_wrong_with_a_config(wrong: str) -> None:
    with pytest.raises(SystemExit, match=r"did you mean optimizer\.lr"):
        load("train_from_python").main("configs/smoke.yaml", wrong)
