"""A Ray cluster to be broken: several raylets on this machine, and which processes are its own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

# A machine's first start of Ray reads hundreds of MB from the disk, and Ray waits 30 s for it.
STARTS = 3
HEAD_LOST_S = 8  # how long processes look for a head that is gone
MEMORY_FOR_A_FAULT = 4 * 2**30


class Nodes:
    """A head, where rewards and drivers live, and a second node for rollouts and learner.

    What the second node's actors made lies there, and goes with it.
    """

    def __init__(self, memory_faults: bool) -> None:
        self.memory_faults = memory_faults
        # Read by every process of Ray that is started from here.
        os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = str(HEAD_LOST_S)  # noqa: SIM112
        self._begin()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def replace(self, pause: float) -> None:
        """Take the second node away without grace; another one comes `pause` seconds later."""
        self.cluster.remove_node(self.other, allow_graceful=False)
        time.sleep(pause)
        self.other = self._add()

    def restart_head(self) -> None:
        """Everything that Ray runs dies; a new cluster, at another address, takes its place."""
        self.close()
        self._begin()

    def close(self) -> None:
        self.cluster.shutdown()

    def processes(self, title: str) -> list[psutil.Process]:
        """Actors of this cluster, oldest first. Others on this machine are not ours to break."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                name = " ".join(process.cmdline())
                if name.startswith(title) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda p: p.pid)

    def _begin(self) -> None:
        from ray.cluster_utils import Cluster

        memory, threshold = psutil.virtual_memory(), 0.95
        if self.memory_faults:
            used = memory.total - memory.available
            threshold = min(threshold, (used + MEMORY_FOR_A_FAULT) / memory.total)
        head = {
            "num_cpus": 2,
            "object_store_memory": 200_000_000,
            "include_dashboard": False,
            "_system_config": {
                "memory_usage_threshold": threshold,
                "memory_monitor_refresh_ms": 250,
                "health_check_failure_threshold": 3,
                "health_check_period_ms": 1000,
            },
        }
        for attempt in range(1, STARTS + 1):
            try:
                self.cluster = Cluster(initialize_head=True, head_node_args=head)
                break
            except RuntimeError:
                if attempt == STARTS:
                    raise
        self.other = self._add()

    def _add(self) -> Any:
        return self.cluster.add_node(
            num_cpus=1, resources={"rollout": 2, "learner": 1}, object_store_memory=200_000_000
        )


@contextmanager
def nodes(*, memory_faults: bool) -> Iterator[Nodes]:
    """`memory_faults`: Ray kills a process that takes the machine some GB above its present use."""
    found = Nodes(memory_faults)
    try:
        yield found
    finally:
        found.close()
