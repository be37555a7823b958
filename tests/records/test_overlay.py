"""Several runs on one page, and what a browser makes of both kinds of page."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from texforce_ray.errors import RunDirectoryError
from texforce_ray.records.images import save_png
from texforce_ray.records.matched import curve_of, matched_reward, shared_reward
from texforce_ray.records.metrics import MetricsLog, read_metrics
from texforce_ray.records.overlay import labels, write_overlay
from texforce_ray.records.report import write_report
from texforce_ray.report import main


def _run(run_dir: Path, gain: float, drift: float) -> Path:
    """Nine iterations, evaluated after every third: reward and drift rise in straight lines."""
    with MetricsLog(run_dir) as log:
        for i in range(9):
            metrics = {"reward/total_mean": 0.4 + gain * i, "samples_per_second": 10.0}
            metrics |= {"reward/jpeg_mean": 2.0, "seconds/total": 3.0, "ppo/approx_kl": 1e-6}
            if i % 3 == 2:
                step = (i + 1) / 9
                metrics |= {"eval/total": 0.4 + 9 * gain * step, "eval/base_total": 0.4}
                metrics |= {"eval/drift": drift * step, "eval/diversity": 0.2}
            log.append(i, metrics)
    (run_dir / "config.yaml").write_text("seed: 0\n")
    for step in (0, 3, 6, 9):
        row = np.full((64, 512, 3), 25 * step, np.uint8)
        save_png(run_dir / "images" / f"row-{step:05d}.png", row)
        save_png(run_dir / "images" / f"step-{step:05d}.png", row)
    return run_dir


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [_run(tmp_path / "text", 0.02, 0.1), _run(tmp_path / "unet", 0.04, 0.4)]


def test_drift_is_read_where_both_reached_the_same_reward(runs: list[Path]) -> None:
    text, unet = (curve_of(run.name, read_metrics(run)) for run in runs)
    assert text.iterations == (0, 3, 6, 9)
    reward = matched_reward([text, unet])
    assert reward == pytest.approx(0.58)
    assert text.drift_at(reward or 0) == pytest.approx(0.1)
    # Half of the U-Net's way, between its evaluations after 3 and 6 iterations.
    assert unet.drift_at(reward or 0) == pytest.approx(0.2)
    assert text.drift_at(0.7) is None


def test_no_reward_is_matched_with_a_run_that_did_not_rise(tmp_path: Path) -> None:
    flat = _run(tmp_path / "flat", 0.0, 0.1)
    curves = [curve_of("a", read_metrics(flat)), curve_of("b", [])]
    assert matched_reward(curves) is None
    assert matched_reward(curves[:1]) is None


def test_runs_are_compared_on_one_page(runs: list[Path], tmp_path: Path) -> None:
    text = write_overlay(runs, tmp_path / "comparison.html").read_text()
    assert "At matched reward (total 0.58)" in text
    assert "unet, after 6" in text  # its first evaluation at or above it
    assert text.count("<polyline") >= 2 * 8
    assert "base model" in text
    assert "reward/jpeg_mean" in text
    assert str(tmp_path) not in text, "the page names no folder of this machine"
    assert "<script" not in text
    assert 'href="unet/' not in text.replace('href="unet/report.html"', "")


def test_totals_of_different_rewards_are_not_compared() -> None:
    plain = [{"iteration": 2, "eval/total": 0.4, "eval/shapes": 0.4, "eval/drift": 0.1}]
    other = [{"iteration": 2, "eval/total": 9.0, "eval/shapes": 0.5, "eval/net": 9.0}]
    other[0] |= {"eval/base_total": 1.0, "eval/drift": 0.2}
    assert shared_reward([plain, plain]) == "total"
    assert shared_reward([plain, other]) == "shapes"
    assert shared_reward([plain, [{"eval/jpeg": 2.0}]]) is None
    assert curve_of("other", other, "shapes").reward == (0.5,)
    assert curve_of("other", other).reward == (1.0, 9.0)


def test_labels_are_as_short_as_they_can_be() -> None:
    assert labels([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert labels([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    with pytest.raises(RunDirectoryError, match="given twice"):
        labels([Path("/a/x"), Path("/a/x")])


def test_command(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([str(run) for run in runs]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert main([str(runs[0]), "--out", str(tmp_path / "one.html")]) == 0
    assert (tmp_path / "one.html").is_file()
    assert main([str(tmp_path / "nothing")]) == 1
    assert "is not a run" in capsys.readouterr().err


_PROBE = """<script>
const broken = [...document.images].filter(i => !i.complete || !i.naturalWidth).length;
const flat = [...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height < 50);
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.body.innerHTML = "PROBE" + JSON.stringify({images: document.images.length, broken,
  charts: document.querySelectorAll("svg").length, flat: flat.length, wide}) + "END";
</script>"""  # noqa: E501


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("kind", ["one", "several"])
def test_in_a_browser(runs: list[Path], tmp_path: Path, kind: str, width: int) -> None:
    """Every image is decoded, every chart has a size, nothing makes the page scroll sideways."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    page = tmp_path / "page.html"
    if kind == "one":
        write_report(runs[0], page)
    else:
        write_overlay(runs, page)
    page.write_text(page.read_text().replace("</body>", _PROBE + "</body>"))
    found = _probe(browser, page, width, tmp_path / "profile")
    assert found["images"] >= 4
    assert found["charts"] >= 5
    assert (found["broken"], found["flat"]) == (0, 0)
    assert found["wide"] <= 0


def _probe(browser: str, page: Path, width: int, profile: Path) -> dict[str, Any]:
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    done = subprocess.run(
        [
            browser, *flags.split(), "--disable-component-update", "--disable-sync",
            f"--user-data-dir={profile}", f"--window-size={width},900", "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True, text=True, check=False, timeout=120, env=os.environ | {"HOME": "/tmp"},
    )  # fmt: skip
    assert "PROBE" in done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout.partition("PROBE")[2].partition("END")[0])
