"""'auto' on a GPU: batches as they will run, and activations that are kept if enough pairs fit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from texforce_ray.config import Config
from texforce_ray.config.io import make_config
from texforce_ray.crew.sizing import find_sizes, needs_sizes
from texforce_ray.errors import ResourceError
from texforce_ray.model.sizing import keeping_if_enough
from texforce_ray.rl import sizing as work


@pytest.mark.parametrize(
    ("kept", "again", "most", "chosen"),
    [
        (16, 64, 1000, (16, False)),
        (4, 32, 1000, (32, True)),
        (4, 32, 4, (4, False)),
        (0, 2, 1000, (2, True)),
    ],
    ids=["enough", "too few", "all there are", "not one"],
)
def test_activations_are_computed_again_if_too_few_pairs_fit_otherwise(
    kept: int, again: int, most: int, chosen: tuple[int, bool]
) -> None:
    def found(recompute: bool) -> int:
        if not (size := again if recompute else kept):
            raise ResourceError("not even one")
        return size

    assert keeping_if_enough(found, most) == chosen


def test_recomputation_is_resolved_like_a_size() -> None:
    config = make_config({"learner": {"gradient_checkpointing": "auto"}})
    assert needs_sizes(config)
    assert find_sizes(config, "learner") == {
        "learner.microbatch_size": config.learner.microbatch_size,
        "learner.gradient_checkpointing": False,
    }
    stored = make_config({"learner": {"gradient_checkpointing": True}})
    assert config.sized_like(stored).learner.gradient_checkpointing is True


@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_sizes_are_measured_as_they_will_run(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """Up to 100 bytes: 10 for a sample, 30 for a pair whose activations are kept, 5 otherwise."""
    loaded, ran = [], []

    def load(config: Config, gpus: float) -> Any:
        loaded.append((config.model.dtype, gpus))
        return SimpleNamespace(device=torch.device("cuda"), eager=nullcontext)

    def update(_: Any, config: Config, reward: Any) -> tuple[Callable[[int], float], int]:
        again = config.learner.gradient_checkpointing is True
        return (lambda n: n * (5 if again else 30)), 64

    def peak(_: torch.device, run: Callable[[], float]) -> float:
        ran.append(run())
        return ran[-1]

    monkeypatch.setattr("texforce_ray.model.backbone.load_config_backbone", load)
    monkeypatch.setattr("texforce_ray.model.sizing.budget", lambda *_: 100)
    monkeypatch.setattr("texforce_ray.model.sizing.peak", peak)
    monkeypatch.setattr(work, "sampling", lambda *_: lambda n: 10 * n)
    monkeypatch.setattr(work, "stored_bytes", lambda *_: 0)
    monkeypatch.setattr(work, "update", update)
    config = make_config(
        {
            "model": {"compile": compiled},
            "objective": {"kind": "nft"},
            "prompts": {"per_iteration": 1, "samples_per_prompt": 9},
            "rollout": {"batch_size": "auto", "num_gpus": 1, "dtype": "bfloat16"},
            "update": {"minibatches": 1},
            "learner": {
                "microbatch_size": "auto", "num_gpus": 1, "gradient_checkpointing": "auto",
            },
        }
    )  # fmt: skip
    assert find_sizes(config, "rollout") == {"rollout.batch_size": 9}
    # Compiled, nine samples run as ten.
    assert max(ran) == (100 if compiled else 90)
    assert find_sizes(config, "learner") == {
        "learner.microbatch_size": 16,
        "learner.gradient_checkpointing": True,
    }
    assert loaded == [("bfloat16", 1), ("float32", 1)]
    # Three pairs are few, but all that were asked for.
    asked = config.changed({"learner.microbatch_size": 3})
    assert find_sizes(asked, "learner")["learner.gradient_checkpointing"] is False
