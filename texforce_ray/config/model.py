"""The frozen pipeline, the trained adapters and the denoising process."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from texforce_ray.config.fields import DType, Section, free, recorded


class ModelConfig(Section):
    """The base pipeline. Everything in it stays frozen; its denoiser can be replaced by another."""

    path: str = Field(
        "embedded",
        description="'embedded' (the shapes world), a diffusers directory, a hub id, or one "
        ".safetensors file with single_file_config",
    )
    leave_out: tuple[str, ...] = Field(
        (), description="text encoders to do without: text_encoder_3 (T5) of Stable Diffusion 3"
    )
    park_encoders: bool = free(
        False,
        "keep text encoders that are not trained in host memory: they visit the GPU only for "
        "prompts whose embeddings are not cached",
    )
    cached_prompts: int = Field(
        1024,
        ge=0,
        description="flow-matching models: prompts whose embeddings by encoders that are not "
        "trained are kept, in host memory; 0: encode them again each time",
    )
    revision: str | None = Field(None, description="hub revision to pin")
    variant: str | None = Field(None, description="weight file variant, e.g. 'fp16'")
    dtype: DType = Field("float32", description="dtype of the frozen weights")
    denoiser: str | None = Field(
        None,
        description="directory or hub id of a whole U-Net or transformer to use instead of the "
        "pipeline's",
    )
    denoiser_adapters: tuple[str, ...] = Field(
        (),
        description="LoRAs of the denoiser that are merged into it and stay frozen, in any form "
        "that docs/adapters.md lists",
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
        description="torch.compile denoiser and VAE decoder: faster on a GPU, after a minute or "
        "two in which each kind of block is compiled",
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


class T5AdapterConfig(AdapterConfig):
    """A LoRA adapter on a T5 encoder."""

    target_modules: tuple[str, ...] = Field(
        ("q", "k", "v", "o"),
        min_length=1,
        description="names of the encoder's linear layers that get an adapter",
    )


class DenoiserAdapterConfig(AdapterConfig):
    """A LoRA adapter on the denoiser, trained instead of the text encoder's or jointly with it."""

    rank: int = Field(4, ge=1, description="rank of every LoRA pair")
    alpha: float = Field(4.0, gt=0, description="scale; the update is alpha / rank * B A")
    target_modules: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"),
        min_length=1,
        description="names of the denoiser's linear layers that get an adapter",
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
    text_encoder_3: T5AdapterConfig | None = Field(
        None, description="Stable Diffusion 3's T5; {}: defaults"
    )
    denoiser: DenoiserAdapterConfig | None = Field(
        None,
        description="the U-Net or transformer too (or, with text_encoder: null, alone); {}: "
        "defaults",
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

    @property
    def third(self) -> AdapterConfig | None:
        """The adapter of the third text encoder."""
        return self.text_encoder_3

    @property
    def encoders(self) -> list[AdapterConfig]:
        """The adapters of text encoders."""
        return [a for a in (self.text_encoder, self.second, self.third) if a is not None]

    @model_validator(mode="after")
    def _something(self) -> LoraConfig:
        if not self.encoders and self.denoiser is None:
            raise ValueError(
                "text_encoder: null leaves nothing to train; set another part, such as denoiser: {}"
            )
        return self


# How much noise each kernel adds by default, as its authors do.
_ETA = {"cps": 0.8, "flow": 0.7, "dance": 0.3, "ode": 0.0}


class WindowConfig(Section):
    """The steps that add noise and are trained, drawn once an iteration; all others add none."""

    size: int = Field(3, ge=1, description="adjacent steps with noise, all of them trained")
    within: tuple[int, int] | None = Field(
        None,
        description="first step, counted from 0, and end of the range that the window is drawn "
        "from, e.g. [0, 5]; null: the first half",
    )


class DiffusionConfig(Section):
    """The Markov decision process: how latents are denoised, with how much noise and guidance."""

    process: Literal["ddim", "flow"] = Field(
        "ddim", description="'flow' for flow-matching models such as Stable Diffusion 3 and FLUX"
    )
    kernel: Literal["cps", "flow", "dance", "ode"] = Field(
        "cps",
        description="how a flow's steps add noise: Flow-CPS, Flow-GRPO's SDE, DanceGRPO's, or not "
        "at all: docs/flow.md",
    )
    window: WindowConfig | None = Field(
        None, description="add noise in, and train, only a few steps; {}: three of the first half"
    )
    steps: int = Field(50, ge=1, le=500, description="denoising steps")
    eta: float = Field(
        1.0,
        ge=0,
        le=1,
        description="how much noise: ddim's share of DDPM noise, or a flow kernel's a (default: "
        "cps .8, flow .7, dance .3); 0, a deterministic solver, has no likelihood: for objectives "
        "other than ppo",
    )
    guidance_scale: float = Field(
        5.0,
        ge=0,
        description="g, as in the stock pipeline: at most 1 means no guidance (Z-Image: 0; "
        "FLUX.1-dev always reads it)",
    )
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
    max_sequence_length: int | None = Field(
        None,
        ge=1,
        description="tokens of the longest text encoder (T5 and the like), as in stock pipelines; "
        "null: their default",
    )
    negative_prompt: str | None = Field(
        None,
        description="prompt that guidance steers away from, through the same trained encoder; "
        "null: the empty prompt",
    )

    @property
    def window_range(self) -> tuple[int, int]:
        """First step and end of the range that windows are drawn from: all steps without one."""
        if self.window is None:
            return 0, self.steps
        return self.window.within or (0, max(self.window.size, self.steps // 2))

    @model_validator(mode="before")
    @classmethod
    def _kernels_own_eta(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("process") != "flow":
            return values
        own = _ETA.get(values.get("kernel", "cps"), 1.0)
        return {"eta": own} | values

    @model_validator(mode="after")
    def _flows(self) -> DiffusionConfig:
        if self.process == "ddim" and self.kernel != "cps":
            raise ValueError(
                f"kernel: {self.kernel!r} is for flow-matching models; leave it out, or set "
                "process=flow"
            )
        if self.kernel == "ode" and self.eta:
            raise ValueError(f"eta: {self.eta:g} with kernel 'ode', which adds no noise; use 0")
        if self.window is None:
            return self
        if self.process == "ddim" or not self.eta:
            raise ValueError(
                "window: limits the noise of flow-matching models; leave it null with process=ddim "
                "(whose stock pipelines know no windows) and with eta 0, which adds no noise"
            )
        first, end = self.window_range
        if not 0 <= first <= end - self.window.size or end > self.steps:
            raise ValueError(
                f"window: {self.window.size} steps within [{first}, {end}] of {self.steps}; they "
                "must fit there"
            )
        return self

    @model_validator(mode="after")
    def _guided(self) -> DiffusionConfig:
        if (self.height is None) != (self.width is None):
            raise ValueError("height, width: give both, or leave both null for the model's own")
        return self
