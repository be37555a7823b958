"""Requests what a run needs from the cluster's autoscaler, and withdraws the request."""

from __future__ import annotations

import json
import logging
import time
from typing import Literal

import ray
from ray.autoscaler.sdk import request_resources
from ray.experimental.internal_kv import _internal_kv_get

from texforce_ray.cluster.requests import actor_requests
from texforce_ray.config import Config

log = logging.getLogger(__name__)

_STALE_S = 120.0  # an autoscaler reports every few seconds


class Autoscaler:
    """The run's request to the autoscaler, if one is running.

    It is needed only until the actors are submitted: from then on they hold their nodes, and those
    that wait for a node are themselves a demand, which ends with the job however it ends. A request
    outlives its job, so it is withdrawn as soon as the actors are there: a driver that is killed
    later leaves no idle nodes behind. A cluster has one such request at a time: this one replaces
    that of a concurrent job.
    """

    def __init__(self, config: Config, *, learner: bool = True) -> None:
        self._wanted = config.ray.autoscale
        self._asked = [r for r in actor_requests(config, learner=learner, whole=True) if r.count]
        self._open = False

    def __str__(self) -> str:
        return "; ".join(map(str, self._asked))

    def ask(self) -> bool:
        """Send the request if an autoscaler is running; returns whether one is."""
        if not _scales(self._wanted):
            return False
        bundles = [
            {name: amount for name, amount in request.resources.items() if amount}
            for request in self._asked
            for _ in range(request.count)
        ]
        # Set before the call: if it fails half-way, the request must be withdrawn too.
        self._open = True
        request_resources(bundles=[bundle for bundle in bundles if bundle])
        return True

    def withdraw(self) -> None:
        """Withdraw the request; harmless if there is none. Nodes leave after their idle time."""
        if not self._open:
            return
        self._open = False
        try:
            request_resources(bundles=[])
        except Exception as error:  # the cluster may be gone; do not hide the first error
            log.warning("%s; nodes for this run may stay until another run requests some", error)


def patience(config: Config) -> float:
    """Seconds to wait for room for a task that is submitted without an `Autoscaler`."""
    scales = _scales(config.ray.autoscale)
    return config.ray.autoscale_timeout_s if scales else config.ray.resource_timeout_s


def _scales(setting: Literal["auto"] | bool) -> bool:
    return at_work() if setting == "auto" else setting


def at_work() -> bool:
    """Whether the cluster adds nodes by itself.

    A head without an autoscaler runs the same process, which then only reports. The node types
    tell them apart: without an autoscaler, each node is reported with a type named after it.
    """
    if _version_2():
        # Nodes that an autoscaler of this version can manage are labelled with their group.
        return any("ray.io/node-group" in (node.get("Labels") or {}) for node in ray.nodes())
    status = json.loads(_internal_kv_get("__autoscaling_status") or b"{}")
    types = (status.get("autoscaler_report") or {}).get("node_type_mapping") or {}
    recent = time.time() - status.get("time", 0.0) < _STALE_S
    return recent and any(kind != f"node_{node}" for node, kind in types.items())


def _version_2() -> bool:
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return bool(is_autoscaler_v2())
