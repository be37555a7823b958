"""The policy's LoRA adapters, one for each trained part: attach, read, set, switch off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from texforce_ray.artifacts.snapshot import DENOISERS, LoraShape, PolicySnapshot, seed_offset
from texforce_ray.errors import ConfigError
from texforce_ray.model.backbone import Backbone
from texforce_ray.model.lora_layers import PREFIX, canonical, format_names, linear_shape, own_names

ADAPTER = "policy"


def lora_config(shape: LoraShape) -> LoraConfig:
    return LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        # PEFT matches suffixes of names: without the prefix they fit both layouts of CLIP.
        target_modules=[name.removeprefix(PREFIX) for name in shape.target_modules],
        init_lora_weights=True,
    )


class PartAdapter:
    """A float32 LoRA adapter on one part; B = 0 at first, so it starts as the base model."""

    def __init__(self, part: str, module: nn.Module, shape: LoraShape, seed: int) -> None:
        self.part, self.module, self.shape = part, module, shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(lora_config(shape), module, adapter_name=ADAPTER)
            except ValueError as error:
                names = sorted(
                    {n.rpartition(".")[2] for n, m in module.named_modules() if _is_linear(m)}
                )
                raise ConfigError(
                    f"{_key(part)}.target_modules: {list(shape.target_modules)} match no layer of "
                    f"the {part}, whose linear layers are {names}"
                ) from error
        self._layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
        for parameter in self.parameters():
            parameter.data = parameter.data.float()

    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters, float32, in a fixed order."""
        found = ((n, p) for n, p in self.module.named_parameters() if f".{ADAPTER}." in n)
        return [parameter for _, parameter in sorted(found)]

    def weights(self) -> dict[str, Tensor]:
        """Tensors by PEFT's key, e.g. `...q_proj.lora_A.weight`, the same in both CLIP layouts."""
        found = get_peft_model_state_dict(self.module, adapter_name=ADAPTER)
        return {canonical(self.part, key): value for key, value in found.items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Set all weights, whether or not their names have CLIP's prefix `text_model.`.

        Raises:
            ConfigError: layers or shapes differ from this adapter's; names them.
        """
        own = self.weights()
        names = own_names(weights, own)
        given = {names[key]: value for key, value in weights.items()}
        self._check_layers(set(own), set(given))
        arrays = {key: np.array(given[key]) for key in own}
        for key, tensor in own.items():
            if linear_shape(tensor.shape) != linear_shape(arrays[key].shape):
                raise ConfigError(
                    f"adapter tensor {key} is {arrays[key].shape}, but the policy's is "
                    f"{tuple(tensor.shape)}: was it trained with another rank, or on another model?"
                )
        for key, tensor in own.items():
            tensor.copy_(torch.from_numpy(arrays[key]).reshape(tensor.shape))

    def _check_layers(self, own: set[str], given: set[str]) -> None:
        lacking, foreign = (
            {key.partition(".lora_")[0] for key in keys} for keys in (own - given, given - own)
        )
        faults = [
            f"it lacks {len(lacking)} of the policy's layers: {format_names(lacking)}"
        ] * bool(lacking)
        if foreign:
            faults.append(f"it has {len(foreign)} that the policy lacks: {format_names(foreign)}")
        if faults:
            raise ConfigError(
                f"the adapter of the {self.part} has other layers than this policy: "
                f"{'; '.join(faults)}; was it trained for another model or target_modules?"
            )

    def remove(self) -> None:
        """Remove the adapter for good: the part is the base model's again."""
        wrapped = [(n, m) for n, m in self.module.named_modules() if isinstance(m, BaseTunerLayer)]
        for name, layer in wrapped:
            self.module.set_submodule(name, layer.get_base_layer())
        if hasattr(self.module, "peft_config"):
            del self.module.peft_config
        self._layers = []

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Temporarily switch the adapter off: the part is the base model's."""
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)
                layer.set_adapter(ADAPTER)


class Adapter:
    """The adapters of all trained parts of a backbone."""

    def __init__(self, backbone: Backbone, shapes: Mapping[str, LoraShape], seed: int) -> None:
        modules = backbone.parts()
        if missing := [part for part in shapes if part not in modules]:
            raise ConfigError(f"the base model has no {missing[0]}; it has {', '.join(modules)}")
        self.shapes = {part: shapes[part] for part in modules if part in shapes}
        self.parts = {
            # A parked encoder comes to the device for good: its parameters must not move later.
            part: PartAdapter(
                part, modules[part].to(backbone.device), shape, seed + seed_offset(part)
            )
            for part, shape in self.shapes.items()
        }

    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters of all parts, float32, in a fixed order."""
        return [parameter for part in self.parts.values() for parameter in part.parameters()]

    def snapshot(self, version: int) -> PolicySnapshot:
        """A copy of the weights, as data that any process can hold."""
        weights = {
            name: {k: v.detach().cpu().numpy().copy() for k, v in part.weights().items()}
            for name, part in self.parts.items()
        }
        return PolicySnapshot(version, dict(self.shapes), weights)

    def load_weights(self, adapters: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Set the weights of all parts.

        Raises:
            ConfigError: parts, layers or shapes differ from this adapter's.
        """
        if adapters.keys() != self.parts.keys():
            raise ConfigError(
                f"the adapter is on {', '.join(adapters)}, the policy on {', '.join(self.parts)}"
            )
        for name, part in self.parts.items():
            part.load_weights(adapters[name])

    def remove(self) -> None:
        """Remove all adapters for good."""
        for part in self.parts.values():
            part.remove()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Temporarily switch all adapters off: the backbone is the base model."""
        with ExitStack() as stack:
            for part in self.parts.values():
                stack.enter_context(part.disabled())
            yield


def _key(part: str) -> str:
    """The config's section of a part's adapter."""
    return "lora.denoiser" if part in DENOISERS else f"lora.{part}"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
