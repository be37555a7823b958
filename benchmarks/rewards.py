"""Batched scoring against one image at a time, for a CLIP-type reward.

    python benchmarks/rewards.py [--images 64] [--device auto]

CLIP ViT-B/32 at its real size with random weights: speed does not depend on their values. The
released TexForce code scores one image at a time and encodes the prompt each time. Both ways take
turns in one process; the ratio is that of their medians. Writes benchmarks/results/rewards.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from texforce_ray.rewards.clip import ClipScore
from texforce_ray.shapes.captions import vocabulary
from texforce_ray.shapes.tokenizer import build_tokenizer

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        CLIPModel(CLIPConfig()).save_pretrained(folder)
        build_tokenizer(vocabulary()).save_pretrained(folder)
        CLIPImageProcessorPil().save_pretrained(folder)
        reward = ClipScore(folder, device=options.device)
    count = options.images
    images = np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)
    prompts = [f"{'a red circle' if i % 2 else 'two blue squares'}" for i in range(count)]

    def batched() -> list[float]:
        return reward.score(images, prompts, [{}] * count)

    def one_by_one() -> list[float]:
        return [reward.score(images[i : i + 1], prompts[i : i + 1], [{}])[0] for i in range(count)]

    difference = float(np.abs(np.array(batched()) - one_by_one()).max())  # and a warm-up
    seconds: dict[str, list[float]] = {"batched": [], "one_by_one": []}
    for _ in range(options.rounds):
        for name, way in (("batched", batched), ("one_by_one", one_by_one)):
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    ratio = median(seconds["one_by_one"]) / median(seconds["batched"])
    result = {
        "images": count,
        "device": str(reward.clip.device),
        "threads": torch.get_num_threads(),
        "one_by_one_over_batched": ratio,
        "largest_difference_of_scores": difference,
        "seconds": seconds,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "rewards.json").write_text(json.dumps(result, indent=2) + "\n")
    text = f"one by one takes {ratio:.2f} times as long as batched ({count} images)"
    (RESULTS / "rewards.md").write_text(text + "\n")
    print(text)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
