"""Whole runs of the objectives beside PPO: exact, resumable, and what they store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from benchmarks.one_process import OneProcess
from tests.system.conftest import Finished, finish, kill_after_checkpoint, resume, run, start
from texforce_ray.config.io import load_config
from texforce_ray.records.checkpoint import load_checkpoint

NFT = (
    "objective.kind=nft", "objective.old_rate=0.2", "objective.embedding_anchor_weight=0.1",
    "diffusion.eta=0", "lora.denoiser={rank: 2, alpha: 2}", "eval.every=0", "eval.final_images=4",
)  # fmt: skip
OTHERS = {
    "nft with an average, one version behind": (*NFT, "optimizer.ema_decay=0.9", "max_staleness=1"),
    "awm": ("objective.kind=awm", "objective.anchor_weight=0.003", "diffusion.eta=0"),
    "rwr": ("objective.kind=rwr", "diffusion.eta=0"),
    "raft": ("objective.kind=raft", "objective.best=2", "diffusion.eta=0"),
    "guard": ("objective.level=guard", "objective.clip_range=1e-4"),
    "tempflow": ("objective.level=tempflow",),
    "kl_mask": ("objective.trust=kl_mask", "objective.trust_kl=1e-3"),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return run(tmp_path_factory.mktemp("nft") / "run", *NFT)


def test_nft_killed_and_resumed_with_two_learners_gives_the_same_bits(
    uninterrupted: Finished, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    kill_after_checkpoint(directory, 1, *NFT)
    # Half of the updates by another number of learners.
    resumed = resume(directory, "learner.num_workers=2", "learner.num_cpus=0.25")
    assert_same(resumed, uninterrupted)
    policies = load_checkpoint(directory / "checkpoints" / "step-00003")
    old, trained = policies.snapshots[-1], policies.average
    assert trained is not None
    for part in ("text_encoder", "unet"):
        assert any((trained.adapters[part][k] != v).any() for k, v in old.adapters[part].items())
    files = sorted((directory / "adapter").glob("**/*.safetensors"))
    exported = [tensor for file in files for tensor in load_file(file).values()]
    for key, value in trained.adapters["text_encoder"].items():
        assert any(value.shape == e.shape and (value == e).all() for e in exported), key


def test_nft_stores_one_latent_of_each_sample(uninterrupted: Finished) -> None:
    config = load_config(uninterrupted.directory / "config.yaml", stored=True)
    line = uninterrupted.metrics[0]
    latent = 4 * 4 * 8 * 8  # bytes: the rest is the prompt's tokens, the seed, slots
    stored = line["object_store/trajectory_bytes"] / config.samples_per_iteration
    assert latent < stored < 1.3 * latent
    assert line["forward/trained_pairs"] == 4 * config.samples_per_iteration


def test_a_run_in_one_process_is_the_same_run(uninterrupted: Finished) -> None:
    """What benchmarks/objectives.py compares is what users get."""
    config = load_config(uninterrupted.directory / "config.yaml", stored=True)
    torch.set_num_threads(1)
    process = OneProcess(config)
    rewards = [metrics["reward"] for metrics in process.iterations()]
    assert rewards == [line["reward/total_mean"] for line in uninterrupted.metrics]
    newest = load_checkpoint(uninterrupted.directory / "checkpoints" / "step-00003")
    ours = process.learner.learned()
    assert newest.average is not None
    assert ours.average is not None
    for mine, theirs in ((ours.snapshot, newest.snapshots[-1]), (ours.average, newest.average)):
        for part, tensors in mine.adapters.items():
            for key, value in tensors.items():
                assert (value == theirs.adapters[part][key]).all(), key


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_others_resume_bit_for_bit_too(name: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *OTHERS[name])
    directory = tmp_path / "run"
    kill_after_checkpoint(directory, 1, *OTHERS[name])
    assert_same(resume(directory, "learner.num_workers=2", "learner.num_cpus=0.25"), whole)


def test_a_kind_that_needs_likelihoods_refuses_a_solver_without_noise(tmp_path: Path) -> None:
    process = start("--config", "configs/smoke.yaml", f"run_dir={tmp_path}", "diffusion.eta=0")
    finished = finish(process, tmp_path)
    assert finished.code != 0
    assert "diffusion.eta: 0 samples without noise" in finished.output


def assert_same(one: Finished, other: Finished) -> None:
    assert one.samples() == other.samples()
    ours, theirs = (
        {str(p.relative_to(run.directory)): p.read_bytes() for p in _weights(run)}
        for run in (one, other)
    )
    assert ours
    assert ours == theirs


def _weights(finished: Finished) -> list[Path]:
    """Every file of exported and remembered weights."""
    newest = max((finished.directory / "checkpoints").glob("step-*"))
    folders = (finished.directory / "adapter", newest)
    return sorted(file for folder in folders for file in folder.glob("**/*.safetensors"))
