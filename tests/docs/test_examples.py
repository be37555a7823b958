"""The examples, with small numbers.

Others run elsewhere: own_objective.py and own_backbone.py in tests/unit/test_extending.py,
submit_to_cluster.sh in tests/system/test_job.py.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.docs.blocks import REPO
from texforce_ray.rewards.isolation import Environment, default_root
from texforce_ray.rl.ppo_anchor import Anchor


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

    from texforce_ray.artifacts.location import EMBEDDED
    from texforce_ray.fuse import main as fuse

    blend = load("blend_adapters").main
    one, other = trained / "adapter", tmp_path / "other"
    assert fuse([f"{one}*-0.7", "--out", str(other)]) == 0
    assert fuse([str(one), f"{other}*0.5", "--out", str(tmp_path / "sum")]) == 0
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


def test_the_one_file_version_has_the_products_gradient(tmp_path: Path) -> None:
    """Its policy gradient is that of the learner: same weights, samples and advantages."""
    import torch

    from texforce_ray.config.io import make_config
    from texforce_ray.diffusion.sampler import Sampler
    from texforce_ray.model.backbone import load_backbone
    from texforce_ray.rl.ppo_learner import PpoLearner
    from texforce_ray.rl.ppo_totals import Totals
    from texforce_ray.rl.sharding import UpdateBatch

    example = load("texforce_one_file")
    config = make_config(
        {
            "lora": {"text_encoder": {"rank": 32, "alpha": 32.0}},
            "diffusion": {"steps": example.STEPS, "guidance_scale": example.GUIDANCE},
            "prompts": {"per_iteration": 4, "samples_per_prompt": 2},
            "rollout": {"batch_size": 8},
            "objective": {"clip_range": example.CLIP_RANGE, "timestep_choice": "first"},
            "update": {"minibatches": 1},
        }
    )
    learner = PpoLearner(load_backbone("embedded"), config)
    sampler = Sampler(learner.backbone, steps=example.STEPS, eta=1.0, guidance_scale=1.0)
    trajectory, _, _ = example.sample(sampler, 0, 0, each=2)
    with torch.no_grad():  # some way from the policy that sampled, so that some pairs are clipped
        for index, parameter in enumerate(learner.parameters):
            torch.manual_seed(index)
            parameter.add_(0.02 * torch.randn_like(parameter))
    rows, advantages = np.arange(8), np.linspace(-1, 1, 8)
    ours = example.policy_gradient(
        sampler.denoiser, learner.parameters, trajectory, advantages, rows
    )
    steps = np.tile(np.arange(example.TRAINED), (8, 1))
    anchor = Anchor.of(trajectory.log_probs)
    theirs = learner._minibatch_gradient(
        UpdateBatch(trajectory, advantages, np.ones(8, dtype=bool)),
        rows, steps, anchor, [Totals(learner.backbone.device)],
    )  # fmt: skip
    scale = max(float(gradient.abs().max()) for gradient in theirs)
    assert scale > 0
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * scale)


def test_the_one_file_version_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "adapter"
    load("texforce_one_file").main(["--iterations", "1", "--samples", "4", "--out", str(out)])
    assert re.fullmatch(r"iteration 1: reward 0\.\d{3}\n", capsys.readouterr().out)
    assert (out / "adapter_model.safetensors").is_file()
