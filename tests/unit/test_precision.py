"""In half precision the gradient is still the gradient, at Stable Diffusion's magnitudes too."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from texforce_ray.config import Config
from texforce_ray.config.io import make_config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.errors import NumericsError
from texforce_ray.model.backbone import load_backbone
from texforce_ray.rl import precision
from texforce_ray.rl.direct_learner import DirectLearner
from texforce_ray.rl.learner import Learner
from texforce_ray.rl.likelihood import Likelihood, Pairs
from texforce_ray.rl.nft_learner import NftLearner
from texforce_ray.rl.objectives import make_learner
from texforce_ray.rl.ppo_anchor import Anchor
from texforce_ray.rl.ppo_learner import PpoLearner
from texforce_ray.rl.ppo_totals import Totals
from texforce_ray.rl.precision import to_encoder
from texforce_ray.rl.sharding import UpdateBatch

PROMPTS = ["a green circle", "two red squares", "a green circle", "a blue square"]
SEEDS = np.array([3, 1, 4, 15])
STEPS = np.tile(np.arange(3), (4, 1))
# The embedded latents have 256 dimensions where SD's have 16,384, and a minibatch of the paper's
# has 3,200 pairs: dividing by this many makes a gradient as small as SD's.
SD_PAIRS = 1_000_000
# The least cosine to float32. torch 2.6's backward kernels on a CPU round more often.
EXACT = (
    {"float16": 0.998, "bfloat16": 0.93}
    if tuple(map(int, torch.__version__.split(".")[:2])) > (2, 6)
    else {"float16": 0.995, "bfloat16": 0.8}
)


def _config(dtype: str, **sections: Any) -> Config:
    values: dict[str, Any] = {
        "model": {"dtype": dtype},
        "lora": {"text_encoder": {"rank": 4, "alpha": 4.0}},
        "diffusion": {"steps": 4, "guidance_scale": 3.0, "storage_dtype": "float16"},
        "prompts": {"per_iteration": 4, "samples_per_prompt": 1},
        "rollout": {"batch_size": 4},
        "objective": {"timestep_fraction": 0.75},
        "update": {"minibatches": 1},
        "learner": {"microbatch_size": 5},
        "advantage": {"mode": "batch"},
    }
    for name, changes in sections.items():
        kept = {} if "kind" in changes else values.get(name, {})
        values[name] = kept | changes
    return make_config(values)


def _redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    images = images.float()
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


def _learner(kind: str, dtype: str, randomize: Callable[..., None], **sections: Any) -> Learner:
    backbone = load_backbone("embedded", dtype=dtype)
    learner: Learner
    if kind == "direct":
        sections |= {"objective": {"kind": "direct", "method": "draft", "steps": 2}}
        learner = DirectLearner(backbone, _config(dtype, **sections), _redness)
    elif kind in ("nft", "rwr"):
        sections |= {"objective": {"kind": kind, "embedding_anchor_weight": 0.1}}
        learner = make_learner(backbone, _config(dtype, **sections))
    else:
        learner = PpoLearner(backbone, _config(dtype, **sections))
    randomize(learner.adapter, seed=1, scale=0.05)
    learner.copies_from_adapter()
    return learner


def _batch(learner: Learner) -> UpdateBatch:
    d = learner.config.diffusion
    sampler = Sampler(
        learner.backbone,
        steps=d.steps,
        eta=d.eta,
        guidance_scale=d.guidance_scale,
        storage_dtype="float16",
    )
    trajectory = sampler.sample(PROMPTS, SEEDS, 0)[0]
    return UpdateBatch(trajectory, np.array([1.0, -0.5, 0.7, -2.0]), np.ones(4, dtype=bool))


def _gradient(learner: Learner, batch: UpdateBatch, valid: int) -> list[Tensor]:
    """The gradient of the batch's summed loss divided by `valid`."""
    rows = np.arange(4)
    if isinstance(learner, NftLearner):
        learner._old = learner._copy()
    if not isinstance(learner, PpoLearner):
        return learner.shard_gradient(batch, rows, valid)[0]
    pairs = Pairs.of(rows, STEPS)
    anchor = torch.from_numpy(np.array(batch.trajectory.log_probs))
    anchor[pairs.sample, pairs.step] = learner.likelihood.log_probs(batch.trajectory, pairs)
    totals = Totals(learner.backbone.device)
    return learner._shard_gradient(batch, pairs, Anchor.of(anchor), valid, totals, plain=True)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["text", "joint", "direct", "nft", "rwr"])
