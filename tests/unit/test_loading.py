"""Pipelines as people have them: drawn as stock diffusers draws, or refused by file and key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file

from tests.single_file import write_single_file
from texforce_ray.config_io import make_config
from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.errors import ConfigError
from texforce_ray.model.backbone import load_backbone
from texforce_ray.model.conditioning import Drawing
from texforce_ray.model.location import locate_model

PROMPTS = ["a green circle", "two red squares"]
SEEDS = np.array([7, 2**40])


@pytest.fixture
def changed(pipelines: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy whose JSON file has other values; None takes a key out."""

    def make(file: str, changes: dict[str, Any], name: str = "sd15") -> Path:
        folder = tmp_path / name
        shutil.copytree(pipelines[name], folder)
        values = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(values))
        return folder

    return make


def _ours(path: Path | str, guidance_scale: float = 3.0, **options: Any) -> np.ndarray:
    sampler = Sampler(
        load_backbone(str(path), **options), steps=3, eta=1.0, guidance_scale=guidance_scale
    )
    return sampler.sample(PROMPTS, SEEDS, 0)[1]


def _stock(path: Path, prepare: Callable[[Any], None] = lambda _: None, **options: Any) -> Any:
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    prepare(pipe)
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in SEEDS]
    how: dict[str, Any] = {"guidance_scale": 3.0} | options
    images = pipe(
        how.pop("prompt", PROMPTS), num_inference_steps=3, eta=1.0, generator=generators, **how
    ).images
    return np.stack([np.asarray(image) for image in images])


def _assert_equal(ours: np.ndarray, stock: np.ndarray) -> None:
    assert ours.shape == stock.shape
    assert int(np.abs(ours.astype(int) - stock.astype(int)).max()) <= 1


# ---- what a stock pipeline can be asked for ----------------------------------------------


def _with_text_model(pipe: Any) -> None:
    # diffusers 0.42 looks for the layers where transformers before 5.6 had them.
    if not hasattr(pipe.text_encoder, "text_model"):
        pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "asked",
    [
        {"height": 48, "width": 80},
        {"negative_prompt": "three blue triangles"},
        {"clip_skip": 1},
        {"clip_skip": 1, "negative_prompt": "a red square", "height": 32, "width": 32},
    ],
    ids="+".join,
)
def test_images_are_those_of_stock_diffusers(
    pipelines: dict[str, Path], family: str, asked: dict[str, Any]
) -> None:
    if family == "sdxl" and "clip_skip" in asked:
        pytest.skip("the miniature's second encoder has too few layers")
    path = pipelines[family]
    stock = dict(asked)
    if "negative_prompt" in stock:
        stock["negative_prompt"] = [stock["negative_prompt"]] * 2
    prepare = _with_text_model if family == "sd15" else lambda _: None
    expected = _stock(path, prepare, **stock)
    _assert_equal(_ours(path, drawing=Drawing(**asked)), expected)
    assert (expected.shape != _stock(path).shape) or (expected != _stock(path)).any()


def test_a_negative_prompt_replaces_zeros_where_there_are_zeros_for_the_empty_one(
    pipelines: dict[str, Path],
) -> None:
    path = pipelines["sdxl"]
    expected = _stock(path, negative_prompt=["", ""])
    _assert_equal(_ours(path, drawing=Drawing(negative_prompt="")), expected)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"height": 60}, r"diffusion\.height: 60 is no multiple of 8"),
        ({"clip_skip": 9}, r"diffusion\.clip_skip: 9 leaves no layer of a text encoder of 3"),
    ],
)
def test_sizes_and_layers_that_the_model_lacks_are_refused(
    pipelines: dict[str, Path], asked: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        load_backbone(str(pipelines["sd15"]), drawing=Drawing(**asked))


def test_half_a_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="height, width: give both"):
        make_config({"diffusion": {"width": 64}})


def test_a_negative_prompt_without_guidance_is_refused() -> None:
    with pytest.raises(ConfigError, match="negative_prompt: has no effect with guidance_scale 1"):
        make_config({"diffusion": {"guidance_scale": 1.0, "negative_prompt": "blurry"}})


