"""Text encoders that are not trained: encoded once, kept, parked, left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tests.flow_miniatures import build
from texforce_ray.artifacts.snapshot import LoraShape
from texforce_ray.config.io import make_config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.backbone import Backbone, load_backbone, load_config_backbone
from texforce_ray.model.conditioning import Drawing
from texforce_ray.model.encoders import TextEncoder

DRAWING = Drawing(max_sequence_length=16)
PROMPTS, SEEDS = ["a green circle", "two red squares", "a green circle"], np.array([1, 2, 3])


class _Counting(nn.Module):
    """An encoder that notes how many prompts it was given, and where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls: list[int] = []
        self.moves: list[str] = []

    def to(self, device: Any) -> _Counting:  # type: ignore[override]
        self.moves.append(str(device))
        return self


def _encoder(capacity: int = 8, parked: bool = False) -> tuple[TextEncoder, _Counting]:
    module = _Counting()

    def encode(found: _Counting, ids: Tensor) -> Sequence[Tensor]:
        found.calls.append(len(ids))
        return ids.float()[..., None] * found.weight, ids.sum(1, keepdim=True).float()

    device = torch.device("cpu")
    return TextEncoder(module, encode, device, parked=parked, capacity=capacity), module


IDS = torch.tensor([[1, 2], [3, 4], [1, 2]])


def test_each_prompt_is_encoded_once_and_alone() -> None:
    encoder, module = _encoder()
    hidden, pooled = encoder(IDS)
    again, _ = encoder(IDS.flip(0))
    assert module.calls == [1, 1]
    assert torch.equal(hidden[..., 0], IDS.float())
    assert torch.equal(again, hidden.flip(0))
    assert pooled.shape == (3, 1)
    assert not hidden.requires_grad


def test_the_oldest_prompts_make_room_and_none_are_kept_without_capacity() -> None:
    encoder, module = _encoder(capacity=1)
    for row in (0, 1, 1, 0):
        encoder(IDS[[row]])
    assert module.calls == [1, 1, 1]  # 0, 1, then 0 again
    encoder, module = _encoder(capacity=0)
    assert len(encoder(IDS)[0]) == 3
    assert module.calls == [3]


def test_a_trained_encoder_is_always_run_with_gradient() -> None:
    encoder, module = _encoder()
    encoder(IDS)
    module.peft_config = {}  # what PEFT sets
    hidden, _ = encoder(IDS)
    assert module.calls == [1, 1, 3]
    assert hidden.requires_grad
    del module.peft_config
    encoder(IDS)
    assert module.calls == [1, 1, 3], "the base model's embeddings are still there"


def test_a_parked_encoder_visits_the_device_for_new_prompts_alone() -> None:
    encoder, module = _encoder(parked=True)
    encoder(IDS)
    encoder(IDS)
    assert module.moves == ["cpu", "cpu"]  # to the device, which is the CPU here, and back
    encoder, module = _encoder(capacity=0, parked=True)
    encoder(IDS)
    assert module.moves == ["cpu", "cpu"]


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd3") / "pipeline"
    with torch.random.fork_rng(devices=[]):
        build(path, "sd3")
    return path


def _images(backbone: Backbone) -> np.ndarray:
    sampler = Sampler(backbone, steps=2, eta=0.8, guidance_scale=3.0)
    return sampler.sample(PROMPTS, SEEDS, 0)[1]


def test_caching_and_parking_change_no_image(sd3: Path) -> None:
    plain, kept, parked = (
        _images(load_backbone(str(sd3), drawing=replace(DRAWING, **options)))
        for options in ({"cached_prompts": 0}, {}, {"park_encoders": True})
    )
    assert np.abs(plain.astype(int) - kept.astype(int)).max() <= 1
    assert np.array_equal(kept, parked)


def test_a_policy_on_one_encoder_leaves_the_others_cached(sd3: Path) -> None:
    backbone = load_backbone(str(sd3), drawing=DRAWING)
    before = _images(backbone)
    adapter = Adapter(backbone, {"text_encoder": LoraShape(2, 4.0, ("q_proj",))}, seed=0)
    t5, calls = backbone.text_encoders[2], []
    t5.register_forward_hook(lambda *_: calls.append(1))
    noise = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():  # equal weights would add up a normalised input: to 0
        parameter.data = torch.randn(parameter.shape, generator=noise)
    assert not np.array_equal(_images(backbone), before)
    assert not calls, "T5's embeddings of these prompts are known"
    adapter.remove()
    assert np.array_equal(_images(backbone), before)


