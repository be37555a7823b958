"""Scale and layers in PEFT's `adapter_config.json`, or in diffusers' copy of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig

from texforce_ray.errors import ConfigError
from texforce_ray.model.lora_layers import PREFIX

# These either change nothing once the adapter is trained, or only select its layers, which the
# tensors show themselves.
_FREE = {
    "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_VARIANTS = {
    "bias": "LoRA that trains biases too",
    "lora_bias": "LoRA with a bias in B",
    "modules_to_save": "LoRA plus whole trained modules",
    "trainable_token_indices": "LoRA plus trained token embeddings",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "layer_replication": "LoRA on a model whose layers are replicated",
    "target_parameters": "LoRA on bare parameters",
    "alora_invocation_tokens": "activated LoRA",
}
# Other initialisations change the base model's own weights, so that its files no longer fit.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_EMPTY: tuple[Any, ...] = (None, False, "", "none", [], {})


@dataclass(frozen=True)
class Scale:
    """alpha / r of every layer, as PEFT computes it.

    alpha: of layers that match no pattern. patterns: {regular expression: alpha}.
    rank_stabilized: the update is alpha / sqrt(r) * B A.
    """

    alpha: float
    patterns: Mapping[str, float]
    rank_stabilized: bool

    def alpha_of(self, name: str, rank: int) -> float:
        """The alpha that makes alpha / rank the scale of this layer."""
        forms = (name, name.removeprefix(PREFIX), PREFIX + name)
        alpha = self.alpha
        for pattern, value in self.patterns.items():
            if any(re.match(rf"(.*\.)?({pattern})$", form) for form in forms):
                alpha = value
                break
        return alpha * rank**0.5 if self.rank_stabilized else alpha


def read_scale(config: Mapping[str, Any], origin: str) -> Scale:
    """The scale in a config.

    Raises:
        ConfigError: not plain LoRA (names what it is), or impossible values.
    """
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ConfigError(f"{origin} is a {kind} adapter; only plain LoRA is supported")
    _check_plain(config, origin)
    try:
        patterns = {str(k): _number(v) for k, v in (config.get("alpha_pattern") or {}).items()}
        for pattern in patterns:
            re.compile(pattern)
        return Scale(_number(config["lora_alpha"]), patterns, bool(config.get("use_rslora")))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        raise ConfigError(
            f"{origin} holds a damaged adapter: its lora_alpha or alpha_pattern is not a number: "
            f"{error!r}"
        ) from error


def _check_plain(config: Mapping[str, Any], origin: str) -> None:
    for key, value in config.items():
        if key in _FREE or value in _EMPTY:
            continue
        if key in _VARIANTS:
            raise ConfigError(
                f"{origin} is {_VARIANTS[key]} (it sets {key}), not a plain LoRA adapter; only "
                "plain LoRA is supported"
            )
        if value != getattr(LoraConfig, key, None):
            raise ConfigError(
                f"{origin} sets {key} to {str(value)[:80]}, which is not understood; only "
                "plain LoRA is supported"
            )
    start = config.get("init_lora_weights", True)
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        raise ConfigError(
            f"{origin} was initialised with init_lora_weights={start!r}, which changes the base "
            "model's own weights; convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def _number(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool | str) or not abs(number) < float("inf"):
        raise ValueError(value)
    return number


def target_names(config: Mapping[str, Any]) -> list[str] | None:
    """The target modules if they alone determine the layers; None if the tensors must."""
    named = config.get("target_modules")
    narrowed = any(config.get(key) for key in ("layers_to_transform", "exclude_modules"))
    if narrowed or not isinstance(named, list) or not named:
        return None
    return [str(name) for name in named]


def portable_config(rank: int, alpha: float, targets: tuple[str, ...], base: str) -> dict[str, Any]:
    """An adapter_config.json with keys that every PEFT since 0.13 knows: it raises on others."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "revision": None,
        # PEFT matches suffixes of names: without the prefix they fit both layouts of CLIP.
        "target_modules": sorted({name.removeprefix(PREFIX) for name in targets}),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
