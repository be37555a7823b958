"""The frozen pipeline, the trained adapters and the denoising process."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from texforce_ray.config.fields import DType, Section, free, recorded


class ModelConfig(Section):
    """The base pipeline. Everything in it stays frozen; its U-Net can be replaced by another."""

    path: str = Field(
        "embedded",
        description="'embedded' (the shapes world), a diffusers directory, a hub id, or one "
        ".safetensors file with single_file_config",
    )
    revision: str | None = Field(None, description="hub revision to pin")
    variant: str | None = Field(None, description="weight file variant, e.g. 'fp16'")
    dtype: DType = Field("float32", description="dtype of the frozen weights")
    unet: str | None = Field(
        None, description="directory or hub id of a whole U-Net to use instead of the pipeline's"
    )
    unet_adapters: tuple[str, ...] = Field(
        (),
        description="U-Net LoRAs that are merged into the U-Net and stay frozen, in any form that "
        "docs/adapters.md lists",
    )
    family: str | None = Field(
        None,
        pattern=r"^[\w.]+:\w+$",
        description="your own model family, 'package.module:FAMILY': docs/extending.md",
    )
    single_file_config: str | None = Field(
        None,
        description="if path is one .safetensors file: a diffusers directory of the same kind "
        "of model, whose configs and tokenizers are read",
    )
    compile: bool = Field(
        False,
        description="torch.compile the U-Net: faster, but the first batch of each shape takes a "
        "minute or more",
    )
    device: str = free("auto", "'auto' (cuda if the actor was given a GPU), 'cpu', 'cuda'")


class AdapterConfig(Section):
    """A LoRA adapter on one part."""

    rank: int = Field(16, ge=1, description="rank of every LoRA pair")
    alpha: float = Field(16.0, gt=0, description="scale; the update is alpha / rank * B A")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        min_length=1,
        description="names of the part's linear layers that get an adapter",
    )
    lr: float | None = recorded(None, "peak learning rate; default: optimizer.lr", gt=0)


class DenoiserAdapterConfig(AdapterConfig):
    """A LoRA adapter on the U-Net, trained instead of the text encoder's or jointly with it."""

    rank: int = Field(4, ge=1, description="rank of every LoRA pair")
    alpha: float = Field(4.0, gt=0, description="scale; the update is alpha / rank * B A")
    target_modules: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        description="names of the U-Net's linear layers that get an adapter",
    )


def _form(value: Any) -> str:
    return "same" if isinstance(value, str) else "adapter"


# With a discriminator, a wrong value gets one error instead of one for each member of the union.
_SecondAdapter: TypeAlias = Annotated[
    Annotated[AdapterConfig, Tag("adapter")] | Annotated[Literal["same"], Tag("same")],
    Discriminator(_form),
]


class LoraConfig(Section):
    """The trained adapters, by part; a part that is null stays frozen."""

    text_encoder: AdapterConfig | None = Field(
        default_factory=AdapterConfig, description="the first text encoder, as in TexForce"
    )
    text_encoder_2: _SecondAdapter | None = Field(
        "same",
        description="the second text encoder, if the model has one; 'same': like text_encoder",
    )
    denoiser: DenoiserAdapterConfig | None = Field(
        None, description="the U-Net too (or, with text_encoder: null, alone); {}: defaults"
    )
    init: str | None = Field(
        None,
        min_length=1,
        description="adapter to start from: a folder or file in any form that docs/adapters.md "
        "lists, with the same trained parts, layers and ranks; null: the base model",
    )

    @property
    def second(self) -> AdapterConfig | None:
        """The adapter of the second text encoder."""
        return self.text_encoder if self.text_encoder_2 == "same" else self.text_encoder_2

    @model_validator(mode="after")
    def _something(self) -> LoraConfig:
        if self.text_encoder is None and self.second is None and self.denoiser is None:
            raise ValueError(
                "text_encoder: null leaves nothing to train; set another part, such as denoiser: {}"
            )
        return self


class DiffusionConfig(Section):
    """The Markov decision process: DDIM with noise, and classifier-free guidance."""

    steps: int = Field(50, ge=1, le=500, description="denoising steps")
    eta: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of DDPM noise; 0, a deterministic solver, has no likelihood: for "
        "objectives other than ppo",
    )
    guidance_scale: float = Field(5.0, ge=0, description="g; at most 1 means no guidance")
    storage_dtype: Literal["float32", "float16"] = Field(
        "float32",
        description="dtype of stored latents; the sampler continues from the stored value",
    )
    height: int | None = Field(None, ge=8, description="image height in pixels; null: the model's")
    width: int | None = Field(None, ge=8, description="image width in pixels; null: the model's")
    clip_skip: int | None = Field(
        None,
        ge=1,
        description="last layers of the text encoder to skip, counted as in diffusers: 1 uses the "
        "last but one (which other programs call 2)",
    )
    negative_prompt: str | None = Field(
        None,
        description="prompt that guidance steers away from, through the same trained encoder; "
        "null: the empty prompt",
    )

    @model_validator(mode="after")
    def _guided(self) -> DiffusionConfig:
        if (self.height is None) != (self.width is None):
            raise ValueError("height, width: give both, or leave both null for the model's own")
        if self.negative_prompt and self.guidance_scale <= 1:
            raise ValueError(
                f"negative_prompt: has no effect with guidance_scale {self.guidance_scale:g}; "
                "leave it null, or set guidance_scale above 1"
            )
        return self
