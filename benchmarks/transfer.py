"""What an adapter is still worth elsewhere: with other words, and on another model.

    python benchmarks/transfer.py                  # what is missing, then the tables
    python benchmarks/transfer.py --only flow-text --seeds 0 [--gpu]
    python benchmarks/transfer.py --only flow-text-nft --seeds 0 --run runs/NAME   # trained already
    python benchmarks/transfer.py --page           # only the tables, from the kept results

Two questions in the shapes world. Paraphrases: does an adapter of the text encoders hold up better
than one of the transformer, at the same reward, when prompts say the same in words that were never
trained on? Another model: is an adapter of the text encoder that the DDIM pipeline and the flow
pipeline share worth something on the one that it was not trained on? Each run is one file in
docs/results/transfer, so an interrupted benchmark resumes where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.transfer_page import KEPT, write_page  # noqa: E402
from texforce_ray.files import atomic_write_text  # noqa: E402
from texforce_ray.shapes.scene import Item, Scene  # noqa: E402

SEEDS = (0, 1, 2)
IMAGES = 24  # of each wording
_BATCH = {"cpu": 32, "cuda": 256}
_FLOW, _NFT = "configs/shapes-flow.yaml", "configs/shapes-flow-nft.yaml"
# All are measured with guidance; those by PPO sample without it.
_ITERATIONS = ("iterations=14",)
_TRANSFORMER = (
    "lora.text_encoder=null", "lora.text_encoder_2=null", "lora.text_encoder_3=null",
    "lora.denoiser={rank: 16, alpha: 16}",
)  # fmt: skip
_FLOW_SETTINGS = (
    *_ITERATIONS,
    "diffusion.guidance_scale=1",
    "objective.kl_weight=0.05",
    "objective.trust_kl=1e-4",
)
# Name: the config, and what differs from it.
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "flow-text": (_FLOW, _FLOW_SETTINGS),
    "flow-transformer": (_FLOW, (*_FLOW_SETTINGS, *_TRANSFORMER, "optimizer.lr=5e-3")),
    "flow-text-nft": (_NFT, ()),
    "flow-transformer-nft": (_NFT, _TRANSFORMER),
    "flow-shared": (
        _FLOW, (*_FLOW_SETTINGS, "lora.text_encoder_2=null", "lora.text_encoder_3=null")
    ),
    "ddim-shared": ("configs/shapes.yaml", _ITERATIONS),
}  # fmt: skip
# How often each is measured, in iterations; 0: at its end alone.
_EVERY = dict.fromkeys(RUNS, 2) | {"flow-text-nft": 0, "flow-transformer-nft": 4}
# Where each is evaluated besides its own model: on the one whose first encoder is the same.
OTHER = {"flow-shared": "configs/shapes.yaml", "ddim-shared": _FLOW}


def wordings(scene: Scene) -> dict[str, str]:
    """A scene in words that plain captions do not use, by the kind of change. No training.

    The words themselves are all known; their order is new, but for that of 'swapped', in which the
    base model has seen other scenes.
    """
    first, second = scene.items[0], scene.items[-1]
    if scene.count > 1:
        from texforce_ray.shapes.scene import COUNTS

        count, many = COUNTS[scene.count], f"{first.color} {first.form}s"
        return {
            "article": f"the {count} {many}",
            "apart": f"{count} {first.form}s their color is {first.color}",
            "picture": f"picture of {count} {many}",
        }
    if len(scene.items) == 1:
        return {
            "article": f"the {first.color} {first.form}",
            "one": f"one {first.color} {first.form}",
            "apart": f"a {first.form} its color is {first.color}",
            "picture": f"picture of a {first.color} {first.form}",
        }
    relation = scene.relation or "and"
    one, other = (_named(item) for item in (first, second))
    back = _OPPOSITE.get(relation, "and")
    return {
        "article": f"the {one} {relation} the {other}",
        "one": f"one {one} {relation} one {other}",
        "picture": f"picture of a {one} {relation} a {other}",
        "swapped": f"a {other} {back} a {one}",
    }


_OPPOSITE = {
    "above": "below", "below": "above",
    "to the left of": "to the right of", "to the right of": "to the left of",
}  # fmt: skip


def _named(item: Item) -> str:
    return f"{item.color} {item.form}"


def _process(file: str, overrides: Sequence[str], *, gpu: bool) -> Any:
    from benchmarks.one_process import OneProcess
    from texforce_ray.config.io import load_config

    device = ["model.device=cuda", "rollout.batch_size=192", "learner.microbatch_size=288"]
    config = load_config(ROOT / file, [*overrides, *(device if gpu else ["model.device=cpu"])])
    return OneProcess(config, gpu=gpu)


def perform(name: str, seed: int, *, gpu: bool = False, run: Path | None = None) -> None:
    """Train, measure now and then, and keep the result; or measure what `run` has trained."""
    import torch

    from texforce_ray.model.adapter_files import read_adapter

    file, overrides = RUNS[name]
    torch.set_num_threads(1 if gpu else 2)
    process = _process(file, [f"seed={seed}", *overrides], gpu=gpu)
    iterations, every = process.config.iterations, _EVERY[name]
    points = [{"iteration": 0, **_measured(process)}]
    if run is not None:
        process.learner.adapter.load_weights(read_adapter(run / "adapter").adapters)
        points.append({"iteration": iterations, **_measured(process)})
    else:
        for metrics in process.iterations():
            done = int(metrics["iteration"])
            if done == iterations or (every and done % every == 0):
                with process.evaluated():
                    points.append({"iteration": done, **_measured(process)})
                print(f"{name}, seed {seed}: {points[-1]}", flush=True)
    answer: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "overrides": overrides,
        "points": points,
    }
    if name in OTHER:
        answer["elsewhere"] = _elsewhere(OTHER[name], process, gpu=gpu)
    KEPT.mkdir(parents=True, exist_ok=True)
    atomic_write_text(KEPT / f"{name}-{seed}.json", json.dumps(answer) + "\n")


def _measured(process: Any) -> dict[str, float]:
    """Mean rewards on the trained phrases and on each kind of other wording, as stock draws."""
    from texforce_ray.shapes.captions import understand

    config = process.config
    sampler = process.sampler.drawing(
        config.evaluation_guidance, config.evaluation_eta, config.evaluation_steps
    )
    trained = [(prompt.text, understand(prompt.text)) for prompt in process.prompts]
    asked = {"trained": trained}
    for _, scene in trained:
        for kind, text in wordings(scene).items():
            asked.setdefault(kind, []).append((text, scene))
    return {kind: _score(sampler, pairs) for kind, pairs in asked.items()}


def _score(sampler: Any, pairs: Sequence[tuple[str, Scene]]) -> float:
    import numpy as np

    from texforce_ray import randomness
    from texforce_ray.shapes import detector

    texts = [text for text, _ in pairs for _ in range(IMAGES)]
    scenes = [scene for _, scene in pairs for _ in range(IMAGES)]
    seeds = randomness.noise_seeds(1_000_003, 0, len(texts), randomness.EVALUATION)
    size = _BATCH[sampler.backbone.device.type]
    parts = [slice(first, first + size) for first in range(0, len(texts), size)]
    images = np.concatenate([sampler.sample(texts[p], seeds[p], 0)[1] for p in parts])
    scores = [detector.score(image, scene) for image, scene in zip(images, scenes, strict=True)]
    return round(float(np.mean(scores)), 4)


def _elsewhere(file: str, process: Any, *, gpu: bool) -> dict[str, dict[str, float]]:
    """The trained adapter of the first text encoder on the other model: base, and tuned."""
    from texforce_ray.artifacts.snapshot import PolicySnapshot
    from texforce_ray.model.adapter import Adapter

    trained = process.exported()
    part = "text_encoder"
    alone = PolicySnapshot(0, {part: trained.shapes[part]}, {part: trained.adapters[part]})
    other = _process(file, (), gpu=gpu)
    other.learner.adapter.remove()
    base = _measured(other)
    Adapter(other.learner.backbone, alone.shapes, seed=0).load_weights(alone.adapters)
    return {"base": base, "tuned": _measured(other)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=tuple(RUNS), nargs="+", default=tuple(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--gpu", action="store_true", help="train and measure on a GPU")
    parser.add_argument("--run", type=Path, help="a run of that config and seed, to measure")
    parser.add_argument("--page", action="store_true", help="only write the tables")
    options = parser.parse_args()
    if options.run and (len(options.only), len(options.seeds)) != (1, 1):
        parser.error("--run: name what it is a run of: one of --only, and one of --seeds")
    if not options.page:
        from common import as_in_an_actor

        as_in_an_actor()
        for seed in options.seeds:
            for name in options.only:
                if not (KEPT / f"{name}-{seed}.json").exists():
                    perform(name, seed, gpu=options.gpu, run=options.run)
    write_page()


if __name__ == "__main__":
    main()
