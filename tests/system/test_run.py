"""What a whole run promises: its files, its numerics, the same bits from any number of actors."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.system.conftest import SMOKE, Finished, finish, kill_after_checkpoint, resume, run, start
from texforce_ray.records.metric_names import METRICS, describe


def test_a_run_leaves_everything_that_is_promised(plain: Finished) -> None:
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "samples/iteration-00000.parquet",
        "images/step-00003.png",
        "evaluation/summary.json",
        "evaluation/comparison.png",
        "checkpoints/step-00003/COMPLETE.json",
        "adapter/adapter_model.safetensors",
        "adapter/pytorch_lora_weights.safetensors",
        "adapter/README.md",
    ):
        assert (plain.directory / name).is_file(), name
    assert list((plain.directory / "tensorboard").iterdir())


def test_the_last_line_is_one_json_object(plain: Finished) -> None:
    summary = plain.summary
    assert summary.keys() >= {"base", "tuned", "difference", "low", "high", "images", "seconds"}
    assert summary["run_dir"] == str(plain.directory)
    assert summary["low"] <= summary["difference"] <= summary["high"]


def test_the_end_compares_on_unseen_prompts_and_over_guidance(plain: Finished) -> None:
    summary = plain.summary
    assert summary["unseen"].keys() >= {"base", "tuned", "low", "high"}
    points = [(p["prompts"], p["guidance_scale"]) for p in summary["guidance"]]
    assert points == [("seen", 1), ("seen", 3), ("unseen", 1), ("unseen", 3)]
    assert "over guidance, unseen prompts: 1: " in plain.output
    report = (plain.directory / "report.html").read_text()
    assert "Reward over guidance, unseen prompts" in report
    # Another guidance draws other images; the run's own, 2, is what the first line is about.
    bases = [p["base"] for p in summary["guidance"][:2]]
    assert len({*bases, summary["base"]}) == 3


@pytest.mark.parametrize("which", ["plain", "pipelined"])
def test_learner_and_sampler_agree_in_every_iteration(
    which: str, request: pytest.FixtureRequest
) -> None:
    metrics = request.getfixturevalue(which).metrics
    assert [m["iteration"] for m in metrics] == [0, 1, 2]
    assert all(m["ppo/ratio_error_first_pass"] <= 1e-5 for m in metrics), metrics


def test_staleness_follows_the_config_alone(plain: Finished, pipelined: Finished) -> None:
    assert [m["staleness"] for m in plain.metrics] == [0, 0, 0]
    assert [m["staleness"] for m in pipelined.metrics] == [0, 1, 1]


def _assert_same_training(one: Finished, other: Finished) -> None:
    assert one.samples() == other.samples()
    assert one.adapter() == other.adapter()
    for line, its in zip(one.metrics, other.metrics, strict=True):
        names = [name for name in line if name.startswith(("ppo/", "learner/"))]
        assert len(names) >= 6
        assert {n: line[n] for n in names} == {n: its[n] for n in names}


@pytest.mark.slow
def test_four_learners_give_the_bits_of_one(tmp_path: Path) -> None:
    work = ("prompts.samples_per_prompt=8", "learner.gradient_shards=4", "max_staleness=1")
    one = run(tmp_path / "one", *work)
    four = run(tmp_path / "four", *work, "learner.num_workers=4", "learner.num_cpus=0.1")
    _assert_same_training(one, four)


def test_rollout_and_learner_in_one_actor_give_the_same_bits(
    plain: Finished, tmp_path: Path
) -> None:
    shared = run(tmp_path / "run", "learner.colocated=true", "model.device=cpu")
    assert shared.samples() == plain.samples()
    assert shared.adapter() == plain.adapter()


def test_three_rollout_actors_two_learners_and_a_profile_give_the_bits_of_one_each(
    plain: Finished, tmp_path: Path
) -> None:
    rollouts = ("rollout.num_workers=3", "rollout.num_cpus=0.25")
    learners = ("learner.num_workers=2", "learner.num_cpus=0.25")
    many = run(tmp_path / "run", *rollouts, *learners, "--profile", "1")
    _assert_same_training(plain, many)
    profile = many.directory / "profile"
    assert f"results in {many.directory}\n" in many.output
    assert "\n  profile " in many.output
    for who, operation in (("rollout", "aten::convolution"), ("learner", "ConvolutionBackward0")):
        trace = json.loads(
            gzip.decompress((profile / f"iteration-00001-{who}.json.gz").read_bytes())
        )
        assert any(operation in str(event.get("name")) for event in trace["traceEvents"])
    assert (profile / "ray-timeline.json.gz").is_file()


def test_every_metric_of_a_run_is_in_the_documented_table(plain: Finished) -> None:
    names = {name for line in plain.metrics for name in line} - {"iteration"}
    assert not [name for name in names if describe(name)[0] not in METRICS]


@pytest.mark.parametrize("which", [pytest.param("plain", marks=pytest.mark.slow), "pipelined"])
def test_kill_9_and_resume_give_the_bits_of_no_interruption(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    uninterrupted: Finished = request.getfixturevalue(which)
    overrides = ("max_staleness=1",) if which == "pipelined" else ()
    directory = tmp_path / "run"
    kill_after_checkpoint(directory, 2, *overrides)
    resumed = resume(directory)
    assert resumed.samples() == uninterrupted.samples()
    assert resumed.adapter() == uninterrupted.adapter()
    assert [m["iteration"] for m in resumed.metrics] == [0, 1, 2]


def test_a_logged_sample_can_be_drawn_again_by_the_stock_pipeline(
    plain: Finished, tmp_path: Path
) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    from texforce_ray.artifacts.location import EMBEDDED
    from texforce_ray.model.adapter_files import export_adapter
    from texforce_ray.records.checkpoint import checkpoint_path, load_checkpoint
    from texforce_ray.rewards.jpeg import JpegIncompressibility

    rows = pq.read_table(plain.directory / "samples" / "iteration-00002.parquet").to_pylist()[:4]
    snapshot = load_checkpoint(checkpoint_path(plain.directory, 2)).snapshots[-1]
    assert {row["policy_version"] for row in rows} == {snapshot.version} == {2}
    export_adapter(snapshot, tmp_path / "adapter", "embedded")
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "adapter")
    images = pipe(
        [row["prompt"] for row in rows],
        num_inference_steps=4,
        eta=1.0,
        guidance_scale=2.0,
        generator=[torch.Generator("cpu").manual_seed(row["seed"]) for row in rows],
        output_type="np",
    ).images
    sizes = JpegIncompressibility().score(np.round(images * 255).astype(np.uint8), [], [])
    logged = [row["reward_jpeg_incompressibility"] for row in rows]
    # One level in one pixel changes a file's size by some bytes, another image by hundreds.
    assert np.abs(np.array(sizes) - logged).max() < 0.03


def test_sigterm_leaves_a_checkpoint_and_a_way_to_resume(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    process = start(
        "--config", "configs/smoke.yaml", f"run_dir={directory}", *SMOKE, "iterations=500",
        "checkpoint.every=1000", "eval.every=0",
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (directory / "samples" / "iteration-00002.parquet").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    stopped = finish(process, directory, timeout=60)
    assert stopped.code == 130
    assert f"--resume {directory}" in stopped.output
    assert "Traceback" not in stopped.output
    assert list((directory / "checkpoints").glob("step-*/COMPLETE.json"))


def test_a_differentiable_reward_is_raised_behind_the_same_driver(tmp_path: Path) -> None:
    """ReFL on the U-Net, in a whole run; the reward with weight 0 is only recorded."""
    overrides = (
        "objective.kind=direct",
        "objective.method=refl",
        "lora.text_encoder=null",
        "lora.denoiser.rank=2",
        "rewards=[{name: shapes_scorer}, {name: shapes, weight: 0}]",
    )
    done = run(tmp_path / "run", *overrides)
    metrics = done.metrics
    assert all(np.isfinite(m["direct/reward"]) for m in metrics)
    assert all(m["reward/total_mean"] == m["reward/shapes_scorer_mean"] for m in metrics)
    assert all("reward/shapes_mean" in m and m["learner/grad_norm"] > 0 for m in metrics)
    assert "ppo/ratio" not in metrics[0]
    files = {path.name for path in (done.directory / "adapter").rglob("*.safetensors")}
    assert "pytorch_lora_weights.safetensors" in files
