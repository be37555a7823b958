"""Flow-matching families in miniature: real classes, random weights, what the directory says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from texforce_ray.shapes import networks
from texforce_ray.shapes.captions import vocabulary
from texforce_ray.shapes.flow_networks import build_t5_tokenizer
from texforce_ray.shapes.tokenizer import MAX_LENGTH, build_tokenizer

WORDS = vocabulary()
SIDE = 64  # pixels
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Mini:
    """How a miniature is drawn.

    guidance: the scale of the stock call. length: `max_sequence_length`. lora: adapters by section
    of the config, all parts of the family. loadable: parts that diffusers' loader reaches.
    """

    family: str
    guidance: float
    lora: dict[str, list[str]]
    loadable: tuple[str, ...]
    shift: dict[str, Any]
    length: int = 16


_CLIP, _T5 = ["q_proj", "v_proj"], ["q", "v", "wo"]
_SD3 = {"text_encoder": _CLIP, "text_encoder_2": _CLIP, "denoiser": ["to_q", "add_k_proj"]}
_STATIC, _DYNAMIC = {"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True}
_REACHED = ("text_encoder", "text_encoder_2", "transformer")
MINIATURES = {
    "sd3": Mini("sd3", 4.0, {**_SD3, "text_encoder_3": _T5}, _REACHED, _STATIC),
    "sd3_no_t5": Mini("sd3", 3.0, _SD3, _REACHED, _STATIC),
    "sd35": Mini("sd35", 1.0, {**_SD3, "text_encoder_3": _T5}, _REACHED, _DYNAMIC),
    "flux_dev": Mini(
        "flux", 3.5, {"text_encoder": _CLIP, "text_encoder_2": _T5, "denoiser": ["to_q", "to_k"]},
        ("text_encoder", "transformer"), _DYNAMIC,
    ),
    "flux_schnell": Mini(
        "flux", 0.0, {"text_encoder": _CLIP, "text_encoder_2": _T5, "denoiser": ["to_q", "to_k"]},
        ("text_encoder", "transformer"), {"shift": 1.0},
    ),
    "z_image": Mini(
        "z_image", 2.0, {"text_encoder": ["q_proj", "o_proj"], "denoiser": ["to_q", "to_v"]},
        ("transformer",), {"shift": 3.0}, length=24,
    ),
}  # fmt: skip


def build(path: Path, name: str) -> None:
    """Save the miniature to `path`."""
    mini = MINIATURES[name]
    torch.manual_seed(0)
    shared = {"vae": _vae(), "scheduler": FlowMatchEulerDiscreteScheduler(**mini.shift)}
    if mini.family == "flux":
        pipe: Any = _flux(shared, guided=name == "flux_dev")
    elif mini.family == "z_image":
        pipe = _z_image(shared)
    else:
        pipe = _sd3(shared, t5=name != "sd3_no_t5", newer=mini.family == "sd35")
    for parameter in pipe.transformer.parameters():  # some are zero at first and hide the rest
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    pipe.save_pretrained(path)


def _vae() -> AutoencoderKL:
    vae = networks.build_vae()
    vae.register_to_config(scaling_factor=1.5, shift_factor=0.06)
    return vae


def _clip(width: int, projected: bool) -> Any:
    tokenizer = build_tokenizer(WORDS)
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=MAX_LENGTH,
            projection_dim=width, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(build_t5_tokenizer(WORDS)), d_model=width, d_kv=16, d_ff=64,
            num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def _sd3(shared: dict[str, Any], *, t5: bool, newer: bool) -> StableDiffusion3Pipeline:
    clip = build_tokenizer(WORDS)
    return StableDiffusion3Pipeline(
        **shared, text_encoder=_clip(24, True), tokenizer=clip, text_encoder_2=_clip(16, True),
        tokenizer_2=clip, text_encoder_3=_t5(48) if t5 else None,
        tokenizer_3=build_t5_tokenizer(WORDS) if t5 else None,
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
            num_attention_heads=2, attention_head_dim=16, joint_attention_dim=48,
            caption_projection_dim=32, pooled_projection_dim=40, pos_embed_max_size=8,
            qk_norm="rms_norm" if newer else None, dual_attention_layers=(0,) if newer else (),
        ),
    )  # fmt: skip


def _flux(shared: dict[str, Any], *, guided: bool) -> FluxPipeline:
    return FluxPipeline(
        **shared, text_encoder=_clip(24, False), tokenizer=build_tokenizer(WORDS),
        text_encoder_2=_t5(48), tokenizer_2=build_t5_tokenizer(WORDS),
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=48, pooled_projection_dim=24,
            guidance_embeds=guided, axes_dims_rope=(4, 6, 6),
        ),
    )  # fmt: skip


def _z_image(shared: dict[str, Any]) -> ZImagePipeline:
    clip = build_tokenizer(WORDS)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [token for token in clip.get_vocab() if len(token) == 1]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate([*letters, *special])}, merges=[],
        pad_token=special[0], eos_token=special[2], additional_special_tokens=special[1:],
    )  # fmt: skip
    tokenizer.chat_template = _TEMPLATE
    return ZImagePipeline(
        **shared, tokenizer=tokenizer,
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            )
        ),
        transformer=ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            cap_feat_dim=32, axes_dims=[4, 6, 6], axes_lens=[128, 32, 32],
        ),
    )  # fmt: skip
