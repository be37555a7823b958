"""A small network that reads an image as the detector does, but can be differentiated.

The shapes world's counterpart of a learned reward model: direct backpropagation (ReFL, DRaFT,
AlignProp) needs a gradient, which the detector lacks. Trained by `shapes.train_scorer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from texforce_ray.shapes.scene import COLORS, FORMS, RELATIONS, Item, Scene, parse

WEIGHTS = Path(__file__).parent / "scorer.safetensors"

_COLORS, _RELATIONS = tuple(COLORS), (None, *RELATIONS)
_ITEM = len(_COLORS) + len(FORMS)
_MOST = 4  # copies of one item
SCENE_WIDTH = 2 * _ITEM + _MOST + len(_RELATIONS)


def describe(scene: Scene) -> list[float]:
    """A scene as numbers: both items, how many copies, how related (length SCENE_WIDTH)."""
    second = _item(scene.items[1]) if len(scene.items) > 1 else [0.0] * _ITEM
    copies = [float(scene.count == n + 1) for n in range(_MOST)]
    related = [float(scene.relation == r) for r in _RELATIONS]
    return [*_item(scene.items[0]), *second, *copies, *related]


def _item(item: Item) -> list[float]:
    colors = [float(item.color == name) for name in _COLORS]
    return [*colors, *(float(item.form == name) for name in FORMS)]


class Scorer(nn.Module):
    """Maps image and scene to the detector's score; the scene conditions every layer (FiLM)."""

    def __init__(self, widths: Sequence[int] = (32, 64, 96, 96), hidden: int = 128) -> None:
        super().__init__()
        self.scene = nn.Sequential(nn.Linear(SCENE_WIDTH, hidden), nn.SiLU())
        inputs = (5, *widths[:-1])  # colours and the two coordinates
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=1 if index == 0 else 2, padding=1)
            for index, (before, after) in enumerate(zip(inputs, widths, strict=True))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths)
        self.steer = nn.ModuleList(nn.Linear(hidden, 2 * width) for width in widths)
        self.head = nn.Sequential(
            nn.Linear(2 * widths[-1] + hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)
        )

    def forward(self, images: Tensor, scenes: Tensor) -> Tensor:
        """Scores in [0, 1], float [B], of float [B, 3, H, W] in [0, 1] for [B, SCENE_WIDTH]."""
        # Every form is still visible at half the size; averaging loses nothing that matters.
        x = nn.functional.avg_pool2d(images, 2) * 2 - 1
        line = torch.linspace(-1, 1, x.shape[-1], device=x.device, dtype=x.dtype)
        coordinates = torch.stack(torch.meshgrid(line, line, indexing="ij"))
        x = torch.cat([x, coordinates.expand(len(x), -1, -1, -1)], dim=1)
        scene = self.scene(scenes)
        for layer, norm, steer in zip(self.layers, self.norms, self.steer, strict=True):
            scale, shift = steer(scene)[:, :, None, None].chunk(2, dim=1)
            x = nn.functional.silu(norm(layer(x)) * (1 + scale) + shift)
        pooled = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3)), scene], dim=1)
        return self.head(pooled).squeeze(1).sigmoid()


def load_scorer(path: Path = WEIGHTS) -> Scorer:
    """The trained network, frozen, in float32."""
    scorer = Scorer()
    scorer.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return scorer.eval().requires_grad_(False)


def describe_prompts(prompts: Sequence[str]) -> Tensor:
    """float32 [B, SCENE_WIDTH].

    Raises:
        ValueError: a prompt that does not describe a scene of the shapes world.
    """
    return torch.tensor([describe(parse(prompt)) for prompt in prompts])
