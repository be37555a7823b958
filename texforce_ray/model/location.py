"""Where pipelines and adapters are, and whether they can be; without torch, so it fails early."""

from __future__ import annotations

from pathlib import Path

from texforce_ray.errors import ConfigError
from texforce_ray.model.snapshot import PARTS
from texforce_ray.records.files import from_json

EMBEDDED = Path(__file__).parent.parent / "shapes" / "weights"
SUPPORTED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def locate_model(path: str) -> str:
    """The directory of 'embedded' or of a local path; a hub id as it is.

    Raises:
        ConfigError: a local path that is not a diffusers pipeline, or one of another kind.
    """
    if path == "embedded":
        return str(EMBEDDED)
    folder = Path(path).expanduser()
    index = folder / "model_index.json"
    if not index.is_file():
        if folder.exists() or path.startswith((".", "/", "~")):
            raise ConfigError(
                f"model.path: {path} is not a diffusers pipeline: it holds no model_index.json"
            )
        return path
    try:
        kind = from_json(index.read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"model.path: {index} cannot be read: {error}") from None
    if kind not in SUPPORTED:
        raise ConfigError(f"model.path: {path} holds a {kind}; supported is {', '.join(SUPPORTED)}")
    return str(folder)


def adapter_files(path: Path) -> dict[str, bytes]:
    """What `read_adapter` needs of an adapter, by name, so that another machine can read it.

    Raises:
        ConfigError: `path` is neither an adapter directory nor a safetensors file.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return {DIFFUSERS_FILE: path.read_bytes()}
    folders = ("", *(f"{part}/" for part in PARTS))
    wanted = [folder + name for folder in folders for name in (PEFT_CONFIG, PEFT_WEIGHTS)]
    found = {name: path / name for name in wanted if (path / name).is_file()}
    if not any(name.endswith(PEFT_CONFIG) for name in found):
        found = {DIFFUSERS_FILE: path / DIFFUSERS_FILE} if (path / DIFFUSERS_FILE).is_file() else {}
    if not found:
        raise ConfigError(
            f"{path} is not an adapter: it should hold {PEFT_CONFIG} and {PEFT_WEIGHTS}, or "
            f"{DIFFUSERS_FILE}"
        )
    return {name: file.read_bytes() for name, file in found.items()}


def base_of(path: Path) -> str | None:
    """The base model that an adapter directory names."""
    for folder in (path, *(path / part for part in PARTS)):
        try:
            return from_json((folder / PEFT_CONFIG).read_text()).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            continue
    return None