def test_a_textual_inversion_of_several_vectors_is_used_whole(
    pipelines: dict[str, Path], tmp_path: Path
) -> None:
    pipe = DiffusionPipeline.from_pretrained(pipelines["sd15"])
    tokens = ["<style>", "<style>_1", "<style>_2"]
    pipe.tokenizer.add_tokens(tokens)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[-3:].normal_(
            generator=torch.Generator().manual_seed(1)
        )
    pipe.save_pretrained(tmp_path / "inverted")
    prompts = ["a <style> circle", "two red <style>"]
    backbone = load_backbone(str(tmp_path / "inverted"))
    ids = backbone.tokenize(prompts).ids[0]
    new = set(pipe.tokenizer.convert_tokens_to_ids(tokens))
    assert all(new <= set(row.tolist()) for row in ids)
    images = Sampler(backbone, steps=3, eta=1.0, guidance_scale=3.0).sample(prompts, SEEDS, 0)[1]
    _assert_equal(images, _stock(tmp_path / "inverted", prompt=prompts))


def test_a_tokenizer_without_a_limit_takes_the_encoders(changed: Callable[..., Path]) -> None:
    path = changed("tokenizer/tokenizer_config.json", {})
    values = json.loads((path / "tokenizer/tokenizer_config.json").read_text())
    values.pop("model_max_length")
    (path / "tokenizer/tokenizer_config.json").write_text(json.dumps(values))
    tokens = load_backbone(str(path)).tokenize(["a circle " * 50, "a circle"])
    assert tokens.truncated == [True, False]
    assert tokens.ids[0].shape[1] == load_backbone("embedded").tokenize(["x"]).ids[0].shape[1]


def test_sdxls_latents_are_shifted_as_stock_does(changed: Callable[..., Path]) -> None:
    path = changed(
        "vae/config.json",
        {"latents_mean": [0.5, -1.0, 0.2, 1.0], "latents_std": [2.0, 1.5, 0.7, 1.0]},
        name="sdxl",
    )
    _assert_equal(_ours(path), _stock(path))


# ---- weights that are not there ----------------------------------------------------------


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_a_part_that_would_get_random_weights_is_refused(
    pipelines: dict[str, Path], tmp_path: Path, part: str
) -> None:
    path = tmp_path / "foreign"
    shutil.copytree(pipelines["sd15"], path)
    file = next((path / part).glob("*.safetensors"))
    foreign = {f"encoder.model.{k}": v for k, v in load_file(file).items()}
    save_file(foreign, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"model\.path: .*: {part} would get random weights"):
        load_backbone(str(path))


