"""A small open_clip model as an HPS checkpoint: our scores beside a direct computation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.transform import image_transform
from PIL import Image

from texforce_ray.rewards.hps import HpsV2

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2,
    },
}  # fmt: skip
PROMPTS = ["a red circle", "two cats on a sofa", "a red circle"]


def main() -> None:
    Path("tiny-hps.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(Path("tiny-hps.json"))
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-hps", pretrained=None).eval()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, "hps.pt")
    reward = HpsV2(weights="hps.pt", architecture="tiny-hps", device="cpu")
    rng = np.random.default_rng(0)
    transform = image_transform(
        64, is_train=False, resize_mode="longest",
        mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD,
    )  # fmt: skip
    tokens = open_clip.get_tokenizer("tiny-hps")(PROMPTS)
    result: dict[str, list] = {"ours": [], "direct": [], "pixels": []}
    result |= {"smooth": [], "differentiable": [], "slopes": []}
    for shape in ((3, 64, 64, 3), (3, 96, 96, 3), (3, 160, 120, 3)):
        images = rng.integers(0, 256, shape, dtype=np.uint8)
        with torch.no_grad():
            pixels = torch.stack([transform(Image.fromarray(i)) for i in images])
            ours = torch.stack([reward.prepare(Image.fromarray(i)) for i in images])
            features = model.encode_image(pixels, normalize=True)
            texts = model.encode_text(tokens, normalize=True)
        result["pixels"].append(float((pixels - ours).abs().max()))
        result["direct"] += torch.diagonal(features @ texts.T).tolist()
        result["ours"] += reward.score(images, PROMPTS, [{}] * 3)
        smooth = np.ascontiguousarray(np.sort(images, axis=1))
        floats = torch.from_numpy(smooth).permute(0, 3, 1, 2).float() / 255
        floats.requires_grad_()
        scores = reward.score_differentiable(floats, PROMPTS)
        (slope,) = torch.autograd.grad(scores.sum(), floats)
        result["smooth"] += reward.score(smooth, PROMPTS, [{}] * 3)
        result["differentiable"] += scores.tolist()
        result["slopes"] += slope.abs().amax(dim=(1, 2, 3)).tolist()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
