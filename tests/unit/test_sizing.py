"""Batch sizes from memory, shared attention, counted FLOPs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from texforce_ray.cluster.placement import actor_options
from texforce_ray.config import Config
from texforce_ray.config.io import make_config
from texforce_ray.crew import sizing as actors_sizing
from texforce_ray.crew.sizing import find_sizes, with_sizes
from texforce_ray.errors import ConfigError, ResourceError
from texforce_ray.model import flops
from texforce_ray.model.attention import group_rows
from texforce_ray.model.backbone import Backbone, load_backbone
from texforce_ray.model.sizing import (
    batch_candidates,
    largest_that_fits,
    microbatch_candidates,
)
from texforce_ray.rl import sizing as work

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
    assert find_sizes(config, "rollout") == {"rollout.batch_size": 24}
    assert find_sizes(config, "learner") == {
        "learner.microbatch_size": 64,
        "learner.gradient_checkpointing": False,
    }
    known = make_config({"prompts": SAMPLES, "rollout": {"batch_size": 8}})
    assert asyncio.run(with_sizes(known)) == known
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


def test_recomputation_is_no_work_that_counts(tiny_backbone: Load) -> None:
    backbone = tiny_backbone()
    kept = flops.pair_flops(backbone, 1.0)
    backbone.denoiser.enable_gradient_checkpointing()
    assert flops.pair_flops(backbone, 1.0) == kept
    assert backbone.denoiser.is_gradient_checkpointing


def test_attention_on_a_cpu_counts() -> None:
    q, k = torch.randn(2, 4, 64, 16), torch.randn(2, 4, 77, 16)
    found = flops.count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k))
    assert found == 2 * 2 * 2 * 4 * 64 * 77 * 16
    assert flops.matmul_peak(torch.device("cpu"), torch.float32) > 1e8


def test_memory_of_a_gpu_grows_in_segments_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    given = actor_options({"CPU": 1, "GPU": 0.5})["runtime_env"]["env_vars"]
    assert given == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert not set(names) & actor_options({"CPU": 1})["runtime_env"]["env_vars"].keys()
    for name in names:
        with monkeypatch.context() as user:
            user.setenv(name, "max_split_size_mb:128")
            assert actor_options({"GPU": 1})["runtime_env"]["env_vars"] == {}


class _Ray:
    """In Ray's place: notes what is asked for; its tasks never end."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.cancelled: list[Any] = []

    def remote(self, function: Any) -> _Ray:
        return self

    def options(self, **options: Any) -> Any:
        self.asked.append(options)
        return SimpleNamespace(remote=lambda *_: SimpleNamespace(future=Future))

    def cancel(self, task: Any, *, force: bool) -> None:
        assert force
        self.cancelled.append(task)


def _auto(**sections: Any) -> Config:
    return make_config(
        {"prompts": {"per_iteration": 4, "samples_per_prompt": 8}}
        | {"ray": {"start_timeout_s": 0.1, "resource_timeout_s": 0.1}}
        | sections
    )


@pytest.mark.parametrize(
    ("sections", "key", "gpus"),
    [
        ({"rollout": {"batch_size": "auto", "num_gpus": 0.5}}, "rollout.batch_size", 0.5),
        ({"learner": {"microbatch_size": "auto", "num_gpus": 0.25}}, "microbatch_size", 0.25),
        (
            {
                "rollout": {"num_gpus": 1},
                "learner": {"microbatch_size": "auto", "colocated": True},
            },
            "learner.microbatch_size",
            1,
        ),
    ],
    ids=["rollout", "learner", "colocated"],
)
def test_a_measurement_without_an_answer_is_cancelled_and_explained(
    monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], key: str, gpus: float
) -> None:
    fake = _Ray()
    monkeypatch.setattr(actors_sizing, "ray", fake)
    monkeypatch.setattr(actors_sizing, "patience", lambda config: config.ray.resource_timeout_s)
    monkeypatch.setattr(actors_sizing, "free_nodes", lambda: [{"CPU": 4.0, "GPU": 0.1}])
    with pytest.raises(ResourceError, match=rf"{key}: 'auto' was not found.*no room.*GPU"):
        asyncio.run(with_sizes(_auto(**sections)))
    assert [asked["num_gpus"] for asked in fake.asked] == [gpus]
    assert len(fake.cancelled) == 1


