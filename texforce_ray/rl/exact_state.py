"""A learner's exact state: published, restored, or begun from another run's adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from texforce_ray.artifacts.snapshot import Learned, LearnerState, PolicySnapshot, Tensors
from texforce_ray.errors import ConfigError
from texforce_ray.model.adapter import Adapter
from texforce_ray.model.lora_layers import rescaled


class ExactState:
    """The part of a learner that makes another one continue with the same bits."""

    adapter: Adapter
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: list[Tensor]
    version: int
    updates: int
    skipped: int

    def learned(self) -> Learned:
        """A copy of everything that rollout actors, evaluations and the next update depend on."""
        snapshot = self.adapter.snapshot(self.version)
        average = None
        if self.ema:
            with self._weights(self.ema):
                average = self.adapter.snapshot(self.version)
        # `get`: reading state[p] would add p, and then this would look like a resumed run.
        moments = {
            f"{i}/{key}": value.detach().cpu().numpy().copy()
            for i, p in enumerate(self.parameters)
            for key, value in self.optimizer.state.get(p, {}).items()
        }
        state = LearnerState(self.version, self.updates, moments, self.skipped, self.own_state())
        return Learned(snapshot, state, average)

    def load(self, learned: Learned) -> None:
        """Continue from what this or another learner published, exactly."""
        state = learned.state
        self.version, self.updates, self.skipped = state.version, state.updates, state.skipped
        if learned.average is not None:
            self.adapter.load_weights(learned.average.adapters)
            self.copies_from_adapter()
        self.adapter.load_weights(learned.snapshot.adapters)
        self.optimizer.state.clear()
        for key, value in state.optimizer.items():
            index, _, name = key.partition("/")
            parameter = self.parameters[int(index)]
            # Adam keeps its step counter on the CPU, the moments on the parameter's device.
            device = "cpu" if name == "step" else parameter.device
            self.optimizer.state[parameter][name] = torch.from_numpy(np.array(value)).to(device)
        self.load_own_state(state.own)

    def begin_from(self, snapshot: PolicySnapshot) -> None:
        """Start from another run's adapter; B absorbs a difference in scale.

        Raises:
            ConfigError: its parts, layers or ranks differ from this policy's.
        """
        try:
            self.adapter.load_weights(rescaled(snapshot, self.adapter.shapes).adapters)
        except ConfigError as error:
            raise ConfigError(
                f"lora.init: {error}; set lora.text_encoder.rank and lora.denoiser.rank to "
                "the adapter's, or compress the adapter with texforce_ray.fuse --rank"
            ) from None
        self.copies_from_adapter()

    def copies_from_adapter(self) -> None:
        """Set every other copy of the weights, such as their average, to the adapter's."""
        for average, parameter in zip(self.ema, self.parameters, strict=False):
            average.copy_(parameter.detach())

    @contextmanager
    def _weights(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Temporarily set the adapter's parameters to other values."""
        own = [p.detach().clone() for p in self.parameters]
        try:
            self._set(weights)
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, weights: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, weights, strict=True):
            parameter.copy_(value)

    # ---- what an objective may add ---------------------------------------------------------

    def own_state(self) -> Tensors:
        """What an update of this objective depends on besides adapter and optimizer; a copy."""
        return {}

    def load_own_state(self, own: Tensors) -> None:
        """Continue from `own_state()`, once the adapter and the optimizer are loaded."""
        del own
