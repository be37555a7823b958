"""Whole runs off the beaten track: long prompts, full disks, notebooks, signals at odd times."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.system.conftest import REPO, finish, resume, start
from tests.system.test_bad_input import fails

LONG = "a red circle and " + "a very long story about it and " * 40


def _wait_for(path: Path, process: subprocess.Popen, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def test_long_prompts_other_modes_and_a_signal_in_the_final_evaluation(tmp_path: Path) -> None:
    """One run through the less common settings, stopped in its last phase and resumed."""
    prompts, held_out, directory = tmp_path / "p.txt", tmp_path / "e.txt", tmp_path / "run"
    prompts.write_text(f"a green circle\n{LONG}\n")
    held_out.write_text(f"a blue square\n{LONG} again\n")
    process = start(
        "--config", "configs/smoke.yaml", f"run_dir={directory}",
        "prompts.train.set=null", f"prompts.train.path={prompts}",
        f"eval.prompts.path={held_out}", "eval.final_images=400", "eval.every=0",
        "advantage.mode=prompt", "objective.kl_weight=0.01", "optimizer.ema_decay=0.9",
        "checkpoint.every=100", "rewards=[{name: jpeg_compressibility}]",
    )  # fmt: skip
    # The last iteration's checkpoint is written before the comparison begins.
    _wait_for(directory / "checkpoints" / "step-00002" / "COMPLETE.json", process)
    assert "being written by another run" in fails("--resume", str(directory), directory=directory)
    os.kill(process.pid, signal.SIGTERM)
    stopped = finish(process, directory, timeout=60)
    assert stopped.code == 130, stopped.output
    assert "2 of 4 prompts are longer than the text encoder's limit" in stopped.output
    assert [m["prompts/truncated"] for m in stopped.metrics] == [2, 2]
    assert all(m["ppo/kl_base"] >= 0 for m in stopped.metrics)
    assert not (directory / "adapter").exists()

    old = prompts.read_text()
    prompts.write_text("a green circle\na red square\n")
    assert "prompts" in fails("--resume", str(directory), directory=directory)
    prompts.write_text(old)
    written = (directory / "metrics.jsonl").read_bytes()
    config = (directory / "config.yaml").read_text()
    (directory / "config.yaml").write_text(config.replace("final_images: 400", "final_images: 8"))
    done = resume(directory)
    assert done.summary["images"] == 8
    assert (directory / "metrics.jsonl").read_bytes() == written
    assert (directory / "adapter" / "adapter_model.safetensors").exists()
    assert "separate evaluation prompts" in (directory / "adapter" / "README.md").read_text()


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_keeps_what_was_written(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        directory = disk / "run"
        error = fails(
            "--config", "configs/smoke.yaml", f"run_dir={directory}", "iterations=200",
            "checkpoint.keep_last=100", "eval.every=0", directory=directory, timeout=200,
        )  # fmt: skip
        assert "No space left on device" in error
        assert str(directory) in error
        assert "resume" in error
        for line in (directory / "metrics.jsonl").read_text().splitlines():
            json.loads(line)
        subprocess.run(["mount", "-o", "remount,size=60m", str(disk)], check=True)
        config = (directory / "config.yaml").read_text()
        iterations = len((directory / "metrics.jsonl").read_text().splitlines())
        assert iterations > 1
        (directory / "config.yaml").write_text(
            config.replace("iterations: 200", f"iterations: {iterations + 1}")
        )
        resumed = resume(directory)
        assert [m["iteration"] for m in resumed.metrics] == list(range(iterations + 1))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


NOTEBOOK = """
import asyncio, signal, sys
from texforce_ray import train
from texforce_ray.config.io import load_config
from texforce_ray.errors import Interrupted

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
config = load_config("configs/smoke.yaml", ["run_dir=" + sys.argv[1], *sys.argv[2:]])

async def cell():  # as Jupyter runs one: in a loop that is already running
    try:
        print("finished", train(config).iterations)
    except Interrupted as stop:
        print("interrupted:", stop)

asyncio.new_event_loop().run_until_complete(cell())
"""


@pytest.mark.slow
def test_train_in_a_notebook_and_its_stop_button(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", NOTEBOOK, str(directory), "iterations=300", "eval.every=0"],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _wait_for(directory / "samples" / "iteration-00001.parquet", process)
    os.kill(process.pid, signal.SIGINT)
    stopped = finish(process, directory, timeout=60)
    assert "interrupted: stopped after" in stopped.output, stopped.output
    assert list((directory / "checkpoints").glob("step-*/COMPLETE.json"))
