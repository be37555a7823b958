"""Try rewards before a long run: `python -m texforce_ray.rewards.check NAME ...`.

Builds each reward's environment, starts its server on Ray exactly as a run does, scores a few
images and prints scores, seconds and memory.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from texforce_ray.console import exit_code
from texforce_ray.errors import ConfigError, RewardError, TexForceError
from texforce_ray.rewards import split_name

if TYPE_CHECKING:
    import numpy as np

    from texforce_ray.config import Config

_PROMPTS = {
    "scene": "a red circle and a blue square",
    "hand": "a hand",
    "face": "a smiling face",
    "noise": "a green circle",
    "blank": "a green circle",
}


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="python -m texforce_ray.rewards.check",
        description="Build the environments of rewards, load the rewards, score a few images.",
        epilog="Example: python -m texforce_ray.rewards.check hand face iqa:piqe shapes",
    )
    commands.add_argument(
        "names", nargs="*", metavar="NAME", help="built-in name or package.module:Class"
    )
    commands.add_argument("--config", type=Path, help="check all rewards of this config instead")
    commands.add_argument(
        "--images",
        type=Path,
        nargs="+",
        help="image files (default: drawings, noise and a blank image)",
    )
    commands.add_argument("--prompt", default="a photo", help="prompt for --images")
    commands.add_argument("--repeat", type=int, default=8, help="calls to time")
    commands.add_argument(
        "--set",
        dest="overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="further settings, e.g. rewards.0.kwargs.hands=2",
    )
    return commands


def main(given: list[str] | None = None) -> int:
    """Run the command; 0 if every reward scored."""
    options = parser().parse_args(given)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    config = _configure(options)
    images, prompts, labels = _samples(options)
    results = asyncio.run(_check(config, images, prompts, max(1, options.repeat)))
    _print(results, labels)
    return 1 if any(result["error"] for result in results.values()) else 0


def _configure(options: argparse.Namespace) -> Config:
    from texforce_ray.config.io import load_config

    if bool(options.names) == bool(options.config):
        raise ConfigError("give either names of rewards or --config FILE")
    if options.config:
        return load_config(options.config, options.overrides)
    rewards = []
    for given in options.names:
        name, target = split_name(given)
        rewards.append({"name": name} if target is None else {"target": target, "label": given})
    return load_config(None, options.overrides, base={"rewards": rewards})


def _samples(options: argparse.Namespace) -> tuple[list[np.ndarray], list[str], list[str]]:
    """Images (uint8 [H, W, 3], sizes may differ), their prompts and what they show."""
    import numpy as np

    if options.images:
        from texforce_ray.rewards.images import read_image

        try:
            images = [read_image(path) for path in options.images]
        except ValueError as error:
            raise ConfigError(f"--images: {error}") from None
        return images, [options.prompt] * len(images), [path.name for path in options.images]
    from texforce_ray.shapes import people, scene

    rng = np.random.default_rng(0)
    drawn = {
        "scene": scene.render(scene.parse(_PROMPTS["scene"]), rng),
        "hand": people.draw_hand(people.random_hand(rng), rng, malformed=False),
        "face": people.draw_face(people.random_face(rng), rng, malformed=False),
        "noise": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        "blank": np.full((64, 64, 3), 255, dtype=np.uint8),
    }
    return list(drawn.values()), [_PROMPTS[name] for name in drawn], list(drawn)


async def _check(
    config: Config, images: list[np.ndarray], prompts: list[str], repeat: int
) -> dict[str, dict[str, Any]]:
    from texforce_ray.cluster.connection import connected
    from texforce_ray.cluster.environments import prepare_environments
    from texforce_ray.rewards import find

    for reward in config.rewards:
        if reward.name is not None:
            find(reward.name)
    with connected(config):
        pythons = await prepare_environments(config)
        # One at a time, so that times and memory belong to a single reward.
        return {
            reward.key: await _one(config, reward.key, pythons, images, prompts, repeat)
            for reward in config.rewards
        }


async def _one(
    config: Config,
    key: str,
    pythons: dict[str, str],
    images: list[np.ndarray],
    prompts: list[str],
    repeat: int,
) -> dict[str, Any]:
    import numpy as np
    import ray

    from texforce_ray.actors.messages import pack_images
    from texforce_ray.crew.starting import reward_pool

    reward = next(r for r in config.rewards if r.key == key)
    result: dict[str, Any] = {"scores": [], "error": None, "python": pythons.get(key, "driver")}
    pool = None
    try:
        began = time.perf_counter()
        pool = reward_pool(reward.model_copy(update={"replicas": 1}), config, pythons)
        await pool.actors.ready(config.ray.start_timeout_s)
        result["seconds_to_load"] = time.perf_counter() - began
        for image, prompt in zip(images, prompts, strict=True):
            answer = await pool.score(ray.put(pack_images(image[None])), [prompt], [{}])
            if answer.error is not None:
                # Another image may still be scored: `shapes` rejects the prompt "a hand".
                result.setdefault("rejected", answer.error)
            result["scores"].append(answer.scores[0] if answer.scores else None)
        scored = [i for i, score in enumerate(result["scores"]) if score is not None]
        if not scored:
            raise RewardError(f"reward {key}: {result.get('rejected', 'no image could be scored')}")
        check_variety(key, [result["scores"][i] for i in scored], [images[i] for i in scored])
        size = min(16, reward.batch_size)
        batch = ray.put(pack_images(np.stack([images[scored[0]]] * size)))
        times = []
        for _ in range(repeat):
            answer = await pool.score(batch, [prompts[scored[0]]] * size, [{}] * size)
            times.append(answer.seconds)
        result["seconds_per_batch"], result["batch"] = float(np.median(times)), size
        result["memory_mb"] = await pool.memory()
    except TexForceError as error:
        result["error"] = str(error)
    finally:
        if pool is not None:
            pool.actors.kill()
    return result


def check_variety(key: str, scores: list[float], images: list[np.ndarray]) -> None:
    """Reject a reward that scores all images alike: nothing could be learned from it.

    Raises:
        RewardError: all images, at least two of them different, have the same score.
    """
    known = [(score, image.tobytes()) for score, image in zip(scores, images, strict=True)
             if not math.isnan(score)]  # fmt: skip
    values = {score for score, _ in known}
    if len(values) == 1 and len({data for _, data in known}) > 1:
        raise RewardError(
            f"reward {key}: all {len(known)} different images have the same score, "
            f"{values.pop():g}, so nothing can be learned from it; if it does score images of your "
            "prompts differently, pass such images with --images"
        )


def _print(results: dict[str, dict[str, Any]], labels: list[str]) -> None:
    """Print a table of scores, then times, then one JSON object in the last line."""
    from texforce_ray.files import to_json

    width = max(12, *(len(key) for key in results))
    print(f"{'reward':<{width}}  " + "  ".join(f"{label[:12]:>12}" for label in labels))
    for key, result in results.items():
        shown = [f"{'-':>12}" if score is None else f"{score:>12.4f}" for score in result["scores"]]
        print(f"{key:<{width}}  " + "  ".join(shown))
    print()
    for key, result in results.items():
        if result["error"]:
            print(f"{key}: FAILED: {result['error']}")
            continue
        memory = ", ".join(f"{mb:.0f} MB {what}" for what, mb in result["memory_mb"].items())
        print(
            f"{key}: {result['seconds_per_batch']:.4f} s for {result['batch']} images, loaded in "
            f"{result['seconds_to_load']:.1f} s, {memory}, {result['python']}"
        )
        if "rejected" in result:
            print(f"  '-': {result['rejected']}")
    print(to_json(results))


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    sys.exit(main())
