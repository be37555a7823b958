"""A run whose rollouts do not sample with the published policy stops and names the actor."""

from __future__ import annotations

from pathlib import Path

import pytest

from texforce_ray.actors.roles import Roles
from texforce_ray.actors.rollout import RolloutActor
from texforce_ray.artifacts.snapshot import PolicySnapshot
from texforce_ray.config.io import load_config
from texforce_ray.driver.training import train
from texforce_ray.errors import EffectError


@pytest.mark.slow  # tests/unit/test_effect.py breaks the same actors without a cluster
def test_adapters_that_never_reach_the_rollouts_end_the_run(tmp_path: Path) -> None:
    class Deaf(RolloutActor):
        """Keeps the first policy that it is given."""

        def _load(self, snapshot: PolicySnapshot) -> None:
            if self._adapter is None:
                super()._load(snapshot)

    overrides = ["iterations=3", "eval.every=0", f"run_dir={tmp_path / 'run'}"]
    config = load_config("configs/smoke.yaml", overrides)
    with pytest.raises(EffectError, match=r"rollout actor \(cpu, pid \d+ .*version 1: its weights"):
        train(config, roles=Roles(rollout=Deaf))
    # The iteration that was done is kept.
    assert (tmp_path / "run" / "checkpoints" / "step-00001" / "COMPLETE.json").is_file()