def test_one_missing_tensor_is_named(pipelines: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "incomplete"
    shutil.copytree(pipelines["sdxl"], path)
    file = path / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("text_projection.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"text_encoder_2 .*text_projection\.weight"):
        load_backbone(str(path))


def test_a_pipeline_with_half_precision_files_alone_says_which_variant(
    pipelines: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "fp16"
    DiffusionPipeline.from_pretrained(pipelines["sd15"]).save_pretrained(path, variant="fp16")
    with pytest.raises(ConfigError, match=r"only weights of variant fp16; set model\.variant=fp16"):
        locate_model(str(path))
    assert locate_model(str(path), "fp16") == str(path)
    _assert_equal(_ours(path, variant="fp16"), _ours(pipelines["sd15"]))
    with pytest.raises(ConfigError, match=r"set model\.variant=fp16 instead of 'ema'"):
        locate_model(str(path), "ema")
    with pytest.raises(ConfigError, match=r"model\.variant: .*no weights of variant 'ema'"):
        locate_model(str(pipelines["sd15"]), "ema")


# ---- what would be drawn otherwise -------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "lcm": ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256"),
    "classes": ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
    "image": ("unet/config.json", {"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type"),
    "other embedding": ("unet/config.json", {"addition_embed_type": "text"}, "addition_embed"),
    "attention": ("unet/config.json", {"only_cross_attention": [False, True]}, "only_cross_att"),
    "gated": ("unet/config.json", {"attention_type": "gated"}, "attention_type 'gated'"),
    "inpainting": ("unet/config.json", {"in_channels": 9}, "in_channels 9 where the VAE has 4"),
    "video": ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "UNet3DCondition"),
    "edm": ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEuler"),
    "flow": (
        "scheduler/scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        "is a FlowMatchEulerDiscreteScheduler, whose noise schedule is not a DDPM's",
    ),
    "flow sigmas": ("scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "use_flow"),
    "continuous": (
        "scheduler/scheduler_config.json",
        {"timestep_type": "continuous"},
        "timestep_t",
    ),
    "prediction": ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "fl"),
    "vae shift": ("vae/config.json", {"shift_factor": 0.1}, "vae/config.json has shift_factor 0.1"),
    "vae mean": ("vae/config.json", {"latents_mean": [0.0] * 4}, "has latents_mean"),
    "vae kind": ("vae/config.json", {"_class_name": "VQModel"}, "the VAE is a VQModel"),
    "mask": ("text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask True"),
    "no encoder": ("model_index.json", {"text_encoder": [None, None]}, "has no text_encoder"),
    "null encoder": ("model_index.json", {"text_encoder": None}, "has no text_encoder"),
    "other encoder": (
        "model_index.json",
        {"text_encoder": ["transformers", "RobertaModel"]},
        "text_encoder is a RobertaModel; supported is CLIPTextModel",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_changes_the_image_and_is_not_understood_is_refused_by_name(
    changed: Callable[..., Path], case: str
) -> None:
    """Before anything is loaded: `locate_model` needs no torch."""
    file, changes, words = REFUSED[case]
    path = changed(file, changes)
    with pytest.raises(ConfigError, match=r"model\.path: .*") as caught:
        locate_model(str(path))
    assert words in str(caught.value)


def test_an_sdxl_refiner_is_refused(changed: Callable[..., Path]) -> None:
    path = changed("model_index.json", {"text_encoder": [None, None]}, name="sdxl")
    with pytest.raises(ConfigError, match="has no text_encoder"):
        locate_model(str(path))


def test_a_replacing_unet_is_looked_at_too(
    changed: Callable[..., Path], pipelines: dict[str, Path]
) -> None:
    path = changed("unet/config.json", {"class_embed_type": "timestep"})
    with pytest.raises(ConfigError, match=r"model\.unet: .*class_embed_type"):
        load_backbone(str(pipelines["sd15"]), unet=str(path))


def test_a_hub_id_that_cannot_be_had_is_no_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="no local folder, and cannot be had from the Hugging"):
        load_backbone("nobody/nothing")


# ---- one file ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "match"),
    [
        ("absent.safetensors", None, "the checkpoint .* does not exist"),
        ("model.ckpt", None, "is a pickle, which may run code"),
        ("model.safetensors", None, r"set model\.single_file_config"),
        ("model.safetensors", "nowhere", r"model\.single_file_config: .*no model_index\.json"),
    ],
)
def test_single_files_say_what_they_need(
    tmp_path: Path, name: str, config: str | None, match: str
) -> None:
    for file in ("model.safetensors", "model.ckpt"):
        (tmp_path / file).write_bytes(b"")
    folder = None if config is None else str(tmp_path / config)
    with pytest.raises(ConfigError, match=match):
        locate_model(str(tmp_path / name), single_file=folder)


def test_a_single_file_draws_what_its_directory_draws(
    pipelines: dict[str, Path], tmp_path: Path
) -> None:
    file, config = tmp_path / "model.safetensors", str(tmp_path / "config")
    write_single_file(pipelines["sd15"], file)
    shutil.copytree(pipelines["sd15"], config, ignore=shutil.ignore_patterns("*.safetensors"))
    assert locate_model(str(file), single_file=config) == str(file)
    _assert_equal(_ours(file, single_file_config=config), _ours(pipelines["sd15"]))


@pytest.mark.parametrize("start", ["cond_stage_model.", "model.diffusion_model.out.2."])
def test_a_single_file_that_lacks_weights_is_refused(
    pipelines: dict[str, Path], tmp_path: Path, start: str
) -> None:
    file = tmp_path / "model.safetensors"
    write_single_file(pipelines["sd15"], file)
    save_file({k: v for k, v in load_file(file).items() if not k.startswith(start)}, file)
    with pytest.raises(ConfigError, match=r"model\.path: .*model\.safetensors"):
        load_backbone(str(file), single_file_config=str(pipelines["sd15"]))


def test_a_config_for_a_single_file_means_nothing_elsewhere() -> None:
    with pytest.raises(ConfigError, match=r"single_file_config: means nothing with model\.path"):
        locate_model("embedded", single_file="somewhere")


# ---- compiled ----------------------------------------------------------------------------


def test_a_compiled_unet_sees_one_shape_whatever_the_prompts_are(
    pipelines: dict[str, Path],
) -> None:
    backbone, graphs = load_backbone(str(pipelines["sd15"])), []

    def count(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    backbone.unet.compile(dynamic=False, backend=count)
    backbone.compiled = True
    sampler = Sampler(backbone, steps=2, eta=1.0, guidance_scale=3.0)
    plain = Sampler(load_backbone(str(pipelines["sd15"])), steps=2, eta=1.0, guidance_scale=3.0)
    seen = []
    for prompts in (["a"] * 4, ["a", "b", "a", "b"], ["a", "b", "c", "d"], ["a", "a", "a", "b"]):
        images = sampler.sample(prompts, np.arange(4), 0)[1]
        _assert_equal(images, plain.sample(prompts, np.arange(4), 0)[1])
        seen.append(len(graphs))
    assert seen == [seen[0]] * 4
