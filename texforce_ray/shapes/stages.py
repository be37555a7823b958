"""Training stages that survive a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Stage:
    """A training stage that can be killed at any step and resumes from its last save."""

    def __init__(
        self, directory: Path, modules: dict[str, nn.Module], optimizer: torch.optim.AdamW
    ):
        self.directory, self.modules, self.optimizer = directory, modules, optimizer
        self.extra: dict[str, Tensor] = {}

    def load(self) -> int:
        """The step to continue from; 0 for a fresh start."""
        marker = self.directory / "step.json"
        if not marker.exists():
            return 0
        step = json.loads(marker.read_text())["step"]
        tensors = load_file(self.directory / f"step-{step}.safetensors")
        for name, module in self.modules.items():
            module.load_state_dict(_strip(tensors, f"{name}/"))
        self.extra = _strip(tensors, "extra/")
        for group in self.optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                state = _strip(tensors, f"optimizer/{i}/")
                step_at = parameter.device if group["fused"] else "cpu"
                self.optimizer.state[parameter] = {
                    key: value.to(step_at) if key == "step" else laid_out_as(parameter, value)
                    for key, value in state.items()
                }
        return step

    def save(self, step: int) -> None:
        tensors = {f"extra/{key}": value for key, value in self.extra.items()}
        for name, module in self.modules.items():
            tensors |= {f"{name}/{key}": value for key, value in module.state_dict().items()}
        for group in self.optimizer.param_groups:
            for i, parameter in enumerate(group["params"]):
                state = self.optimizer.state[parameter]
                tensors |= {f"optimizer/{i}/{key}": value for key, value in state.items()}
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step-{step}.safetensors"
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path)
        # The marker is replaced last: a kill before that leaves the previous step valid.
        temporary = self.directory / "step.json.tmp"
        temporary.write_text(json.dumps({"step": step}))
        os.replace(temporary, self.directory / "step.json")
        for old in self.directory.glob("step-*.safetensors"):
            if old != path:
                old.unlink()


def laid_out_as(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """`value` on the parameter's device and in its memory format: fused AdamW relies on both."""
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
