"""The policy's LoRA adapter: attach, read, set, switch off, export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from texforce_ray.errors import ConfigError
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.snapshot import LoraShape, PolicySnapshot

ADAPTER = "policy"
TEXT_ENCODER = "text_encoder"


def lora_config(shape: LoraShape) -> LoraConfig:
    return LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=list(shape.target_modules),
        init_lora_weights=True,
    )


class Adapter:
    """A float32 LoRA adapter on a backbone's text encoder; B = 0 at first, so it starts as base."""

    def __init__(self, backbone: Backbone, shape: LoraShape, seed: int) -> None:
        self.shape = shape
        self.backbone = backbone
        self._layers: list[BaseTunerLayer] = []
        encoder = backbone.text_encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(lora_config(shape), encoder, adapter_name=ADAPTER)
            except ValueError as error:
                names = sorted(
                    {n.rpartition(".")[2] for n, m in encoder.named_modules() if _is_linear(m)}
                )
                raise ConfigError(
                    f"lora.target_modules: {list(shape.target_modules)} match no layer of the "
                    f"text encoder, whose linear layers are {names}"
                ) from error
        self._layers = [m for m in encoder.modules() if isinstance(m, BaseTunerLayer)]
        for parameter in self.parameters():
            parameter.data = parameter.data.float()

    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters, float32, in a fixed order."""
        return [p for _, p in self.named_parameters()]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        found = self.backbone.text_encoder.named_parameters()
        return sorted((name, p) for name, p in found if f".{ADAPTER}." in name)

    def weights(self) -> dict[str, Tensor]:
        """Tensors by PEFT's key, e.g. `...q_proj.lora_A.weight`."""
        encoder = self.backbone.text_encoder
        return get_peft_model_state_dict(encoder, adapter_name=ADAPTER)

    def snapshot(self, version: int) -> PolicySnapshot:
        """A copy of the weights, as data that any process can hold."""
        weights = {k: v.detach().cpu().numpy().copy() for k, v in self.weights().items()}
        return PolicySnapshot(version, self.shape, {TEXT_ENCODER: weights})

    def load(self, snapshot: PolicySnapshot) -> None:
        """Set the weights to a snapshot's."""
        self.load_weights(snapshot.adapters[TEXT_ENCODER])

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        own = self.weights()
        if own.keys() != weights.keys():
            raise ConfigError(
                f"the adapter has other layers ({len(weights)} tensors) than this policy "
                f"({len(own)} tensors): was it trained on another model or target_modules?"
            )
        for key, tensor in own.items():
            if tensor.shape != weights[key].shape:
                raise ConfigError(
                    f"adapter tensor {key} is {weights[key].shape}, the policy's is "
                    f"{tuple(tensor.shape)}: was it trained with another rank?"
                )
            tensor.copy_(torch.from_numpy(np.array(weights[key])))

    def remove(self) -> None:
        """Take the adapter off: the text encoder is the base model's again, for good."""
        encoder = self.backbone.text_encoder
        wrapped = [(n, m) for n, m in encoder.named_modules() if isinstance(m, BaseTunerLayer)]
        for name, layer in wrapped:
            encoder.set_submodule(name, layer.get_base_layer())
        if hasattr(encoder, "peft_config"):
            del encoder.peft_config
        self._layers = []

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it, the text encoder is the base model's."""
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)
                layer.set_adapter(ADAPTER)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def export_adapter(snapshot: PolicySnapshot, directory: Path, base: str) -> None:
    """Write one directory that stock PEFT and stock diffusers both load.

    `adapter_config.json` + `adapter_model.safetensors` for `PeftModel.from_pretrained`,
    `pytorch_lora_weights.safetensors` for `pipe.load_lora_weights`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = {k: torch.from_numpy(v.copy()) for k, v in snapshot.adapters[TEXT_ENCODER].items()}
    config = lora_config(snapshot.shape)
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(directory)
    save_file(
        {f"base_model.model.{k}": v for k, v in weights.items()},
        directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    StableDiffusionPipeline.save_lora_weights(
        directory,
        text_encoder_lora_layers=weights,
        text_encoder_lora_adapter_metadata=lora_config(snapshot.shape).to_dict(),
        safe_serialization=True,
    )


def read_adapter(directory: Path, origin: str | None = None) -> PolicySnapshot:
    """Read an adapter directory in PEFT's format, ours or another's.

    Args:
        directory: where `adapter_config.json` and `adapter_model.safetensors` are.
        origin: how errors name it; default: `directory`.

    Raises:
        ConfigError: not a LoRA adapter, a damaged one, or a variant that is not plain LoRA.
    """
    origin = origin or str(directory)
    weights = directory / "adapter_model.safetensors"
    if not weights.is_file() or not (directory / "adapter_config.json").is_file():
        raise ConfigError(
            f"{origin} is not an adapter: it should hold adapter_config.json and "
            "adapter_model.safetensors"
        )
    try:
        config, loaded = LoraConfig.from_pretrained(str(directory)), load_file(weights)
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{origin} holds a damaged adapter: {error}") from error
    tensors = {k.removeprefix("base_model.model."): v.float().numpy() for k, v in loaded.items()}
    variants = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "use_qalora")
    if found := [name for name in variants if getattr(config, name, None)]:
        raise ConfigError(
            f"{origin} is not a plain LoRA adapter (it sets {', '.join(found)}); plain LoRA of one "
            "rank and alpha is supported"
        )
    named = config.target_modules
    if isinstance(named, str) or not named:  # a regular expression: the tensors say what it meant
        named = {key.partition(".lora_")[0] for key in tensors}
    targets = tuple(sorted(named))
    # rsLoRA scales by alpha / sqrt(r) where LoRA scales by alpha / r.
    alpha = float(config.lora_alpha) * (config.r**0.5 if config.use_rslora else 1.0)
    shape = LoraShape(config.r, alpha, targets)
    return PolicySnapshot(0, shape, {TEXT_ENCODER: tensors})
