"""The sizing calculator: the best division of GPUs, and what it asks of everything else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from texforce_ray.capacity import main
from texforce_ray.cluster.capacity import Costs, measured, plan
from texforce_ray.config.io import make_config, to_yaml
from texforce_ray.errors import TexForceError

COSTS = Costs(
    rollout=2.0,
    learner=1.0,
    rewards={"jpeg": 0.01},
    on_gpu=frozenset(),
    trajectory_bytes=1.6e6,
    image_bytes=7.9e5,
    snapshot_bytes=4.7e6,
)


def test_sampling_twice_as_long_gets_twice_the_gpus() -> None:
    found = plan(COSTS, gpus=12, samples=1024, unit=16, staleness=1)
    assert (found.rollouts, found.learners) == (8, 4)
    assert found.seconds == pytest.approx(1024 * 2.0 / 8)
    assert found.rewards == {"jpeg": 1}


def test_without_overlap_the_phases_add_up() -> None:
    overlapped, serial = (plan(COSTS, 12, 1024, 16, k) for k in (1, 0))
    assert serial.seconds > overlapped.seconds
    assert serial.object_store_bytes < overlapped.object_store_bytes


def test_a_wave_that_is_not_full_takes_as_long() -> None:
    # 3 units on 2 actors: the second wave has one unit and lasts as long as the first.
    found = plan(replace(COSTS, learner=1e-6), gpus=3, samples=48, unit=16, staleness=1)
    assert found.rollouts == 2
    assert found.seconds == pytest.approx(2 * 16 * 2.0)
    assert found.waits_for == "rollout"


def test_rewards_on_gpus_take_their_share() -> None:
    costs = replace(COSTS, rewards={"big": 2.0, "jpeg": 0.5}, on_gpu=frozenset({"big"}))
    found = plan(costs, gpus=20, samples=1024, unit=16, staleness=1)
    assert found.rollouts + found.learners + found.rewards["big"] == 20
    assert abs(found.rewards["big"] - found.rollouts) <= 1
    assert found.rewards["jpeg"] * found.seconds >= 1024 * 0.5  # keeps up on CPUs


def test_one_gpu_is_rejected_with_advice_to_colocate() -> None:
    with pytest.raises(TexForceError, match=r"learner\.colocated=true"):
        plan(COSTS, gpus=1, samples=16, unit=16, staleness=0)


def test_too_few_gpus_for_every_role_are_rejected() -> None:
    costs = replace(COSTS, rewards={"big": 2.0}, on_gpu=frozenset({"big"}))
    with pytest.raises(TexForceError, match=r"--gpus: 2 are too few: .*\(big\) need 3"):
        plan(costs, gpus=2, samples=64, unit=16, staleness=0)


def _run(folder: Path, iterations: int) -> Path:
    config = make_config({"iterations": 9, "learner": {"gradient_shards": 2, "num_workers": 2}})
    (folder / "config.yaml").write_text(to_yaml(config))
    line = {"work/rollout": 256.0, "work/learner": 64.0, "work/reward_shapes": 12.8}
    line |= {"object_store/trajectory_bytes": 128e6, "object_store/image_bytes": 1e6}
    lines = [{"iteration": i, **line} for i in range(iterations)]
    lines[0]["work/rollout"] = 9999.0  # the first is warm-up
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def test_costs_come_from_a_runs_metrics(tmp_path: Path) -> None:
    _, costs = measured(_run(tmp_path, 3))
    assert costs.rollout == pytest.approx(2.0)  # 128 samples
    assert costs.learner == pytest.approx(1.0)  # of one learner; the run had two
    assert costs.rewards == {"shapes": pytest.approx(0.1)}
    assert costs.trajectory_bytes == pytest.approx(1e6)


def test_the_command_prints_a_row_for_each_size(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _run(tmp_path, 3)
    assert main([str(tmp_path), "--gpus", "4", "1000", "--samples", "64000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("| 1000 |")


def test_a_run_of_one_iteration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(_run(tmp_path, 1))]) == 1
    assert "needs two or more iterations" in capsys.readouterr().err
