"""Ranking by a model behind a real endpoint: orders are undone, bad answers are counted."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.rewards.services import service
from texforce_ray.judge import main, parse_ranking
from texforce_ray.records.images import save_png
from texforce_ray.rewards.images import from_png


def _brightness(request: dict[str, Any]) -> tuple[list[float], str]:
    """Of each image of a question in the order shown, and the question."""
    text, *images = request["messages"][0]["content"]
    urls = [image["image_url"]["url"] for image in images]
    pixels = [from_png(url.removeprefix("data:image/png;base64,")) for url in urls]
    assert base64.b64decode(urls[0].partition(",")[2])
    return [float(p.mean()) for p in pixels], text["text"]


def _reply(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}], "usage": {}}


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """Four images of three policies; the higher the number, the brighter."""
    for level, name in enumerate(("base", "text", "unet")):
        for index in range(4):
            image = np.full((32, 32, 3), 60 * level + 5 * index, np.uint8)
            save_png(tmp_path / "images" / name / f"{index:05d}.png", image)
    prompts = ["a green circle", "two {braces}", "c", "d"]
    (tmp_path / "images" / "prompts.json").write_text(json.dumps(prompts))
    return tmp_path


def test_shuffled_images_are_ranked_as_they_deserve(evaluation: Path) -> None:
    orders = set()

    def answer(request: dict[str, Any], number: int) -> tuple[int, Any]:
        bright, question = _brightness(request)
        assert "image 1 to image 3" in question
        orders.add(tuple(np.argsort(bright)))
        best_first = np.argsort(bright)[::-1]
        if "how well it shows" in question:  # coherence: the other way round
            best_first = best_first[::-1]
        ranking = [int(i) + 1 for i in best_first]
        return 200, _reply(f"Of course. ```json\n{json.dumps({'ranking': ranking})}\n```")

    with service(answer) as url:
        assert main([str(evaluation), "--url", url, "--model", "m"]) == 0
    assert len(orders) > 3, "the order of the images should change"
    summary = json.loads((evaluation / "judge.json").read_text())
    assert summary["answers"] == 2 * 4 * 3
    assert summary["unusable"] == 0
    looks, coherence = summary["aesthetics"], summary["coherence"]
    assert [looks[name]["mean_rank"] for name in ("base", "text", "unet")] == [3, 2, 1]
    assert looks["unet"]["first"] == looks["text"]["better_than_base"] == 1
    assert [coherence[name]["mean_rank"] for name in ("base", "text", "unet")] == [1, 2, 3]


def test_answers_that_are_no_ranking_are_counted_and_left_out(evaluation: Path) -> None:
    def answer(request: dict[str, Any], number: int) -> tuple[int, Any]:
        _, question = _brightness(request)
        return 200, _reply("I cannot" if "two {braces}" in question else '{"ranking": [1, 2, 3]}')

    with service(answer) as url:
        assert main([str(evaluation), "--url", url, "--model", "m", "--rounds", "2"]) == 0
    summary = json.loads((evaluation / "judge.json").read_text())
    assert (summary["answers"], summary["unusable"]) == (16, 4)


@pytest.mark.parametrize(
    ("text", "ranking"),
    [
        ('{"ranking": [2, 1, 3]}', [1, 0, 2]),
        ("[3,1,2] is my answer", [2, 0, 1]),
        ("image [1] and [2]; [1, 2, 3]", [0, 1, 2]),
        ("[1, 1, 2]", None),
        ("[1, 2]", None),
        ("[0, 1, 2]", None),
        ("none", None),
        ("[1, 2, 3], no: [3, 2, 1]", None),
        ("[1, 2, 3]. Again: [1, 2, 3]", [0, 1, 2]),
        ("[[2, 1, 3]]", None),
        ('{"ranking": [[2, 1, 3]]}', None),
        ('{"ranking": [1, 2, 3], "worst": [3, 2, 1]}', [0, 1, 2]),
        ('{"a": {"ranking": [1, 2, 3]}}', None),
        ('{"ranking": [2, 3, true]}', None),
        ('{"best": [3, 1, 2]}', [2, 0, 1]),
    ],
)
def test_rankings_in_answers(text: str, ranking: list[int] | None) -> None:
    assert parse_ranking(text, 3) == ranking


def test_what_cannot_be_judged_is_refused(
    evaluation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = ["--url", "http://127.0.0.1:9/v1", "--model", "m"]
    assert main([str(tmp_path / "nothing"), *nowhere]) == 1
    assert "--save-images" in capsys.readouterr().err
    (evaluation / "images" / "text" / "00002.png").unlink()
    assert main([str(evaluation), *nowhere]) == 1
    assert "00002.png" in capsys.readouterr().err
    assert main([str(evaluation), *nowhere, "--images", "1", "--max-requests", "0"]) == 1
    assert "max_requests" in capsys.readouterr().err
