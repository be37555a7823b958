"""Where pipelines and adapters are, and whether they can be; without torch, so it fails early."""

from __future__ import annotations

from pathlib import Path

from texforce_ray.errors import ConfigError
from texforce_ray.model.inspection import check_pipeline
from texforce_ray.model.snapshot import PARTS
from texforce_ray.records.files import from_json

EMBEDDED = Path(__file__).parent.parent / "shapes" / "weights"
# What adapters of these weights record as their base, and what those of earlier ones did.
EMBEDDED_BASE, REPLACED_BASES = "texforce-ray/shapes-2", ("embedded",)
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
DIFFUSERS_PICKLE = "pytorch_lora_weights.bin"
KOHYA_FILE = "kohya.safetensors"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PICKLE = "adapter_model.bin"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def locate_model(path: str, variant: str | None = None, single_file: str | None = None) -> str:
    """The directory of 'embedded' or of a local pipeline; a hub id or single file as it is.

    Args:
        path: `model.path`.
        variant: `model.variant`.
        single_file: `model.single_file_config`.

    Raises:
        ConfigError: a local path that is no pipeline, or one that would not be drawn as stock does.
    """
    folder = Path(path).expanduser()
    if folder.suffix.lower() in (".safetensors", *_PICKLES):
        return _single_file(path, folder, single_file)
    if single_file is not None:
        raise ConfigError(
            f"model.single_file_config: means nothing with model.path {path!r}, which is no "
            ".safetensors file; leave it null"
        )
    if path == "embedded":
        return str(EMBEDDED)
    if not (folder / "model_index.json").is_file():
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise ConfigError(
                f"model.path: {path} is not a diffusers pipeline: "
                + ("it holds no model_index.json" if folder.exists() else "it does not exist")
            )
        return path
    check_pipeline(folder, path, variant)
    return str(folder)


def _single_file(path: str, file: Path, config: str | None) -> str:
    """A checkpoint in one file, as other programs distribute them."""
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
    check_pipeline(folder, config, weights=False)
    return str(file)


def find_adapter(path: Path, origin: str | None = None) -> dict[str, Path]:
    """The files of an adapter by the names under which `read_adapter` finds them elsewhere.

    Raises:
        ConfigError: `path` is neither an adapter's directory nor a LoRA file, and what it is.
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
                raise _no_adapter(origin, f"{folder / PEFT_CONFIG} has no {PEFT_WEIGHTS} beside it")
            # The part's own folder says which part it is, here and where it is sent.
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
        raise _no_adapter(origin, f"it holds {len(others)} files: name one of them")
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
    """What `read_adapter` needs of an adapter, by name, so that another machine can read it.

    Raises:
        ConfigError: `path` is neither an adapter's directory nor a LoRA file, or cannot be read.
    """
    try:
        return {name: file.read_bytes() for name, file in find_adapter(path).items()}
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def base_of(path: Path) -> str | None:
    """The base model that an adapter directory names; of local ones, the plain absolute path.

    Raises:
        ConfigError: it was trained on weights of 'embedded' that have been replaced since.
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
            "whose weights have been replaced since: on the present ones it means nothing. Train "
            "it again, or use the version of texforce-ray that it was trained with"
        )
    return base if isinstance(base, str) and base not in ("", "unknown") else None


def recorded_name(base: str) -> str:
    """What an adapter records of its base: of 'embedded', which of its weights."""
    return EMBEDDED_BASE if same_base(base) == "embedded" else base


def layers_per_block(base: str) -> int:
    """A local pipeline's U-Net's; 2, as of every published Stable Diffusion, if none is found."""
    folder = EMBEDDED if base == "embedded" else Path(base).expanduser()
    try:
        found = from_json((folder / "unet" / "config.json").read_bytes())["layers_per_block"]
    except (OSError, ValueError, KeyError, TypeError):
        return 2
    return found if isinstance(found, int) else 2


def same_base(base: str) -> str:
    """One name for one base: paths without `..`, links and a last slash; hub ids as they are."""
    if base in ("embedded", EMBEDDED_BASE):
        return "embedded"
    folder = Path(base).expanduser()
    if folder.exists():
        return "embedded" if folder.resolve() == EMBEDDED.resolve() else str(folder.resolve())
    return base.rstrip("/") or base
