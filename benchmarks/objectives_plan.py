"""What the comparison of objectives trains: the search, and what is measured after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from texforce_ray.config import Config
from texforce_ray.config.io import load_config
from texforce_ray.files import from_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "objectives"
CONFIG = ROOT / "configs" / "shapes.yaml"
SEEDS = (0, 1, 2)
SEARCH_SEED = 100
ITERATIONS, SEARCHED = 14, 7
CURVE_IMAGES, IMAGES = 128, 256
RATES = (1e-3, 3e-3, 1e-2)
BEYOND = {RATES[0]: 3e-4, RATES[-1]: 3e-2}
PARTS = ("text", "unet", "both")
MAIN = ("ppo", "nft", "awm", "rwr", "raft", "refl")
# As the search's best, but with the penalty that the variants are measured with.
ALSO = (("ppo", "text", 1e-2, 0.2),)

_PPO = (
    "objective.kind=ppo", "objective.trust=clip", "objective.timestep_choice=first",
    "objective.timestep_fraction=0.5",
)  # fmt: skip
# No likelihood, so a deterministic solver samples; as many levels as PPO trains timesteps.
_FREE = ("objective.levels=5", "diffusion.eta=0")
_SCORER = (
    "rewards=[{name: shapes_scorer}, {name: shapes, weight: 0}, {name: appearance, weight: 0}]",
)


@dataclass(frozen=True)
class Objective:
    """How one is run, and the other setting that is searched: its key and two values."""

    overrides: tuple[str, ...]
    key: str
    values: tuple[float, float]


OBJECTIVES = {
    "ppo": Objective((*_PPO, "objective.clip_range=1e-3"), "objective.kl_weight", (0.2, 0.0)),
    "ppo, guard": Objective(
        (*_PPO, "objective.level=guard", "objective.kl_weight=0.2"),
        "objective.clip_range",
        (1e-3, 2e-4),
    ),
    "ppo, tempflow": Objective(
        (*_PPO, "objective.level=tempflow", "objective.clip_range=1e-3"),
        "objective.kl_weight",
        (0.2, 0.0),
    ),
    "ppo, kl_mask": Objective(
        (*_PPO, "objective.trust=kl_mask", "objective.kl_weight=0.2"),
        "objective.trust_kl",
        (1e-3, 1e-4),
    ),
    "nft": Objective(("objective.kind=nft", *_FREE), "objective.beta", (1.0, 0.1)),
    "awm": Objective(("objective.kind=awm", *_FREE), "objective.clip_range", (1e-2, 1e-3)),
    "rwr": Objective(("objective.kind=rwr", *_FREE), "objective.temperature", (1.0, 0.3)),
    "raft": Objective(("objective.kind=raft", *_FREE), "objective.best", (24, 8)),
    "refl": Objective(
        ("objective.kind=direct", "objective.method=refl", *_SCORER), "objective.steps", (4, 1)
    ),
}


@dataclass(frozen=True)
class Run:
    """One training run; its result is a file of that name."""

    objective: str
    part: str
    rate: float
    setting: float
    seed: int
    iterations: int

    @property
    def name(self) -> str:
        kind = self.objective.replace(", ", "-")
        return f"{kind}_{self.part}_{self.rate:g}_{self.setting:g}_seed-{self.seed}"

    @property
    def file(self) -> Path:
        return RESULTS / ("search" if self.seed == SEARCH_SEED else "runs") / f"{self.name}.json"

    def overrides(self) -> list[str]:
        chosen = OBJECTIVES[self.objective]
        parts = {
            "text": [],
            "unet": ["lora.text_encoder=null", "lora.denoiser={rank: 8, alpha: 8}"],
            "both": ["lora.denoiser={rank: 8, alpha: 8}"],
        }
        return [
            f"seed={self.seed}", f"iterations={self.iterations}", f"optimizer.lr={self.rate:g}",
            "rewards=[{name: shapes}, {name: appearance, weight: 0}]",
            *parts[self.part], *chosen.overrides, f"{chosen.key}={self.setting:g}",
        ]  # fmt: skip


def searched() -> Iterator[Run]:
    """The grid; then the next rate beyond it, where the best one so far is at its edge."""
    for name, part in product(OBJECTIVES, PARTS):
        yield from _grid(name, part, RATES)


def searched_beyond() -> Iterator[Run]:
    for name, part in product(OBJECTIVES, PARTS):
        found = _best(list(_grid(name, part, RATES)))
        for edge, beyond in BEYOND.items():
            if found is not None and found.rate == edge:
                yield from _grid(name, part, [beyond])


def _grid(name: str, part: str, rates: Sequence[float]) -> Iterator[Run]:
    for rate, value in product(rates, OBJECTIVES[name].values):
        yield Run(name, part, rate, value, SEARCH_SEED, SEARCHED)


def result(run: Run) -> dict[str, Any] | None:
    try:
        return from_json(run.file.read_text())
    except OSError:
        return None


def _best(runs: Sequence[Run]) -> Run | None:
    """The one with the highest reward; None until all are done."""
    scores = [(result(run) or {"seen": {}})["seen"].get("reward") for run in runs]
    if None in scores:
        return None
    return max(zip(scores, runs, strict=True), key=lambda pair: pair[0])[1]


def best(objective: str, part: str) -> Run | None:
    """The searched settings with the highest reward; None until all have been tried."""
    runs = [*searched(), *searched_beyond()]
    return _best([r for r in runs if (r.objective, r.part) == (objective, part)])


def measured() -> Iterator[Run]:
    """The runs that are compared, of the objectives whose search is complete."""
    for seed, row in product(SEEDS, rows()):
        yield Run(*row, seed, ITERATIONS)


def rows() -> list[tuple[str, str, float, float]]:
    """(objective, part, rate, setting) of everything that is measured."""
    found = [best(name, part) for name, part in product(OBJECTIVES, PARTS)]
    chosen = [(run.objective, run.part, run.rate, run.setting) for run in found if run is not None]
    return [*chosen, *(row for row in ALSO if row not in chosen)]


def config_of(run: Run, *, gpu: bool = False, more: Sequence[str] = ()) -> Config:
    sizes = ["model.device=cpu"]
    if gpu:
        sizes = ["model.device=cuda", "rollout.batch_size=384", "learner.microbatch_size=480"]
    return load_config(CONFIG, [*run.overrides(), *sizes, *more])
