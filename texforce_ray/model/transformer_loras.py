"""LoRA files of transformers that other programs wrote: FLUX's of kohya's scripts and the like."""

from __future__ import annotations

from collections.abc import Mapping

import diffusers
from torch import Tensor

from texforce_ray.artifacts.snapshot import PARTS
from texforce_ray.errors import ConfigError
from texforce_ray.model.lora_layers import A, format_names

_DOWN = (A, ".lora_down.weight", ".lora_A.default.weight", ".down.weight")


def from_other_program(
    state: Mapping[str, Tensor], pipeline: str, origin: str
) -> dict[str, Tensor]:
    """The state under diffusers' names, by the converter of a pipeline's class.

    A state whose names are diffusers' already is returned as it is.

    Raises:
        ConfigError: it is of another model, or the converter left some layers out.
    """
    if all(key.startswith(tuple(f"{part}." for part in PARTS)) for key in state):
        return dict(state)
    try:
        converted = getattr(diffusers, pipeline).lora_state_dict(dict(state))
    except Exception as error:  # converters raise anything on files of other models
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{origin}: its layers are not those of a {pipeline}: {words[0][:200]}"
        ) from error
    given = [key for key in state if key.endswith(_DOWN)]
    wanted = sum(map(_pieces, given))
    found = sum(key.endswith(A) for key in converted)
    if not given or found != wanted:
        raise ConfigError(
            f"{origin}: diffusers' converter understands {found} of {wanted} layers of this file "
            f"(it has {format_names(given or state)}); save it in diffusers' form"
        )
    return dict(converted)


def _pieces(key: str) -> int:
    """Layers of diffusers for one of FLUX's own, which fuses queries, keys, values, and an MLP."""
    name = key.partition(".lora")[0]
    if name.endswith(("_attn_qkv", ".attn.qkv", "_attention_qkv", ".attention.qkv")):
        return 3
    return 4 if name.endswith("linear1") else 1
