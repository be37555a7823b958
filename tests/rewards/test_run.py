"""One training run with three rewards at once, two of them in environments of their own."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.system.conftest import finish, start


@pytest.mark.environments
def test_a_run_with_isolated_rewards_records_every_component(tmp_path: Path) -> None:
    prompts, directory = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("a hand\na left hand\n")
    finished = finish(
        start(
            "--config", "configs/smoke.yaml", f"run_dir={directory}", "eval.final_images=0",
            "prompts.train.set=null", f"prompts.train.path={prompts}", "eval.every=0",
            "rewards=[{name: hand, min: 0.05}, {name: 'iqa:piqe', weight: 0.01, "
            "normalize: group}, {name: jpeg_compressibility, weight: 0.1}]",
        ),
        directory,
        timeout=290,
    )  # fmt: skip
    assert finished.code == 0, finished.output
    table = pq.read_table(directory / "samples" / "iteration-00001.parquet")
    hand = table["reward_hand"].to_numpy()
    assert ((hand >= 0) & (hand <= 1)).all()
    assert hand.max() > 0.1
    assert (table["reward_iqa:piqe"].to_numpy() < 0).all()  # lower is better: turned
    assert (table["reward_jpeg_compressibility"].to_numpy() < 0).all()
    for line in finished.metrics:
        assert line["reward/masked"] == 0
        for name in ("hand", "iqa:piqe", "jpeg_compressibility"):
            assert -1 <= line[f"reward/{name}_correlation"] <= 1
            assert line[f"scoring/{name}_latency_p95"] > 0
        assert 0 <= line["reward/hand_gated"] <= 8