def test_a_pipeline_without_its_t5_draws_as_stock_does_without_it(sd3: Path) -> None:
    drawing = replace(DRAWING, max_sequence_length=10)
    backbone = load_backbone(str(sd3), drawing=drawing, left_out=["text_encoder_3"])
    assert len(backbone.text_encoders) == 2
    _, images = Sampler(backbone, steps=2, eta=0.0, guidance_scale=3.0).sample(PROMPTS, SEEDS, 0)
    pipe = DiffusionPipeline.from_pretrained(sd3, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in SEEDS]
    stock = pipe(
        list(PROMPTS), num_inference_steps=2, guidance_scale=3.0, generator=generators,
        max_sequence_length=10, output_type="np",
    ).images  # fmt: skip
    assert np.abs(np.round(stock * 255) - images).max() <= 1


def test_only_optional_encoders_can_be_left_out(sd3: Path) -> None:
    with pytest.raises(ConfigError, match=r"leave_out: .*cannot do without text_encoder; may be"):
        load_backbone(str(sd3), left_out=["text_encoder"])
    with pytest.raises(ConfigError, match=r"StableDiffusionPipeline cannot do without text_encod"):
        load_backbone("embedded", left_out=["text_encoder_3"])


@pytest.mark.parametrize(
    ("drawing", "wanted"),
    [
        ({"height": 72, "width": 64}, "diffusion.height: 72 is not a multiple of 16"),
        ({"clip_skip": 3}, "clip_skip: 3 leaves no layer"),
    ],
)
def test_sizes_that_a_transformer_cannot_read_are_refused(
    sd3: Path, drawing: dict[str, int], wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load_backbone(str(sd3), drawing=replace(DRAWING, **drawing))


@pytest.mark.parametrize("option", [{"clip_skip": 1}, {"negative_prompt": "a hand"}])
def test_options_that_flux_has_not_are_refused(option: dict[str, Any], tmp_path: Path) -> None:
    build(tmp_path, "flux_dev")
    with pytest.raises(ConfigError, match=r"has no effect on a FluxPipeline; leave it null"):
        load_backbone(str(tmp_path), drawing=Drawing(64, 64, **option))


def test_guidance_that_flux_schnell_does_not_read_is_refused(tmp_path: Path) -> None:
    build(tmp_path, "flux_schnell")
    backbone = load_backbone(str(tmp_path), drawing=Drawing(64, 64, max_sequence_length=16))
    sampler = Sampler(backbone, steps=2, eta=0.0, guidance_scale=3.5)
    with pytest.raises(ConfigError, match=r"guidance_scale: 3.5, but this model takes no guida"):
        sampler.sample(PROMPTS, SEEDS, 0)


def test_clip_alone_cannot_be_parked() -> None:
    with pytest.raises(ConfigError, match=r"model.park_encoders: a StableDiffusionPipeline"):
        load_backbone("embedded", drawing=Drawing(park_encoders=True))


def test_a_length_means_nothing_to_clip_alone() -> None:
    with pytest.raises(ConfigError, match="max_sequence_length: 16, but the text encoders"):
        load_backbone("embedded", drawing=DRAWING)


def test_a_length_that_the_stock_pipeline_refuses_is_refused(sd3: Path) -> None:
    with pytest.raises(ConfigError, match="max_sequence_length: 600; a StableDiffusion3Pipeline t"):
        load_backbone(str(sd3), drawing=Drawing(max_sequence_length=600))


def test_a_model_that_takes_no_guidance_is_refused_before_the_end_of_a_run(tmp_path: Path) -> None:
    build(tmp_path, "flux_schnell")
    config = make_config(
        {
            "model": {"path": str(tmp_path)},
            "diffusion": {"process": "flow", "height": 64, "width": 64, "guidance_scale": 1,
                          "window": {"size": 1}},
            "eval": {"guidance_curve": [1, 3.5]},
        }
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"guidance_scale: 3\.5, but this model takes no gui"):
        load_config_backbone(config, 0)
