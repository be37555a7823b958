"""ImageReward's real architecture at random weights: our batch beside the package's own score()."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from ImageReward.ImageReward import ImageReward as Model
from PIL import Image

from texforce_ray.rewards.image_reward import ImageReward

# BLIP's text encoder with two layers instead of twelve; the vision tower stays ViT-L.
MED = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
    "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 2, "pad_token_id": 0,
    "add_type_embeddings": False, "vocab_size": 30524, "encoder_width": 768,
    "add_cross_attention": True,
}  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "cat", "two"]
PROMPTS = ["a red circle", "two cat", "a blue circle"]


def main() -> None:
    Path("med.json").write_text(json.dumps(MED))
    folder = Path("bert-base-uncased")  # where the package itself looks
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.manual_seed(0)
    model = Model(med_config="med.json", device="cpu").eval()
    for parameter in model.mlp.parameters():  # at its own initial scale all scores are equal
        torch.nn.init.normal_(parameter, std=0.2)
    torch.save(model.state_dict(), "reward.pt")
    (Path("elsewhere") / "tokenizer").mkdir(parents=True)
    (folder / "vocab.txt").rename("elsewhere/tokenizer/vocab.txt")
    folder.rmdir()
    ours = ImageReward("reward.pt", "med.json", tokenizer="elsewhere/tokenizer", device="cpu")
    images = np.random.default_rng(0).integers(0, 256, (3, 96, 80, 3), dtype=np.uint8)
    images[1] = 30
    with torch.no_grad():
        package = [
            model.score(prompt, Image.fromarray(image))
            for prompt, image in zip(PROMPTS, images, strict=True)
        ]
    print(json.dumps({"ours": ours.score(images, PROMPTS, [{}] * 3), "package": package}))


if __name__ == "__main__":
    main()
