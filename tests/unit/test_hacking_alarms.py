"""Reward hacking is reported within ten iterations; healthy runs, however noisy, are not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from texforce_ray.config.rewards import RewardConfig
from texforce_ray.observability.alarms import LearningAlarms

SAMPLES = 128
STD = 0.3  # of the samples within an iteration
HELD_OUT = (
    RewardConfig(target="m:Redness"),
    RewardConfig(name="shapes", weight=0),
)
SEEDS = range(20)


def _noisy(values: np.ndarray, seed: int, prompts: float = 0.0) -> np.ndarray:
    """With sampling noise; `prompts`: that of other prompts in each iteration, relative to it."""
    scale = STD / SAMPLES**0.5 * np.hypot(1, prompts)
    return values + np.random.default_rng(seed).normal(0, scale, len(values))


def _lines(trained: Iterable[float], held_out: Iterable[float], **more: Any) -> list[dict]:
    return [
        {
            "iteration": i,
            "reward/total_mean": float(a),
            "reward/total_std": STD,
            "reward/Redness_mean": float(a),
            "reward/Redness_std": STD,
            "reward/shapes_mean": float(b),
            "reward/shapes_std": STD,
        }
        | more
        for i, (a, b) in enumerate(zip(trained, held_out, strict=True))
    ]


def _said(lines: Sequence[dict], rewards: Sequence[RewardConfig] = HELD_OUT) -> list[str]:
    watch = LearningAlarms((), rewards, SAMPLES)
    return [text for line in lines for text in watch.look(line)]


def _learning(count: int) -> np.ndarray:
    """Half of its gain of two standard deviations after eight iterations."""
    return 0.4 + 2 * STD * (1 - 0.5 ** (np.arange(count) / 8))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hacked_run_is_reported_once_within_ten_iterations(seed: int) -> None:
    up = _noisy(np.linspace(0.2, 0.6, 10), seed)
    down = _noisy(np.linspace(0.5, 0.25, 10), seed + 1000)
    found = _said(_lines(up, down) + _lines([0.6] * 30, [0.2] * 30))
    (text,) = [text for text in found if "held out" in text]
    iteration = int(text.split(":")[0].removeprefix("iteration "))
    assert iteration < 10
    window = int(text.split("over the last ")[1].split()[0])
    rows = slice(iteration + 1 - window, iteration + 1)
    third = max(2, window // 3)
    for name, values, verb in (("total", up, "risen"), ("shapes", down, "fallen")):
        first, last = values[rows][:third].mean(), values[rows][-third:].mean()
        assert f"has {verb} from {first:.4g} to {last:.4g}" in text
        assert f"reward/{name}_mean" in text


@pytest.mark.parametrize("prompts", [0.0, 1.0])
@pytest.mark.parametrize("held_out", ["flat", "rises", "falls a little"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_healthy_run_is_left_alone(seed: int, held_out: str, prompts: float) -> None:
    count = 60
    change = {"flat": 0.0, "rises": 0.5, "falls a little": -0.1}[held_out] * STD
    trained = _noisy(_learning(count), seed, prompts)
    other = _noisy(0.5 + change * np.linspace(0, 1, count), seed + 1000, prompts)
    assert _said(_lines(trained, other)) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_both_falling_is_no_hacking(seed: int) -> None:
    falling = _noisy(np.linspace(0.5, 0.2, 20), seed)
    assert not any("held out" in text for text in _said(_lines(falling, falling)))


def test_one_bad_iteration_is_no_trend() -> None:
    trained = _noisy(_learning(20), 0)
    other = _noisy(np.full(20, 0.5), 1)
    other[12] -= STD
    assert _said(_lines(trained, other)) == []


def test_hacking_that_begins_late_or_is_slow_is_noticed_too() -> None:
    """As a rule of thumb: within as many iterations as it takes to be clear."""
    late = _noisy(np.r_[np.linspace(0.2, 0.6, 50), np.linspace(0.6, 1.0, 12)], 0)
    turned = _noisy(np.r_[np.linspace(0.3, 0.5, 50), np.linspace(0.5, 0.2, 12)], 1)
    (text,) = _said(_lines(late, turned))
    assert text.startswith("iteration 5")
    slow = _noisy(np.linspace(0.2, 0.8, 200), 2)
    (text,) = _said(_lines(slow, _noisy(np.linspace(0.5, 0.2, 200), 3)))
    assert "held out" in text


def test_a_recovered_reward_can_be_reported_again() -> None:
    fall, recovered = np.linspace(0.5, 0.2, 10), np.full(6, 0.55)
    held_out = np.r_[fall, recovered, fall]
    trained = np.r_[np.linspace(0.2, 0.6, 10), np.full(6, 0.6), np.linspace(0.6, 1.0, 10)]
    found = [text for text in _said(_lines(trained, held_out)) if "held out" in text]
    assert len(found) == 2


def test_a_resumed_run_does_not_repeat_it() -> None:
    lines = _lines(np.linspace(0.2, 0.6, 20), np.linspace(0.5, 0.2, 20))
    (text,) = _said(lines)
    done = int(text.split(":")[0].removeprefix("iteration ")) + 1
    watch = LearningAlarms(lines[:done], HELD_OUT, SAMPLES)
    assert [text for line in lines[done:] for text in watch.look(line)] == []
    # One that stopped before finds what the whole run found.
    watch = LearningAlarms(lines[: done - 1], HELD_OUT, SAMPLES)
    assert [text for line in lines[done - 1 :] for text in watch.look(line)] == [text]


def test_the_raw_reward_is_watched_where_the_total_is_normalised() -> None:
    rewards = (
        RewardConfig(target="m:Redness", normalize="batch"),
        RewardConfig(name="shapes", weight=0),
    )
    more = {"reward/total_mean": 0.0, "reward/total_std": 1.0}
    lines = _lines(np.linspace(0.2, 0.6, 10), np.linspace(0.5, 0.2, 10), **more)
    (text,) = _said(lines, rewards)
    assert "reward/Redness_mean has risen" in text


def test_trained_rewards_and_gates_are_not_held_out() -> None:
    lines = _lines(np.linspace(0.2, 0.6, 10), np.linspace(0.5, 0.2, 10))
    for other in (
        RewardConfig(name="shapes", weight=0.1),
        RewardConfig(name="shapes", weight=0, min=0.5),
    ):
        assert _said(lines, (HELD_OUT[0], other)) == []


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_constant_or_missing_rewards_say_nothing(value: float) -> None:
    up = np.linspace(0.2, 0.6, 20)
    constant = _lines(up, [value] * 20, **{"reward/shapes_std": 0.0})
    assert _said(constant) == []
    missing = [{k: v for k, v in line.items() if "shapes" not in k} for line in constant]
    assert _said(missing) == []
    assert _said([line | {"reward/total_mean": None} for line in constant]) == []


def _evaluations(name: str, values: Sequence[float | None], base: float) -> list[dict]:
    return [
        {"iteration": i}
        | ({} if value is None else {f"eval/{name}": value, f"eval/base_{name}": base})
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("name", "base", "fine", "grown"),
    [("grid", 0.0, 0.008, 0.03), ("grid", 0.04, 0.08, 0.1), ("high_frequency", 0.02, 0.06, 0.09)],
)
def test_artefacts_that_the_base_model_lacks_are_reported_until_they_are_gone(
    name: str, base: float, fine: float, grown: float
) -> None:
    values = [base, None, fine, grown, None, grown, fine, None, grown]
    found = _said(_evaluations(name, values, base))
    assert [text.partition(":")[0] for text in found] == ["iteration 3", "iteration 8"]
    assert f"eval/{name} is {grown:.3f}, against {base:.3f} of the base model" in found[0]


# ---- recorded runs ---------------------------------------------------------------------------

RECORDED = Path(__file__).parent / "recorded"


def _recorded(name: str) -> list[dict]:
    return [json.loads(line) for line in (RECORDED / f"{name}.jsonl").read_text().splitlines()]


def test_a_real_hacked_run_is_reported_within_ten_iterations() -> None:
    """The run of tests/system/test_hacking.py, which trains on redness alone."""
    rewards = (
        RewardConfig(target="tests.system.rewards:PlainRedness"),
        RewardConfig(name="shapes", weight=0),
    )
    lines = _recorded("hacked")
    watch = LearningAlarms((), rewards, 384)
    found = [text for line in lines for text in watch.look(line)]
    assert len(lines) == 10
    assert len([text for text in found if "reward/shapes_mean, which is held out" in text]) == 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_raises_no_alarm(seed: int) -> None:
    """`configs/shapes.yaml` as shipped, the runs of docs/shapes.md."""
    lines = _recorded(f"demo-{seed}")
    assert len(lines) == 14
    assert sum("eval/grid" in line for line in lines) >= 3
    watch = LearningAlarms((), (RewardConfig(name="shapes"),), 384)
    assert [text for line in lines for text in watch.look(line)] == []
