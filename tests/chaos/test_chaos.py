"""The short drill: runs that are broken on purpose end with the bits of those left alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.drill import KINDS, Nodes, disturbed, nodes, scenarios
from tests.chaos.torture import torture

# Two runs of five faults: actors' with k = 0, the driver's with k = 1.
SHORT = (
    (0, ["rollout killed", "reward killed", "learner killed", "rollout hangs", "node removed"]),
    (
        1,
        [
            "driver killed in a checkpoint",
            "disk full in a samples file",
            "driver terminated",
            "newest checkpoint damaged",
            "learner hangs",
        ],
    ),
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        with nodes() as started:
            yield started


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("k", "kinds"), SHORT, ids=["actors", "driver"])
def test_a_broken_run_ends_with_the_same_bits(
    cluster: Nodes, tmp_path_factory: pytest.TempPathFactory, k: int, kinds: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("chaos")
    faults = disturbed(folder, 0, k, kinds, cluster, random.Random(k))
    log = (folder / "run-0.log").read_text()
    assert [fault.kind for fault in faults if not fault.recovered] == [], log
    assert all(fault.equal for fault in faults), log


def test_a_long_drill_has_every_kind_equally_often() -> None:
    drawn = [kind for _, kinds in scenarios(210, seed=1) for kind in kinds]
    assert len(drawn) == 210
    assert {drawn.count(kind) for kind in KINDS} == {14}
    assert {k for k, _ in scenarios(210, seed=1)} == {0, 1}


def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    outcome = torture(tmp_path, kills=40, seed=0)
    assert outcome.clean, outcome
    assert outcome.torn  # or nothing was tested