TINY = {
    "diffusion": {"steps": 4, "guidance_scale": 2.0},
    "prompts": {"per_iteration": 4, "samples_per_prompt": 8},
    "rollout": {"batch_size": 8},
    "lora": {"denoiser": {}},
}


class _Unet:
    """Watches a backbone's U-Net: samples in each of its passes, and whether it had adapters."""

    def __init__(self, backbone: Backbone) -> None:
        self.rows: list[int] = []
        self.adapted: list[bool] = []
        self._unet = backbone.denoiser
        backbone.denoiser.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: Any, args: Any, kwargs: Any) -> None:
        self.rows.append(len(args[0] if args else kwargs["sample"]))
        layers = [m for m in self._unet.modules() if isinstance(m, BaseTunerLayer)]
        self.adapted.append(bool(layers) and not layers[0].disable_adapters)


def test_sampling_is_measured_with_the_adapters_of_every_part(tiny_backbone: Load) -> None:
    backbone = tiny_backbone()
    seen = _Unet(backbone)
    work.sampling(backbone, make_config(TINY))(8)
    assert seen.rows == [16, 16], "two steps, with guidance"
    assert all(seen.adapted)
    latent = int(np.prod(backbone.latent_shape))
    assert work.stored_bytes(backbone, make_config(TINY)) == 2 * 2 * 4 * latent


@pytest.mark.long
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_updates_are_measured_with_u_net_lora_and_kl_pass(
    tiny_backbone: Load, kl_weight: float
) -> None:
    backbone = tiny_backbone()
    seen = _Unet(backbone)
    config = make_config(TINY | {"objective": {"kl_weight": kl_weight}})
    run, most = work.update(backbone, config)
    assert most == 8 * 2, "a minibatch's samples by the steps that are trained"
    for size, chunks in ((2, [2] * 4), (16, [16])):
        seen.rows.clear(), seen.adapted.clear()
        run(size)
        passes = 2 if kl_weight else 1
        assert seen.rows == [2 * rows for rows in chunks for _ in range(passes)]
        assert seen.adapted == [True, False][:passes] * len(chunks)
    left = [m for m in backbone.denoiser.modules() if isinstance(m, BaseTunerLayer)]
    assert not left, "the next size starts from the base"


def test_updates_are_measured_without_the_check_of_the_first_gradient(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision it would stop on made-up samples, and nothing would be measured."""
    backbone = load_backbone(str(tiny_pipeline), dtype="bfloat16")
    monkeypatch.setattr("texforce_ray.rl.precision.in_float32", lambda _: pytest.fail("checked"))
    seen = _Unet(backbone)
    run, _ = work.update(backbone, make_config(TINY))
    run(16)
    assert seen.rows == [32]


@pytest.mark.parametrize("method", ["refl", "draft", "alignprop"])
def test_direct_backpropagation_is_measured_with_vae_and_reward(
    tiny_backbone: Load, method: str
) -> None:
    backbone = tiny_backbone()
    seen, scored = _Unet(backbone), []

    def reward(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        scored.append((tuple(images.shape), images.requires_grad))
        return images.mean(dim=(1, 2, 3))

    rewards = [{"name": "shapes_scorer"}]
    config = make_config(
        TINY | {"objective": {"kind": "direct", "method": method, "steps": 3}, "rewards": rewards}
    )
    run, most = work.update(backbone, config, reward)
    passes = 1 if method == "refl" else 3
    assert most == 8 * passes
    run(4 * passes)
    assert scored == [((4, 3, 64, 64), True)]
    assert seen.rows == [8] * passes, "the most steps that may be drawn"


def test_microbatches_end_where_there_are_no_more_pairs() -> None:
    assert microbatch_candidates(1) == [1]
    assert microbatch_candidates(48) == [1, 2, 4, 8, 16, 32, 64]
    assert microbatch_candidates()[-1] == 1024
