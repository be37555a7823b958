"""Finds and checks pipelines and adapters; without torch, so that errors come early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from texforce_ray.artifacts.families import FAMILIES, Family
from texforce_ray.artifacts.inspection import check_pipeline
from texforce_ray.artifacts.snapshot import PARTS
from texforce_ray.errors import ConfigError
from texforce_ray.files import from_json

EMBEDDED = Path(__file__).parent.parent / "shapes" / "weights"
EMBEDDED_FLOW = EMBEDDED.with_name("flow_weights")
EMBEDDED_MODELS = {"embedded": EMBEDDED, "embedded-flow": EMBEDDED_FLOW}
# The bases that adapters of these weights record, and those that earlier weights' recorded.
EMBEDDED_BASES = {"embedded": "texforce-ray/shapes-2", "embedded-flow": "texforce-ray/shapes-flow"}
REPLACED_BASES = ("embedded",)
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
DIFFUSERS_PICKLE = "pytorch_lora_weights.bin"
KOHYA_FILE = "kohya.safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def locate_model(
    path: str,
    variant: str | None = None,
    single_file: str | None = None,
    family: Family | None = None,
    left_out: Sequence[str] = (),
) -> str:
    """The directory of 'embedded' or of a local pipeline; a hub id or single file unchanged.

    Args:
        path: `model.path`.
        variant: `model.variant`.
        single_file: `model.single_file_config`.
        family: the user's own, if any.
        left_out: `model.leave_out`.

    Raises:
        ConfigError: a local path is not a pipeline, or would generate other images than stock.
    """
    folder = Path(path).expanduser()
    if folder.suffix.lower() in (".safetensors", *_PICKLES):
        return _single_file(path, folder, single_file, family)
    if single_file is not None:
        raise ConfigError(
            f"model.single_file_config: has no effect with model.path {path!r}, which is not a "
            ".safetensors file; leave it null"
        )
    if path in EMBEDDED_MODELS:
        return str(EMBEDDED_MODELS[path])
    if not (folder / "model_index.json").is_file():
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise ConfigError(
                f"model.path: {path} is not a diffusers pipeline: "
                + ("it holds no model_index.json" if folder.exists() else "it does not exist")
            )
        return path
    check_pipeline(folder, path, variant, own=family, left_out=left_out)
    return str(folder)


def _single_file(path: str, file: Path, config: str | None, family: Family | None) -> str:
    """Check a checkpoint in one file, as other programs distribute it."""
    if not file.is_file():
        raise ConfigError(f"model.path: the checkpoint {path} does not exist")
    if file.suffix.lower() != ".safetensors":
        raise ConfigError(
            f"model.path: {path} is a pickle, which may run code when it is opened; convert it to "
            ".safetensors or to a diffusers directory"
        )
    if config is None:
        raise ConfigError(
            f"model.path: {path} is a single-file checkpoint: set model.single_file_config to a "
            "diffusers directory of the same kind of model (its configs and tokenizers are read, "
            "its weights are not), or convert it with diffusers: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    folder = Path(config).expanduser()
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"model.single_file_config: {config} is not a diffusers directory: it holds no "
            "model_index.json"
        )
    check_pipeline(folder, config, weights=False, own=family)
    return str(file)


def find_adapter(path: Path, origin: str | None = None) -> dict[str, Path]:
    """The files of an adapter, by the names under which `read_adapter` looks for them.

    Raises:
        ConfigError: `path` is neither an adapter's directory nor a LoRA file; explains why.
    """
    origin = origin or str(path)
    if path.is_file():
        if path.suffix == ".safetensors":
            return {DIFFUSERS_FILE: path}
        if path.suffix in _PICKLES:
            return {DIFFUSERS_PICKLE: path}
        raise ConfigError(
            f"{origin} is not an adapter: a LoRA file ends with .safetensors or "
            f"{', '.join(_PICKLES)}"
        )
    found: dict[str, Path] = {}
    for folder in (path, *(path / part for part in PARTS)):
        if (folder / PEFT_CONFIG).is_file():
            weights = _first(folder, PEFT_WEIGHTS, PEFT_PICKLE)
            if weights is None:
                raise _no_adapter(origin, f"{PEFT_WEIGHTS} is missing in {folder}")
            # The folder's name shows which part it is, here and on the machine it is sent to.
            start = f"{folder.name}/" if folder.name in PARTS else ""
            _recorded_base(folder)
            found |= {start + file.name: file for file in (folder / PEFT_CONFIG, weights)}
    if found:
        return found
    if (file := _first(path, DIFFUSERS_FILE, DIFFUSERS_PICKLE)) is not None:
        return {file.name: file}
    if _first(path, PEFT_WEIGHTS, PEFT_PICKLE) is not None:
        raise _no_adapter(origin, f"{PEFT_CONFIG}, which has the scale, is missing")
    others = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if len(others) == 1:
        return {DIFFUSERS_FILE: others[0]}
    if others:
        raise _no_adapter(origin, f"it holds {len(others)} files: give the path of one")
    if (path / "adapter").is_dir():
        raise _no_adapter(origin, f"did you mean {path / 'adapter'}?")
    raise _no_adapter(origin, "it holds none of them" if path.is_dir() else "it does not exist")


def _first(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _no_adapter(origin: str, why: str) -> ConfigError:
    return ConfigError(
        f"{origin} is not an adapter: it should hold {PEFT_CONFIG} and {PEFT_WEIGHTS} (or "
        f"{PEFT_PICKLE}), or {DIFFUSERS_FILE}, or be a LoRA file; {why}"
    )


def adapter_files(path: Path) -> dict[str, bytes]:
    """The files of an adapter by name, so that `read_adapter` can read it on another machine.

    Raises:
        ConfigError: `path` is neither an adapter's directory nor a LoRA file, or cannot be read.
    """
    try:
        return {name: file.read_bytes() for name, file in find_adapter(path).items()}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def base_of(path: Path) -> str | None:
    """The base model that an adapter directory names; a local one as plain absolute path.

    Raises:
        ConfigError: it was trained on weights of 'embedded' that have since been replaced.
    """
    for folder in (path, *(path / part for part in PARTS)):
        if (folder / PEFT_CONFIG).is_file():
            base = _recorded_base(folder)
            return None if base is None else same_base(base)
    return None


def _recorded_base(folder: Path) -> str | None:
    try:
        base = from_json((folder / PEFT_CONFIG).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    if base in REPLACED_BASES:
        raise ConfigError(
            f"{folder}: this adapter was trained on an earlier version of the embedded pipeline, "
            "whose weights have since been replaced, so it does not fit the present ones; train it "
            "again, or use the version of texforce-ray that it was trained with"
        )
    return base if isinstance(base, str) and base not in ("", "unknown") else None


def recorded_name(base: str) -> str:
    """The base that an adapter records: for 'embedded', the version of its weights."""
    return EMBEDDED_BASES.get(same_base(base), base)


def pipeline_class(folder: Path) -> str:
    """The class named in a pipeline's directory; Stable Diffusion's if it names none."""
    return str(_index(folder).get("_class_name", "StableDiffusionPipeline"))


def known_pipeline(base: str) -> str | None:
    """The class of a base model that is here, if it is one of ours."""
    found = str(_index(EMBEDDED_MODELS.get(base) or Path(base)).get("_class_name"))
    return found if found in FAMILIES else None


def absent_encoders(base: str, left_out: Sequence[str] = ()) -> tuple[str, ...]:
    """Optional text encoders that a pipeline lacks, or that are left out; of a local one."""
    index = _index(EMBEDDED_MODELS.get(base) or Path(base))
    family = FAMILIES.get(str(index.get("_class_name")))
    optional = () if family is None else family.optional
    missing = [name for name in optional if not any(index.get(name) or ())]
    return tuple(dict.fromkeys((*left_out, *missing)))


def _index(folder: Path) -> dict[str, Any]:
    try:
        found = from_json((folder.expanduser() / "model_index.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def layers_per_block(base: str) -> int:
    """That of a local pipeline's U-Net; 2, as in all published Stable Diffusions, if unknown."""
    folder = EMBEDDED_MODELS.get(base) or Path(base).expanduser()
    try:
        return most_layers(from_json((folder / "unet" / "config.json").read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError):
        return 2


def most_layers(config: Mapping[str, Any]) -> int:
    """The most layers that a block of a U-Net has, by its config: 2 if it does not say."""
    layers = config.get("layers_per_block", 2)
    return layers if isinstance(layers, int) else max(layers)


def same_base(base: str) -> str:
    """One name per base: paths without `..`, links and trailing slash; hub ids as they are."""
    for name, recorded in EMBEDDED_BASES.items():
        if base in (name, recorded):
            return name
    folder = Path(base).expanduser()
    if not folder.exists():
        return base.rstrip("/") or base
    names = {path.resolve(): name for name, path in EMBEDDED_MODELS.items()}
    return names.get(folder.resolve(), str(folder.resolve()))
