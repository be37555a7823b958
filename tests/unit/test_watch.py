"""Slow failures of learning are reported once, with the metric and the iteration."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from texforce_ray.observability.alarms import LearningAlarms


def _lines(means: Sequence[float], std: float = 0.1) -> list[dict]:
    metrics = {"reward/total_std": std, "advantage/abs_max": float(std > 0)}
    return [{"iteration": i, "reward/total_mean": mean, **metrics} for i, mean in enumerate(means)]


def _said(lines: Sequence[dict]) -> list[str]:
    watch = LearningAlarms()
    return [text for line in lines for text in watch.look(line)]


def test_a_run_that_rises_or_wavers_is_left_alone() -> None:
    assert _said(_lines([0.4, 0.5, 0.45, 0.55, 0.6, 0.52, 0.58, 0.61])) == []


def test_a_collapse_is_reported_once() -> None:
    (text,) = _said(_lines([0.6] * 6 + [0.1] * 6))
    assert text.startswith("iteration 7:")
    assert "reward/total_mean has fallen from 0.600 to 0.400" in text


def test_a_resumed_run_does_not_say_it_again() -> None:
    lines = _lines([0.6] * 6 + [0.1] * 6)
    watch = LearningAlarms(lines[:9])
    assert [text for line in lines[9:] for text in watch.look(line)] == []


def test_equal_scores_teach_nothing() -> None:
    (text,) = _said(_lines([0.0] * 7, std=0.0))
    assert "nothing to learn" in text
    assert text.startswith("iteration 4:")


def test_rewards_of_a_small_scale_do_teach() -> None:
    assert _said(_lines([0.0] * 7, std=1e-8)) == []


def test_images_that_become_alike_are_noticed() -> None:
    values = [0.5, None, 0.45, 0.2, None, 0.19, 0.4, 0.1]
    lines = [
        {"iteration": i, **({} if value is None else {"eval/diversity": value})}
        for i, value in enumerate(values)
    ]
    found = _said(lines)
    assert [text.partition(":")[0] for text in found] == ["iteration 3", "iteration 7"]
    assert "from 0.500 to 0.200" in found[0]


def test_updates_that_were_left_out_are_named() -> None:
    (text,) = _said([{"iteration": 3, "learner/skipped": 2}])
    assert "learner/skipped: 2" in text


def test_lines_without_these_metrics_say_nothing() -> None:
    assert _said([{"iteration": 0}, {}, {"reward/total_mean": None}]) == []


@pytest.mark.parametrize("count", [0, 4])
def test_too_few_iterations_say_nothing(count: int) -> None:
    assert _said(_lines([1.0, 0.0, 0.0, 0.0][:count])) == []


def test_one_image_of_each_prompt_says_nothing_about_diversity() -> None:
    assert _said([{"iteration": i, "eval/diversity": float("nan")} for i in range(3)]) == []
