"""Keys of earlier versions, and their present names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_MOVED = {
    "ppo.epochs": "update.epochs",
    "ppo.num_minibatches": "update.minibatches",
    "ppo.max_skipped": "update.max_skipped",
    "ppo": "objective",
    "direct.method": "objective.method (with objective.kind: direct)",
    "direct": "objective (with kind: direct)",
    "lora.rank": "lora.text_encoder.rank",
    "lora.alpha": "lora.text_encoder.alpha",
    "lora.target_modules": "lora.text_encoder.target_modules",
    "lora.unet": "lora.denoiser",
    "model.unet": "model.denoiser",
    "model.unet_adapters": "model.denoiser_adapters",
}


def moved_keys(values: Any) -> list[str]:
    """A line for each key in plain data that has another name now."""
    return [f"  {key}: {advice}" for key, advice in _found(values, "")]


def _found(values: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items() if isinstance(values, dict) else ():
        key = f"{prefix}{name}"
        if isinstance(value, bool) and key == "lora.text_encoder":
            yield (
                key,
                "no longer takes true or false: null leaves it out, a mapping sets its adapter",
            )
        if key in ("ppo", "direct") and isinstance(value, dict) and value:
            for sub in value:
                old = f"{key}.{sub}"
                yield old, f"is now {_MOVED.get(old, f'objective.{sub}')}"
        elif key in _MOVED and value is None:
            yield key, "no longer exists; remove it"
        elif key in _MOVED:
            yield key, f"is now {_MOVED[key]}"
        elif isinstance(value, dict):
            yield from _found(value, f"{key}.")
