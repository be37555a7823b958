"""Batch sizes from memory, shared attention, counted FLOPs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
import torch

from texforce_ray.actors.sizing import find_sizes, with_sizes
from texforce_ray.config_io import make_config
from texforce_ray.errors import ConfigError, ResourceError
from texforce_ray.model import flops
from texforce_ray.model.attention import group_rows
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.sizing import batch_candidates, largest_that_fits

Load = Callable[[], Backbone]
SAMPLES = {"per_iteration": 3, "samples_per_prompt": 8}


@pytest.mark.parametrize(
    ("budget", "expected"), [(100, 1), (109, 1), (110, 2), (219, 12), (330, 24), (1e9, 24)]
)
def test_the_largest_batch_that_memory_holds_is_chosen(budget: float, expected: int) -> None:
    candidates = [1, 2, 3, 4, 6, 8, 12, 24]
    assert largest_that_fits(lambda size: 90.0 + 10 * size, candidates, budget) == expected


def test_a_guess_that_does_not_hold_is_not_taken() -> None:
    # A step in the memory curve, as algorithms with a larger workspace make it.
    peak = lambda size: float("inf") if size > 6 else 10.0 * size  # noqa: E731
    assert largest_that_fits(peak, [1, 2, 3, 4, 6, 8, 12, 24], 1000) == 6


def test_no_room_for_one_sample_says_what_helps() -> None:
    with pytest.raises(ResourceError, match=r"model\.dtype=float16"):
        largest_that_fits(lambda size: 2.0**34 * size, [1, 2], 2.0**33)


def test_sizes_left_to_memory_are_found_and_stored() -> None:
    config = make_config(
        {
            "prompts": SAMPLES,
            "rollout": {"batch_size": "auto"},
            "learner": {"microbatch_size": "auto"},
        }
    )
    assert batch_candidates(config) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert find_sizes(config) == (24, 64)
    known = make_config({"prompts": SAMPLES, "rollout": {"batch_size": 8}})
    assert asyncio.run(with_sizes(known)) is known
    assert config.sized_like(known).rollout.batch_size == 8
    assert config.sized_like(known).learner.microbatch_size == known.learner.microbatch_size


def test_a_size_that_is_no_divisor_is_still_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.batch_size: 5 does not divide"):
        make_config({"prompts": SAMPLES, "rollout": {"batch_size": 5}})


@pytest.mark.parametrize(
    ("rows", "groups"),
    [
        ([0, 0, 0, 0, 1, 1, 1, 1], [0, 1]),
        ([0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 2]),
        ([0, 0, 0, 1], [0, 0, 0, 1]),
        ([3], [3]),
        ([2, 2, 2], [2]),
    ],
)
def test_rows_that_share_a_prompt_become_one_group(rows: list[int], groups: list[int]) -> None:
    found = group_rows(np.array(rows))
    assert found.tolist() == groups
    assert np.repeat(found, len(rows) // len(found)).tolist() == rows


@pytest.mark.parametrize("rows", [[0, 0, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]])
def test_prepared_prompts_give_the_plain_output(tiny_backbone: Load, rows: list[int]) -> None:
    backbone = tiny_backbone()
    conditioning = backbone.encode(backbone.tokenize(["a green circle", "two red squares"]).ids)
    x = torch.randn(4, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([1, 300, 600, 999])
    with torch.no_grad():
        plain = backbone.predict(x, timesteps, conditioning[torch.tensor(rows)])
        shared = backbone.predict_prepared(
            x, timesteps, backbone.prepare(conditioning), np.array(rows)
        )
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)


def test_flops_are_counted_for_every_pass(tiny_backbone: Load) -> None:
    backbone = tiny_backbone()
    one, two = (flops.sample_flops(backbone, steps, 1.0) for steps in (1, 2))
    unet = two - one
    assert 0 < unet < two
    assert flops.sample_flops(backbone, 2, 3.0) == two + 2 * unet
    # Back through the U-Net to the prompt: between half of and as much as the way there, twice.
    forward = flops.pair_flops(backbone, 1.0)
    assert 1.3 * unet < forward < 3 * unet
    assert flops.pair_flops(backbone, 3.0) == 2 * forward


def test_attention_on_a_cpu_counts() -> None:
    q, k = torch.randn(2, 4, 64, 16), torch.randn(2, 4, 77, 16)
    found = flops.count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k))
    assert found == 2 * 2 * 2 * 4 * 64 * 77 * 16
    assert flops.matmul_peak(torch.device("cpu"), torch.float32) > 1e8
