"""Clusters of several nodes on this machine, started as a user starts them: `ray start`.

Each node is a session of processes of its own. `ray stop` and Ray's own `AutoscalingCluster` would
end every Ray on the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
# A head notices within seconds that a node is gone, not within a quarter of a minute.
NOTICES = {"RAY_health_check_period_ms": "1000"}
STORE = 200_000_000  # bytes of each node's object store


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """Authentication as shipped; no PYTHONPATH: a job must bring the package along."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return env | {"RAY_AUTH_MODE": "token"} | more


@dataclass
class Node:
    """One `ray start --block`."""

    process: subprocess.Popen
    log: Path
    agent_port: int

    def end(self) -> None:
        """Ask it to stop; what is left of it is killed."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=15)
        self.kill()

    def processes(self) -> dict[int, str]:
        """Command lines of its processes; Ray's workers show what they do."""
        return {pid: _command(pid) for pid in _session(self.process.pid)}

    def runs(self, what: str) -> bool:
        """Whether one of its processes has `what` in its command line."""
        return any(what in line for line in self.processes().values())

    def pause(self, name: str) -> Callable[[], None]:
        """Stop the process that has `name` in its command line; returns what resumes it."""
        (pid,) = [pid for pid, line in self.processes().items() if name in line]
        os.kill(pid, signal.SIGSTOP)
        return lambda: os.kill(pid, signal.SIGCONT)

    def kill(self) -> None:
        """At once, all processes of its session, as when a machine loses power."""
        for pid in _session(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=15)


@dataclass
class Rays:
    """A head and the nodes that were added to it."""

    folder: Path
    port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    env: dict[str, str] = field(default_factory=environment)
    nodes: list[Node] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def start_head(self, *options: str, **env: str) -> Node:
        given = ("--head", f"--port={self.port}", "--disable-usage-stats", *options)
        return self._start(given, self.env | NOTICES | env)

    def add_node(self, *options: str, apart: bool = False) -> Node:
        """A node that has joined: two that start at the same time get into each other's way.

        `apart`: it has files of its own, as on another machine; else, nodes share those of jobs,
        and one may remove them before another has entered them.
        """
        if apart:
            self.folders.append(tempfile.mkdtemp(prefix="ray"))  # sockets need a short path
            options = (*options, f"--temp-dir={self.folders[-1]}")
        node = self._start((f"--address={self.address}", *options), self.env)
        self._await(node)
        return node

    def _start(self, options: tuple[str, ...], env: dict[str, str]) -> Node:
        log, agent_port = self.folder / f"node-{len(self.nodes)}.log", free_port()
        with log.open("w") as output:
            process = subprocess.Popen(
                [
                    RAY, "start", "--block", f"--object-store-memory={STORE}",
                    # The usual one may be taken, and without its agent a node starts no jobs.
                    f"--dashboard-agent-listen-port={agent_port}", *options,
                ],
                cwd=self.folder, env=env, start_new_session=True,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        node = Node(process, log, agent_port)
        self.nodes.append(node)
        return node

    def await_head(self) -> None:
        self._await(self.nodes[0])

    def _await(self, node: Node, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while "Ray runtime started" not in (said := node.log.read_text()):
            assert node.process.poll() is None, said
            assert time.monotonic() < deadline, f"it did not start: {said}"
            time.sleep(0.1)

    def await_agent(self, timeout: float = 60) -> None:
        """Until the head takes jobs."""
        deadline = time.monotonic() + timeout
        for port in (self.dashboard_port, self.nodes[0].agent_port):
            while not _listens(port):
                assert time.monotonic() < deadline, f"nothing listens at {port}"
                time.sleep(0.1)

    def ray(self, *arguments: str, check: bool = True) -> str:
        """Output of a `ray` command."""
        done = subprocess.run(
            [RAY, *arguments], cwd=REPO, env=self.env, text=True, check=False, timeout=200,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def close(self) -> None:
        """End all nodes, the head last."""
        for node in reversed(self.nodes):
            node.end()
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def rays(folder: Path) -> Iterator[Rays]:
    cluster = Rays(folder)
    try:
        yield cluster
    finally:
        cluster.close()


def scaling_head(cluster: Rays, head: dict[str, Any], worker: dict[str, Any], most: int) -> Node:
    """A head with an autoscaler that adds up to `most` nodes, which are processes here too.

    They go when they have idled for a few seconds.
    """
    lists = (
        "initialization_commands", "setup_commands", "head_setup_commands", "rsync_filter",
        "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
        "cluster_synced_files", "rsync_exclude",
    )  # fmt: skip
    settings: dict[str, Any] = {
        "cluster_name": "scaling",
        "max_workers": most,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": cluster.address,
            "use_node_id_as_ip": True,  # or all nodes would be one
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
        },
        "available_node_types": {
            "worker": {
                "resources": worker | {"object_store_memory": STORE},
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
            },
            "ray.head.default": {"resources": head, "node_config": {}, "max_workers": 0},
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.05,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
    }
    file = cluster.folder / "autoscaler.json"  # JSON is YAML
    file.write_text(json.dumps(settings))
    cpus = head.get("CPU", 0)
    custom = {k: v for k, v in head.items() if k != "CPU"}
    return cluster.start_head(
        f"--num-cpus={cpus}", f"--resources={json.dumps(custom)}", "--include-dashboard=false",
        f"--autoscaling-config={file}",
        RAY_FAKE_CLUSTER="1", AUTOSCALER_UPDATE_INTERVAL_S="1",
    )  # fmt: skip


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:  # it has ended
        return ""


def _session(leader: int) -> list[int]:
    """Processes of this session, as the fourth field after the name in /proc/PID/stat says."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            if int(path.read_text().rpartition(")")[2].split()[3]) == leader:
                found.append(int(path.parent.name))
    return found
