"""Where the base pipeline is, and whether it can be one; without torch, so that it fails early."""

from __future__ import annotations

import json
from pathlib import Path

from texforce_ray.errors import ConfigError

EMBEDDED = Path(__file__).parent.parent / "shapes" / "weights"
SUPPORTED = ("StableDiffusionPipeline",)


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
        kind = json.loads(index.read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"model.path: {index} cannot be read: {error}") from None
    if kind not in SUPPORTED:
        raise ConfigError(f"model.path: {path} holds a {kind}; supported is {', '.join(SUPPORTED)}")
    return str(folder)