def test_half_precision_keeps_the_gradient_at_the_magnitudes_of_sd(
    randomize: Callable[..., None], kind: str, dtype: str
) -> None:
    lora = {"denoiser": {"rank": 2, "alpha": 2.0}} if kind == "joint" else {}
    learner = _learner(kind, dtype, randomize, lora=lora)
    batch = _batch(learner)
    found = _gradient(learner, batch, SD_PAIRS)
    with precision.in_float32(learner.backbone):
        exact = _gradient(learner, batch, SD_PAIRS)
    agreement = precision.agreement(found, exact)
    assert agreement.cosine > EXACT[dtype]
    assert agreement.zeros < 0.001


@pytest.mark.long
def test_float16_keeps_the_gradient_over_six_decades(randomize: Callable[..., None]) -> None:
    learner = _learner("text", "float16", randomize)
    batch = _batch(learner)
    with precision.in_float32(learner.backbone):
        exact = _gradient(learner, batch, 12)
    for valid in (12, 1_000, 100_000, 12_000_000):
        found = [g * (valid / 12) for g in _gradient(learner, batch, valid)]
        assert precision.agreement(found, exact).cosine > EXACT["float16"], valid


def test_float32_is_scaled_and_unscaled_without_losing_a_bit(
    randomize: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = _learner("text", "float32", randomize)
    batch = _batch(learner)
    scaled = _gradient(learner, batch, 12)
    monkeypatch.setattr("texforce_ray.rl.ppo_learner.loss_scale", lambda *_: 1.0)
    for one, other in zip(scaled, _gradient(learner, batch, 12), strict=True):
        assert torch.equal(one, other)


def test_weights_come_back_from_float32_bit_for_bit() -> None:
    backbone = load_backbone("embedded", dtype="bfloat16")
    before = {k: v.clone() for k, v in backbone.denoiser.state_dict().items()}
    with precision.in_float32(backbone):
        assert backbone.dtype == torch.float32
        assert backbone.noise_dtype == torch.bfloat16
    assert backbone.dtype == backbone.noise_dtype == torch.bfloat16
    assert all(torch.equal(before[k], v) for k, v in backbone.denoiser.state_dict().items())


# ---- the run's own check -----------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kind", ["text", "direct", "nft"])
def test_the_first_update_says_how_far_its_gradient_is_that_of_float32(
    randomize: Callable[..., None], kind: str
) -> None:
    learner = _learner(kind, "float16", randomize)
    batch = _batch(learner)
    metrics = learner.update(batch)
    assert 0.99 < metrics["learner/gradient_agreement"] <= 1 + 1e-9
    assert metrics["learner/gradient_zeros"] < 0.01
    assert learner.backbone.dtype == torch.float16
    assert "learner/gradient_agreement" not in learner.update(batch)


@pytest.mark.long
def test_a_fresh_adapter_whose_a_has_no_gradient_yet_agrees() -> None:
    learner = PpoLearner(load_backbone("embedded", dtype="float16"), _config("float16"))
    assert learner.update(_batch(learner))["learner/gradient_agreement"] > 0.99


def test_float32_needs_no_check(randomize: Callable[..., None]) -> None:
    learner = _learner("text", "float32", randomize)
    assert "learner/gradient_agreement" not in learner.update(_batch(learner))


def test_a_reward_that_answers_in_half_precision_keeps_its_gradient(
    randomize: Callable[..., None],
) -> None:
    def half(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return _redness(images, prompts).half()

    config = _config("float16", objective={"kind": "direct", "method": "draft", "steps": 1})
    learner = DirectLearner(load_backbone("embedded", dtype="float16"), config, half)
    randomize(learner.adapter, seed=1, scale=0.05)
    gradient = _gradient(learner, _batch(learner), SD_PAIRS)
    assert all(bool(torch.isfinite(part).all()) for part in gradient)
    assert any(bool(part.any()) for part in gradient)


@pytest.mark.long
def test_the_check_waits_for_a_sample_that_counts(randomize: Callable[..., None]) -> None:
    learner = _learner("text", "float16", randomize)
    batch = _batch(learner)
    nobody = UpdateBatch(batch.trajectory, np.zeros(4), np.zeros(4, dtype=bool))
    assert "learner/gradient_agreement" not in learner.update(nobody)
    assert "learner/gradient_agreement" in learner.update(batch)


@pytest.mark.long
def test_too_little_memory_leaves_nothing_behind(
    randomize: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the failed attempt held must be free before the next one."""
    learner = _learner("text", "float16", randomize)
    batch, held = _batch(learner), []
    original = Likelihood.log_probs

    def log_probs(*given: Any, **named: Any) -> Tensor:
        if learner.backbone.dtype == torch.float32:
            large = torch.ones(1)
            held.append(weakref.ref(large))
            raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        assert all(reference() is None for reference in held)
        return original(*given, **named)

    monkeypatch.setattr(Likelihood, "log_probs", log_probs)
    assert learner.update(batch)["learner/gradient_agreement"] > 0.99
    assert held
    assert learner.scale_factor == 1
    assert learner.microbatch_size == learner.config.learner.microbatch_size
    assert learner.backbone.dtype == torch.float16


@pytest.mark.long
@pytest.mark.parametrize("memory", [True, False], ids=["float32", "another scale"])
def test_a_gradient_that_underflows_stops_the_run_before_its_first_update(
    randomize: Callable[..., None], monkeypatch: pytest.MonkeyPatch, memory: bool
) -> None:
    learner = _learner("text", "float16", randomize)
    batch = _batch(learner)
    before = learner.learned().snapshot
    # What there was before: no scale. A hundred thousandth of the loss stands for SD's size.
    monkeypatch.setattr("texforce_ray.rl.ppo_learner.loss_scale", lambda *_: 1e-4)
    if not memory:

        def too_large(_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr("texforce_ray.rl.precision.in_float32", too_large)
    with pytest.raises(NumericsError, match=r"gradient in float16 is unusable.*bfloat16"):
        learner.update(batch)
    assert learner.updates == 0
    for key, value in learner.learned().snapshot.adapters["text_encoder"].items():
        np.testing.assert_array_equal(value, before.adapters["text_encoder"][key])


@pytest.mark.parametrize("exponent", [-126, -41, -1, 0, 1, 14, 126])
def test_gradients_enter_the_encoder_scaled_by_a_power_of_two(exponent: int) -> None:
    gradient = torch.tensor([0.75, -0.125]) * 2.0**exponent
    (scaled,), inverse = to_encoder([gradient], [torch.zeros(2, dtype=torch.float16)])
    largest = 12.0 if exponent > -122 else 0.75 * 2.0 ** (exponent + 126)  # 2^126 at most
    torch.testing.assert_close(scaled, torch.tensor([largest, -largest / 6]).half())
    if exponent > -122:
        assert torch.equal(scaled.float() * inverse, gradient)


def test_gradients_of_zeros_and_of_no_finite_number_stay_what_they_are() -> None:
    for value in (0.0, float("inf"), float("nan")):
        (scaled,), inverse = to_encoder([torch.tensor([value])], [torch.zeros(1).bfloat16()])
        torch.testing.assert_close(
            scaled.float() * inverse, torch.tensor([value]), equal_nan=True, rtol=0, atol=0
        )
