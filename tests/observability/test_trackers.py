"""Trackers get metrics.jsonl's names and the images, continue in a resumed run, never stop one."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from texforce_ray.config import Config, RewardConfig
from texforce_ray.config.io import make_config
from texforce_ray.errors import ConfigError
from texforce_ray.records.metrics import MetricsLog
from texforce_ray.records.tracking import check_trackers, open_trackers

KEY = "0123456789abcdef0123456789abcdef01234567"
GRID = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
VALUES = {"reward/total_mean": 0.5, "ppo/approx_kl": float("nan"), "reward/a (b)_mean": 1.0}
ODD = {"reward/日本_mean": 2.0, "reward/本日_mean": 3.0, "reward/../x_mean": 4.0, "eval//a/.": 5.0}


def _configured(run_dir: Path, **track: Any) -> Config:
    return make_config({"run_dir": str(run_dir), "track": track})


def _report(config: Config, iterations: range, state: str) -> None:
    """What a run does: a grid of version i + 1 comes before the line of iteration i."""
    run_dir = Path(config.run_dir)
    log = MetricsLog(run_dir, resume_from=iterations.start, trackers=open_trackers(config, run_dir))
    for iteration in iterations:
        log.add_image("eval/images", GRID, iteration + 1)
        log.append(iteration, VALUES | {"staleness": iteration})
    log.close(state)  # type: ignore[arg-type]


def _wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run: LevelDB's log format, each a protobuf message."""
    from wandb.proto import wandb_internal_pb2 as pb

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # a block's padding
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield pb.Record.FromString(parts)
            parts = b""


def _wandb_history(run_dir: Path) -> tuple[set[str], list[dict[str, Any]], list[int]]:
    """Run ids, rows, exit codes, of all parts of a run in order."""
    ids, rows, codes = set(), [], []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for record in _wandb_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
            elif kind == "exit":
                codes.append(record.exit.exit_code)
            elif kind == "history":
                items = record.history.item
                rows.append(
                    {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                )
    return ids, rows, codes


def test_wandb_offline_has_all_and_a_resumed_run_continues(tmp_path: Path) -> None:
    config = _configured(tmp_path, wandb={"mode": "offline", "project": "p"})
    _report(config, range(2), "interrupted")
    _report(config, range(2, 3), "finished")
    ids, rows, codes = _wandb_history(tmp_path)
    assert ids == {json.loads((tmp_path / "trackers.json").read_text())["wandb"]}
    lines = [row for row in rows if "staleness" in row]
    assert [(row["iteration"], row["staleness"]) for row in lines] == [(0, 0), (1, 1), (2, 2)]
    assert all(row["reward/total_mean"] == 0.5 for row in lines)
    grids = [row["iteration"] for row in rows if any("eval/images" in key for key in row)]
    assert grids == [1, 2, 3]
    pictures = list(tmp_path.glob("wandb/offline-run-*/files/media/images/eval/*.png"))
    assert len(pictures) == 3
    assert np.array_equal(np.array(Image.open(pictures[0])), GRID)
    assert codes == [1, 0]


def test_mlflow_files_have_all_and_a_resumed_run_continues(tmp_path: Path) -> None:
    config = _configured(tmp_path, mlflow={"experiment": "e"})
    _report(config, range(2), "interrupted")
    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("e").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "KILLED"
    _report(config, range(2, 3), "finished")
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == "0.0003"
    history = client.get_metric_history(run.info.run_id, "staleness")
    assert [(m.step, m.value) for m in history] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert {"reward/total_mean", "ppo/approx_kl", "reward/a _b__mean"} <= set(run.data.metrics)
    images = [f.path for f in client.list_artifacts(run.info.run_id, "images")]
    pictures = [path for path in images if path.endswith(".png")]
    assert len(pictures) == 3
    found = client.download_artifacts(run.info.run_id, pictures[0], str(tmp_path))
    assert np.array_equal(np.array(Image.open(found)), GRID)


def test_labels_that_mlflow_does_not_take_are_kept_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _configured(tmp_path, mlflow={"experiment": "e"})
    with MetricsLog(tmp_path, trackers=open_trackers(config, tmp_path)) as log:
        log.append(0, ODD)
    assert not caplog.records
    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert sorted(run.data.metrics.values()) == sorted(ODD.values())
    assert run.data.metrics["reward/__/x_mean"] == 4.0


def test_no_key_is_found_before_anything_starts_and_none_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        check_trackers(_configured(tmp_path, wandb={}).track)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    check_trackers(_configured(tmp_path, wandb={}).track)
    secret = {"name": "http", "kwargs": {"url": f"http://me:{KEY}@host/", "token": KEY}}
    config = _configured(tmp_path / "run", wandb={"mode": "offline"}, mlflow={})
    rewards = (RewardConfig(**secret),)
    _report(config.model_copy(update={"rewards": rewards}), range(1), "finished")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"texforce-ray\[mlflow\]"):
        check_trackers(_configured(tmp_path, mlflow={}).track)


def test_a_tracker_that_fails_warns_once_and_the_run_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = _configured(tmp_path, mlflow={"uri": "http://127.0.0.1:9"})
    with caplog.at_level(logging.WARNING, "texforce_ray"):
        _report(config, range(3), "finished")
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("texforce_ray")]
    assert warning.startswith("track.mlflow: ")
    assert "127.0.0.1" in warning
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
