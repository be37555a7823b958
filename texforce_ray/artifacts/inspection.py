"""Checks the configs of a pipeline directory before anything is loaded. No torch.

Anything that would change the image and is not supported is rejected by file and key: if we drew a
model differently from stock diffusers, we would train it for images that nobody gets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from texforce_ray.artifacts.families import DDPM_SCHEDULERS, Family, family_in
from texforce_ray.errors import ConfigError
from texforce_ray.files import from_json

_SCHEDULER_VALUES: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (False,),
    "final_sigmas_type": ("zero", "sigma_min"),
}
# Inputs that U-Nets may have besides latent, timestep and prompt.
_UNET_INPUTS = (
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)
# The only values of these keys that `model.attention` supports.
_UNET_VALUES = {
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "attention_type": "default",
    "cross_attention_norm": None,
}
_WEIGHTS = re.compile(
    r"(model|diffusion_pytorch_model|pytorch_model)(-\d+-of-\d+)?"
    r"(\.(?P<variant>[\w-]+?))?(-\d+-of-\d+)?\.(safetensors|bin)"
)


def check_pipeline(
    folder: Path,
    path: str,
    variant: str | None = None,
    *,
    weights: bool = True,
    own: Family | None = None,
    left_out: Sequence[str] = (),
) -> Family:
    """Reject a local pipeline that cannot be loaded or would generate other images than stock.

    Args:
        folder: where it is.
        path: its name in errors.
        variant: of the weight files, e.g. 'fp16'.
        weights: whether to check its weights too.
        own: the user's own family, if any.
        left_out: optional text encoders that are not to be loaded.

    Returns:
        Its family.

    Raises:
        ConfigError: names the file and the key.
    """
    index = read_json(folder / "model_index.json", path)
    family = family_in(index, path, own, left_out)
    encoders, denoiser = family.encoders, family.denoiser
    xl = len(encoders) > 1
    for name in (*encoders, *family.tokenizers, denoiser, "vae", "scheduler"):
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or not entry[1]:
            raise ConfigError(
                f"model.path: {path} has no {name} (model_index.json has {entry!r}): it cannot "
                "make images from prompts by itself"
            )
        if not (folder / name).is_dir():
            raise ConfigError(
                f"model.path: {path} has no folder {name}, which model_index.json names"
            )
    for name, wanted in encoders.items():
        if index[name][1] != wanted:
            raise ConfigError(
                f"model.path: {path}: {name} is a {index[name][1]}; supported: {wanted}"
            )
        config = read_json(folder / name / "config.json", path)
        if config.get("use_attention_mask"):
            raise _not_understood(path, f"{name}/config.json", "use_attention_mask", True, "false")
    network = read_json(folder / denoiser / "config.json", path)
    vae = read_json(folder / "vae" / "config.json", path)
    if denoiser == "unet":
        check_unet(network, f"model.path: {path}", xl=xl)
    elif (kind := network.get("_class_name")) != family.denoiser_class:
        raise ConfigError(
            f"model.path: {path}: the {denoiser} is a {kind}; supported: {family.denoiser_class}"
        )
    _check_vae(vae, path, family)
    channels, latents = network.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latents * family.packed:
        raise ConfigError(
            f"model.path: {path}: {denoiser}/config.json has in_channels {channels} where the VAE "
            f"has {latents} latent channels: a denoiser for inpainting, depth or editing also "
            "needs an image, and cannot be trained from prompts alone"
        )
    _check_scheduler(read_json(folder / "scheduler" / "scheduler_config.json", path), path, family)
    if weights:
        _check_weights(folder, family.models, path, variant)
    return family


def check_unet(config: dict[str, Any], where: str, *, xl: bool) -> None:
    """Reject a U-Net with unsupported inputs or attention; `where` begins the error.

    Raises:
        ConfigError: names the key.
    """
    kind = config.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise ConfigError(f"{where}: the U-Net is a {kind}; supported: UNet2DConditionModel")
    for key in _UNET_INPUTS:
        if config.get(key) is not None:
            raise ConfigError(
                f"{where}: the U-Net's config has {key} {config[key]!r}, an input that is not "
                "supported (models distilled to follow a guidance embedding, such as LCM, have "
                "time_cond_proj_dim); without it the images would differ from stock diffusers'"
            )
    for key, value in _UNET_VALUES.items():
        given = config.get(key, value)
        if any(each != value for each in (given if isinstance(given, list) else [given])):
            raise ConfigError(
                f"{where}: the U-Net's config has {key} {given!r}; supported: {value!r}"
            )
    wanted = "text_time" if xl else None
    if config.get("addition_embed_type") != wanted:
        raise ConfigError(
            f"{where}: the U-Net's config has addition_embed_type "
            f"{config.get('addition_embed_type')!r}; this kind of pipeline needs {wanted!r}"
        )


def _check_vae(config: dict[str, Any], path: str, family: Family) -> None:
    kind, file = config.get("_class_name", "AutoencoderKL"), "vae/config.json"
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        raise ConfigError(
            f"model.path: {path}: the VAE is a {kind}; supported: AutoencoderKL, AutoencoderTiny"
        )
    if "shift_factor" in family.vae_keys:
        if config.get("shift_factor") is None:
            raise _not_understood(path, file, "shift_factor", None, "a number")
    elif config.get("shift_factor") and kind == "AutoencoderKL":
        raise _not_understood(path, file, "shift_factor", config["shift_factor"], "none")
    given = [key for key in ("latents_mean", "latents_std") if config.get(key) is not None]
    # Stock SDXL uses both or none, the others neither.
    if given and ("latents_mean" not in family.vae_keys or len(given) == 1):
        raise _not_understood(path, file, given[0], config[given[0]], "none")


def _check_scheduler(config: dict[str, Any], path: str, family: Family) -> None:
    kind, file = config.get("_class_name"), "scheduler/scheduler_config.json"
    if family.schedulers is not DDPM_SCHEDULERS:
        if kind not in family.schedulers:
            wanted = " or ".join(family.schedulers)
            raise _not_understood(path, file, "_class_name", kind, wanted)
        for key in ("stochastic_sampling", "invert_sigmas"):
            if family.process == "flow" and config.get(key):
                raise _not_understood(path, file, key, config[key], "false")
        return
    if kind not in DDPM_SCHEDULERS:
        raise ConfigError(
            f"model.path: {path}: {file} is a {kind}, whose noise schedule is not a DDPM's: DDIM "
            "with other betas would generate different images; supported: "
            f"{', '.join(DDPM_SCHEDULERS)}"
        )
    for key, values in _SCHEDULER_VALUES.items():
        if config.get(key) is not None and config[key] not in values:
            raise _not_understood(path, file, key, config[key], " or ".join(map(repr, values)))


def _check_weights(folder: Path, parts: Iterable[str], path: str, variant: str | None) -> None:
    """Check that every part has usable weights, and that some have the requested variant."""
    seen: set[str | None] = set()
    for part in parts:
        names = map(_WEIGHTS.fullmatch, (file.name for file in (folder / part).iterdir()))
        variants = {match["variant"] for match in names if match}
        if not variants:
            raise ConfigError(f"model.path: {path}: {part} holds no weights")
        if not variants & {None, variant}:
            there = sorted(filter(None, variants))
            raise ConfigError(
                f"model.path: {path}: {part} has only weights of variant {', '.join(there)}; set "
                f"model.variant={there[0]}" + (f" instead of {variant!r}" if variant else "")
            )
        seen |= variants
    if variant not in seen and variant is not None:
        raise ConfigError(
            f"model.variant: {path} has no weights of variant {variant!r}; leave it null"
        )


def _not_understood(path: str, file: str, key: str, value: Any, right: str) -> ConfigError:
    return ConfigError(
        f"model.path: {path}: {file} has {key} {value!r}, which is not supported (should be "
        f"{right}): the images would differ from stock diffusers'"
    )


def read_json(file: Path, path: str) -> dict[str, Any]:
    """The mapping in a config file.

    Raises:
        ConfigError: missing, damaged, or not a mapping.
    """
    try:
        values = from_json(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"model.path: {path} lacks {file.parent.name}/{file.name}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {file} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"model.path: {file} should hold a JSON object")
    return values
