"""On a real GPU: what other tests can only emulate. `make gpu`; needs no Ray and no downloads.

Without a GPU (`make gpu SIZE=tiny`) the same code runs on the CPU, but for what is CUDA's alone.
What is not marked `gpu` does so in every test run.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.flow_miniatures import MINIATURES
from tests.flow_miniatures import build as build_flow
from tests.miniatures import FAMILIES, build
from texforce_ray.config import Config
from texforce_ray.config.io import make_config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.model.backbone import load_backbone, load_config_backbone
from texforce_ray.rl.objectives import make_learner
from texforce_ray.rl.ppo_learner import PpoLearner
from texforce_ray.rl.sharding import UpdateBatch

pytestmark = pytest.mark.long

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_CUDA = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
HALF = [pytest.param(dtype, marks=pytest.mark.gpu) for dtype in ("bfloat16", "float16")]
WAYS = [
    pytest.param(False, id="eager"),
    pytest.param(True, id="compiled", marks=pytest.mark.gpu),
]

PROMPTS = ["a green circle", "two red squares"]
SEEDS = np.array([7, 2**40])


def _config(path: Path, dtype: str, *, steps: int, guidance: float, compiled: bool) -> Config:
    return make_config(
        {
            "iterations": 2,
            "model": {"path": str(path), "dtype": dtype, "compile": compiled},
            "lora": {"text_encoder": {"rank": 4, "alpha": 4.0}},
            "diffusion": {
                "steps": steps,
                "guidance_scale": guidance,
                "storage_dtype": "float32" if dtype == "float32" else "float16",
            },
            "prompts": {"per_iteration": 2, "samples_per_prompt": 1},
            "rollout": {"batch_size": 2, "num_gpus": 1},
            "advantage": {"mode": "batch"},
            "update": {"minibatches": 1},
        }
    )


def _assert_a_cpus(metrics: dict[str, float], config: Config, batch: UpdateBatch) -> None:
    """In float32, the gradient has the norm that a CPU computes; `test_kernels` has directions."""
    if DEVICE == "cpu" or config.model.dtype != "float32":
        return
    config = config.changed({"model.device": "cpu", "model.compile": False})
    expected = PpoLearner(load_config_backbone(config, 0.0), config).update(batch)
    assert metrics["learner/grad_norm"] == pytest.approx(expected["learner/grad_norm"], rel=1e-2)


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize("dtype", ["float32", *HALF])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_two_updates_agree_with_the_sampler_and_with_float32(
    family: str, dtype: str, compiled: bool, tmp_path: Path
) -> None:
    if compiled and (DEVICE == "cpu" or family not in ("sd15", "sdxl")):
        pytest.skip("compiled on a GPU alone, one of a kind")
    build(tmp_path / "pipeline", family)
    steps, guidance = FAMILIES[family][4:6]
    config = _config(
        tmp_path / "pipeline", dtype, steps=steps, guidance=guidance, compiled=compiled
    )
    learner = PpoLearner(load_config_backbone(config, 1.0), config)
    assert learner.backbone.device.type == DEVICE
    d = config.diffusion
    sampler = Sampler(
        learner.backbone,
        steps=steps,
        eta=d.eta,
        guidance_scale=guidance,
        storage_dtype=d.storage_dtype,
    )
    for iteration in range(2):
        trajectory, _ = sampler.sample(PROMPTS, SEEDS + iteration, iteration)
        batch = UpdateBatch(trajectory, np.array([1.0, -1.0]), np.ones(2, dtype=bool))
        metrics = learner.update(batch)
        assert metrics["ppo/ratio_error_first_pass"] < (1e-4 if dtype == "float32" else 0.1)
        if not iteration:
            _assert_a_cpus(metrics, config, batch)
        if dtype != "float32" and not iteration:
            assert metrics["learner/gradient_agreement"] > 0.9
            assert metrics["learner/gradient_zeros"] < 0.01
    assert learner.learned().snapshot.changes


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize("dtype", ["float32", *HALF])
@pytest.mark.parametrize("name", list(MINIATURES))
def test_flow_models_update_there(name: str, dtype: str, compiled: bool, tmp_path: Path) -> None:
    if compiled and (DEVICE == "cpu" or name not in ("sd35", "flux_dev")):
        pytest.skip("compiled on a GPU alone, one of a kind")
    mini = MINIATURES[name]
    build_flow(tmp_path / "pipeline", name)
    adapters = {
        part: {"rank": 4, "alpha": 4.0, "target_modules": modules}
        for part, modules in mini.lora.items()
    }
    absent = {part: None for part in ("text_encoder_2",) if part not in adapters}
    plain = _config(tmp_path / "pipeline", dtype, steps=4, guidance=1.0, compiled=compiled)
    flow = {"process": "flow", "kernel": "cps", "eta": 0.8, "window": {"size": 2},
            "guidance_scale": mini.guidance, "height": 64, "width": 64,
            "max_sequence_length": mini.length}  # fmt: skip
    values = plain.model_dump()
    values["model"]["park_encoders"] = True
    values["optimizer"]["ema_decay"] = 0.9
    config = make_config(
        values | {"lora": absent | adapters, "diffusion": values["diffusion"] | flow}
    )
    learner = PpoLearner(load_config_backbone(config, 1.0), config)
    assert learner.backbone.device.type == DEVICE
    sampler = Sampler.of(learner.backbone, config)
    for iteration in range(2):
        trajectory, _ = sampler.at(config, iteration).sample(PROMPTS, SEEDS, iteration)
        batch = UpdateBatch(trajectory, np.array([1.0, -1.0]), np.ones(2, dtype=bool))
        metrics = learner.update(batch)
        assert metrics["ppo/ratio_error_first_pass"] < (1e-4 if dtype == "float32" else 0.1)
        if not iteration:
            _assert_a_cpus(metrics, config, batch)
    assert learner.learned().snapshot.changes


@pytest.mark.parametrize("dtype", ["float32", HALF[0]])
@pytest.mark.parametrize("kind", ["nft", "awm", "rwr", "raft"])
def test_objectives_on_the_forward_process_learn_there(
    kind: str, dtype: str, tiny_pipeline: Path
) -> None:
    config = _config(tiny_pipeline, dtype, steps=4, guidance=1.0, compiled=False)
    anchors = {"anchor_weight": 0.1, "embedding_anchor_weight": 0.1, "levels": 2}
    config = make_config(config.model_dump() | {"objective": {"kind": kind, **anchors}})
    learner = make_learner(load_config_backbone(config, 1.0), config)
    assert learner.backbone.device.type == DEVICE
    d = config.diffusion
    sampler = Sampler(learner.backbone, steps=4, eta=0.0, guidance_scale=1.0,
                      storage_dtype=d.storage_dtype)  # fmt: skip
    for iteration in range(2):
        trajectory, _ = sampler.sample(PROMPTS, SEEDS + iteration, iteration)
        batch = UpdateBatch(trajectory, np.array([1.0, -1.0]), np.ones(2, dtype=bool))
        metrics = learner.update(batch)
        assert np.isfinite(metrics["forward/loss"])
        assert metrics["learner/grad_norm"] > 0
    assert metrics["forward/embedding_anchor"] > 0
    assert learner.learned().snapshot.changes


@pytest.mark.gpu
@NO_CUDA
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["ppo", "nft", "awm", "rwr"])
def test_the_processor_does_not_wait_for_the_device_within_a_minibatch(
    kind: str, dtype: str, tiny_pipeline: Path
) -> None:
    """As often as an update does, whatever the number of its microbatches."""
    waits = []
    for size in (1, 8):
        config = _config(tiny_pipeline, dtype, steps=4, guidance=3.0, compiled=False)
        objective = {"kind": kind, "kl_weight": 0.1} if kind == "ppo" else {"kind": kind}
        config = make_config(
            config.model_dump() | {"objective": objective, "learner": {"microbatch_size": size}}
        )
        learner = make_learner(load_config_backbone(config, 1.0), config)
        learner.checked = True  # it has batches of one pair, and waits
        trajectory, _ = Sampler.of(learner.backbone, config).sample(PROMPTS, SEEDS, 0)
        batch = UpdateBatch(trajectory, np.array([1.0, -1.0]), np.ones(2, dtype=bool))
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            learner.update(batch)
        events = Counter({event.key: event.count for event in seen.key_averages()})
        waits.append(
            sum(events[f"cuda{what}Synchronize"] for what in ("Stream", "Device", "Event"))
        )
    assert waits[0] == waits[1], waits
    assert waits[0] > 0  # else the profiler does not name them as expected


@pytest.mark.gpu
@NO_CUDA
def test_float32_on_a_named_device_uses_no_tf32(tiny_pipeline: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    config = make_config({"model": {"path": str(tiny_pipeline), "device": "cuda:0"}})
    load_config_backbone(config, 1.0)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.gpu
@NO_CUDA
def test_samples_on_the_gpu_are_those_of_the_cpu_but_for_rounding(tiny_pipeline: Path) -> None:
    images = [
        Sampler(
            load_backbone(str(tiny_pipeline), device=device), steps=4, eta=1.0, guidance_scale=3.0
        ).sample(PROMPTS, SEEDS, 0)[1]
        for device in ("cpu", "cuda")
    ]
    assert int(np.abs(images[0].astype(int) - images[1].astype(int)).max()) <= 2
