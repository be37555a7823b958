"""Others' U-Nets and U-Net LoRAs, taken as they are: what the text encoder is tuned for."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from peft import PeftModel
from torch import Tensor, nn

from texforce_ray.errors import ConfigError


def load_unet(path: str, dtype: torch.dtype, replaced: UNet2DConditionModel) -> nn.Module:
    """A whole U-Net from a directory (of the U-Net, or of a pipeline with one) or hub id.

    Raises:
        ConfigError: not a U-Net, or one that does not fit the pipeline.
    """
    folder = Path(path).expanduser()
    inside = (folder / "unet" / "config.json").is_file()
    try:
        unet = UNet2DConditionModel.from_pretrained(
            str(folder) if folder.exists() else path,
            subfolder="unet" if inside else None,
            dtype=dtype,
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"model.unet: cannot load {path!r}: {error}") from error
    for key in ("in_channels", "out_channels", "cross_attention_dim", "sample_size"):
        if unet.config[key] != replaced.config[key]:
            raise ConfigError(
                f"model.unet: {path} has {key} {unet.config[key]}, the pipeline's U-Net has "
                f"{replaced.config[key]}"
            )
    return unet


def merge_unet_adapter(pipe: StableDiffusionPipeline, path: str) -> None:
    """Merge a U-Net LoRA into the pipeline's U-Net: PEFT's folder, diffusers' file, attn_procs.

    Raises:
        ConfigError: nothing there, damaged, or of another U-Net.
    """
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    folder = Path(path).expanduser()
    if not folder.exists() and path.startswith((".", "/", "~")):
        raise ConfigError(f"model.unet_adapters: {path} does not exist")
    try:
        if (folder / "adapter_config.json").is_file():
            pipe.unet = PeftModel.from_pretrained(pipe.unet, str(folder)).merge_and_unload()
        elif (folder / "unet" / "adapter_config.json").is_file():
            tuned = PeftModel.from_pretrained(pipe.unet, str(folder / "unet"))
            pipe.unet = tuned.merge_and_unload()
        else:
            _merge_diffusers(pipe, folder if folder.exists() else Path(path))
    except ConfigError:
        raise
    except Exception as error:  # the loaders raise anything on files of other models
        message = str(error).strip().splitlines()
        raise ConfigError(
            f"model.unet_adapters: {path} does not fit this U-Net or is damaged: "
            f"{message[0] if message else type(error).__name__}"
        ) from error
    after = pipe.unet.state_dict()
    if after.keys() != before.keys():
        raise ConfigError(f"model.unet_adapters: {path} is more than a LoRA of the U-Net")
    if all(torch.equal(before[key], value) for key, value in after.items()):
        raise ConfigError(
            f"model.unet_adapters: {path} changes nothing in the U-Net: is it one of another part?"
        )


def _merge_diffusers(pipe: StableDiffusionPipeline, path: Path) -> None:
    state = _state(path)
    if state is not None and any(".processor." in key for key in state):
        _merge_processors(pipe.unet, state, str(path))
        return
    pipe.load_lora_weights(str(path))
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()


def _state(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a local LoRA file; None for a hub id."""
    files = [path] if path.is_file() else [path / LORA_WEIGHT_NAME_SAFE, path / LORA_WEIGHT_NAME]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        if path.exists():
            raise ConfigError(f"model.unet_adapters: {path} holds no LoRA weights")
        return None
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


@torch.no_grad()
def _merge_processors(unet: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """The attn_procs format of diffusers 0.14 to 0.20: `<attn>.processor.to_q_lora.down.weight`."""
    found = {key.removeprefix("unet.") for key in state}
    tensors = {key.removeprefix("unet."): value for key, value in state.items()}
    for key in sorted(k for k in found if k.endswith("_lora.down.weight")):
        attention, _, rest = key.partition(".processor.")
        which = rest.removesuffix("_lora.down.weight")
        target = f"{attention}.to_out.0" if which == "to_out" else f"{attention}.{which}"
        try:
            weight: Tensor = unet.get_submodule(target).get_parameter("weight")
        except AttributeError:
            raise ConfigError(
                f"model.unet_adapters: {name} is an adapter of another U-Net: this one has no "
                f"layer {target}"
            ) from None
        down, up = tensors[key], tensors[key.replace("_lora.down.", "_lora.up.")]
        update = up.float() @ down.float()
        if update.shape != weight.shape:
            raise ConfigError(
                f"model.unet_adapters: {name} is an adapter of another U-Net: layer {target} is "
                f"{tuple(weight.shape)} here and {tuple(update.shape)} there"
            )
        weight += update.to(weight)
