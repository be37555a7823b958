"""Measures what a pipeline of the shapes world draws.

Rewards by register of the prompt (plain, careful), ability and guidance, as a table and a picture.
Images are drawn as a stock pipeline draws them: DDIM with eta = 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from texforce_ray.diffusion.sampler import Sampler
from texforce_ray.files import atomic_write_text, to_json
from texforce_ray.model.backbone import load_backbone
from texforce_ray.model.conditioning import Drawing
from texforce_ray.records.images import comparison, save_png
from texforce_ray.shapes import detector
from texforce_ray.shapes.appearance import appearance
from texforce_ray.shapes.captions import careful_caption
from texforce_ray.shapes.scene import ABILITIES, Scene, all_scenes

REGISTERS = ("plain", "careful")
_BATCH = 64
_SHOWN = 2  # images of each ability and register in the picture


@dataclass(frozen=True)
class Cell:
    """Images of one ability, asked for in one register at one guidance."""

    register: str
    ability: str
    guidance: float
    scores: tuple[float, ...]
    appearances: tuple[float, ...]

    @property
    def score(self) -> float:
        return float(np.mean(self.scores))


def questions(ability: str, count: int) -> tuple[list[Scene], list[str], np.ndarray]:
    """`count` scenes spread evenly over an ability, a careful caption of each, and seeds."""
    scenes = all_scenes(ability)
    chosen = [scenes[i * len(scenes) // count % len(scenes)] for i in range(count)]
    rng = np.random.default_rng(ABILITIES.index(ability))
    captions = [careful_caption(scene, rng) for scene in chosen]
    return chosen, captions, rng.integers(2**40, size=count)


def measure(
    path: str,
    *,
    images: int,
    guidance: Sequence[float],
    steps: int = 10,
    length: int | None = None,
) -> Iterator[tuple[Cell, np.ndarray]]:
    """Every cell and its images, uint8 [images, H, W, 3]; a scene has one seed in all cells."""
    backbone = load_backbone(path, drawing=Drawing(max_sequence_length=length))
    for scale in guidance:
        sampler = Sampler(backbone, steps=steps, eta=0.0, guidance_scale=scale)
        for ability in ABILITIES:
            scenes, careful, seeds = questions(ability, images)
            plain = [scene.caption for scene in scenes]
            for register, prompts in zip(REGISTERS, (plain, careful), strict=True):
                drawn = np.concatenate(
                    [
                        sampler.sample(prompts[i : i + _BATCH], seeds[i : i + _BATCH], 0)[1]
                        for i in range(0, images, _BATCH)
                    ]
                )
                scores = [detector.score(d, s) for d, s in zip(drawn, scenes, strict=True)]
                looks = [appearance(d) for d in drawn]
                yield Cell(register, ability, scale, tuple(scores), tuple(looks)), drawn


def table(cells: Sequence[Cell]) -> str:
    """Markdown: a row for each register and guidance, a column for each ability."""
    lines = [
        f"| prompt | guidance | {' | '.join(ABILITIES)} | mean | appearance |",
        f"| --- | --- |{' --- |' * (len(ABILITIES) + 2)}",
    ]
    for register in REGISTERS:
        for scale in dict.fromkeys(cell.guidance for cell in cells):
            row = [c for c in cells if (c.register, c.guidance) == (register, scale)]
            numbers = [cell.score for cell in row]
            looks = float(np.mean([cell.appearances for cell in row]))
            values = [f"{value:.3f}" for value in (*numbers, np.mean(numbers), looks)]
            lines.append(f"| {register} | {scale:g} | {' | '.join(values)} |")
    return "\n".join(lines)


def write(
    out: Path,
    path: str,
    *,
    images: int,
    guidance: Sequence[float],
    steps: int,
    length: int | None = None,
) -> list[Cell]:
    """Measure a pipeline; writes measure.png and measure.json into `out`."""
    cells: list[Cell] = []
    shown: dict[tuple[str, float], list[np.ndarray]] = {}
    work = measure(path, images=images, guidance=guidance, steps=steps, length=length)
    spread = [(2 * i + 1) * images // (2 * _SHOWN) for i in range(_SHOWN)]
    total = len(guidance) * len(ABILITIES) * len(REGISTERS)
    for cell, drawn in tqdm(work, total=total, desc="drawing", mininterval=5):
        cells.append(cell)
        shown.setdefault((cell.register, cell.guidance), []).extend(drawn[spread])
    titles = [questions(a, images)[0][i].caption for a in ABILITIES for i in spread]
    rows = [(f"{name}, g = {scale:g}", np.stack(each)) for (name, scale), each in shown.items()]
    save_png(out / "measure.png", comparison(rows, titles))
    numbers = [
        {"prompt": c.register, "guidance": c.guidance, "ability": c.ability, "score": c.score}
        for c in cells
    ]
    atomic_write_text(out / "measure.json", to_json(numbers, indent=2) + "\n")
    return cells
