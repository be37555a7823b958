"""Does it learn? To be run with any change to rl/, diffusion/ or the shipped configs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.conftest import finish, start

# The demo gains .28 in 14 iterations: docs/shapes.md.
HALF_OF_THE_DEMOS_GAIN = 0.14


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_learns_half_of_its_gain_in_half_of_its_time(tmp_path: Path) -> None:
    """Three minutes on two cores."""
    short = ("iterations=7", "eval.every=0", "eval.final_images=128", "eval.unseen=null")
    process = start(
        "--config", "configs/shapes.yaml", f"run_dir={tmp_path / 'run'}", "seed=0", *short,
        "eval.guidance_curve=[]",
    )  # fmt: skip
    summary = finish(process, tmp_path / "run", timeout=1700).summary
    print(
        f"difference {summary['difference']:+.3f} [{summary['low']:+.3f}, {summary['high']:+.3f}]"
    )
    assert summary["difference"] > HALF_OF_THE_DEMOS_GAIN
    assert summary["low"] > 0
