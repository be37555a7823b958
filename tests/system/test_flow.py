"""A run on a flow-matching model: exact whatever its actors, resumable, drawn again in stock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from tests.flow_miniatures import build
from tests.system.conftest import Finished, kill_after_checkpoint, resume, run
from tests.system.test_objectives import assert_same
from texforce_ray.diffusion.flow_scheduler import SeededFlowScheduler
from texforce_ray.records.samples import read_samples, samples_path


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = tmp_path_factory.mktemp("sd3") / "pipeline"
    with torch.random.fork_rng(devices=[]):
        build(path, "sd3")
    return (
        f"model.path={path}", "lora.text_encoder_3={rank: 2, alpha: 2}",
        "lora.denoiser={rank: 2, alpha: 2}",
        "diffusion={process: flow, steps: 5, window: {size: 2}, guidance_scale: 2, "
        "max_sequence_length: 12}",
        "rewards=[{name: jpeg_incompressibility}]", "eval.every=0", "eval.final_images=4",
        "eval.eta=0", "eval.steps=7",
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(overrides: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run(tmp_path_factory.mktemp("flow") / "run", *overrides)


MORE = (
    "learner.num_workers=2", "learner.num_cpus=0.25", "rollout.num_workers=3",
    "rollout.num_cpus=0.25",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("demo", ["configs/shapes-flow.yaml", "configs/shapes-flow-nft.yaml"])
def test_a_demo_killed_and_resumed_with_other_actors_gives_the_same_bits(
    demo: str, tmp_path: Path
) -> None:
    """Of few samples; with one learner and two rollout actors, then with two and three."""
    few = ("rollout.batch_size=6", "eval.final_images=4", "learner.microbatch_size=12")
    directory = tmp_path / "run"
    whole = run(tmp_path / "whole", *few, config=demo)
    kill_after_checkpoint(directory, 1, *few, config=demo)
    assert_same(resume(directory, *MORE), whole)


@pytest.mark.slow
def test_killed_and_resumed_with_other_actors_gives_the_same_bits(
    uninterrupted: Finished, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    kill_after_checkpoint(directory, 1, *overrides)
    assert_same(resume(directory, *MORE), uninterrupted)


def test_ratios_are_one_at_first_and_only_the_window_is_stored(uninterrupted: Finished) -> None:
    for line in uninterrupted.metrics:
        assert line["ppo/ratio_error_first_pass"] <= 1e-5
        samples = read_samples(samples_path(uninterrupted.directory, line["iteration"]))
        windows = {tuple(window) for window in samples["window"]}
        assert len(windows) == 1
        assert windows <= {(0, 1)}  # the first half of five steps


def test_a_logged_sample_is_drawn_again_by_the_stock_pipeline(
    uninterrupted: Finished, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    """With our scheduler in it; the images of iteration 0 are the base model's."""
    samples = read_samples(samples_path(uninterrupted.directory, 0))
    pipe = StableDiffusion3Pipeline.from_pretrained(overrides[0].partition("=")[2])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SeededFlowScheduler.of(
        pipe.scheduler, kernel="cps", eta=0.8, window=samples["window"][0]
    )
    images = pipe(
        samples["prompt"], num_inference_steps=5, guidance_scale=2.0, max_sequence_length=12,
        generator=pipe.scheduler.generators(samples["seed"]), output_type="np",
    ).images  # fmt: skip
    from texforce_ray.rewards.jpeg import JpegIncompressibility

    pixels, prompts = np.round(images * 255).astype(np.uint8), samples["prompt"]
    scores = JpegIncompressibility().score(pixels, prompts, [{}] * len(prompts))
    np.testing.assert_allclose(scores, samples["reward_jpeg_incompressibility"], rtol=2e-3)
