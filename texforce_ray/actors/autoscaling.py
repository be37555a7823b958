"""Asks the cluster's autoscaler for what a run needs, and gives it back."""

from __future__ import annotations

import json
import logging
import time
from typing import Literal

import ray
from ray.autoscaler.sdk import request_resources
from ray.experimental.internal_kv import _internal_kv_get

from texforce_ray.actors.fit import requests
from texforce_ray.config import Config

log = logging.getLogger(__name__)

_STALE_S = 120.0  # an autoscaler reports every few seconds


class Autoscaler:
    """The run's request to the autoscaler, where one is at work.

    It is needed from before there are actors until they are submitted: from then on they hold their
    nodes, and those that wait for a node are a demand of their own, which ends with the job however
    it ends. A request outlives its job, so it is given back as soon as the actors are there: a
    driver that is killed later leaves no nodes behind that idle for ever. A cluster has one such
    request at a time: that of a job beside this one is replaced.
    """

    def __init__(self, config: Config, *, learner: bool = True) -> None:
        self._wanted = config.ray.autoscale
        self._asked = [r for r in requests(config, learner=learner, whole=True) if r.count]
        self._open = False

    def __str__(self) -> str:
        return "; ".join(map(str, self._asked))

    def ask(self) -> bool:
        """Ask, if an autoscaler is at work; whether one is."""
        if not _scales(self._wanted):
            return False
        bundles = [
            {name: amount for name, amount in request.resources.items() if amount}
            for request in self._asked
            for _ in range(request.count)
        ]
        # From now on: if the call fails half-way, it must be taken back too.
        self._open = True
        request_resources(bundles=[bundle for bundle in bundles if bundle])
        return True

    def give_back(self) -> None:
        """Take the request back; harmless if there is none. Nodes go after their idle time."""
        if not self._open:
            return
        self._open = False
        try:
            request_resources(bundles=[])
        except Exception as error:  # the cluster may be gone; that must not hide why
            log.warning("%s; nodes may stay for this run until another one asks for some", error)


def patience(config: Config) -> float:
    """Seconds to wait for room for what is asked of the cluster without an `Autoscaler`."""
    scales = _scales(config.ray.autoscale)
    return config.ray.autoscale_timeout_s if scales else config.ray.resource_timeout_s


def _scales(setting: Literal["auto"] | bool) -> bool:
    return at_work() if setting == "auto" else setting


def at_work() -> bool:
    """Whether the cluster adds nodes by itself.

    A head without autoscaler runs the same process, which then only reports. It is told apart by
    the types of nodes: a report without autoscaler makes one up for each, named after the node.
    """
    if _version_2():
        # Nodes that an autoscaler of this version may manage are labelled with their group.
        return any("ray.io/node-group" in (node.get("Labels") or {}) for node in ray.nodes())
    status = json.loads(_internal_kv_get("__autoscaling_status") or b"{}")
    types = (status.get("autoscaler_report") or {}).get("node_type_mapping") or {}
    recent = time.time() - status.get("time", 0.0) < _STALE_S
    return recent and any(kind != f"node_{node}" for node, kind in types.items())


def _version_2() -> bool:
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return bool(is_autoscaler_v2())
