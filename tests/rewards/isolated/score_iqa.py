"""pyiqa's metrics that need no weights: signs, batches, floors, refusals."""

from __future__ import annotations

import io
import json

import numpy as np
import pyiqa
import torch
from PIL import Image

from texforce_ray.errors import RewardError
from texforce_ray.rewards.iqa import IqaReward, worst


def main() -> None:
    rng = np.random.default_rng(0)
    # 1/f noise has the spectrum of photographs; a smooth drawing would look like a defect to piqe.
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))[..., None]
    spectrum = np.fft.fft2(rng.normal(size=(128, 128, 3)), axes=(0, 1)) / (frequency + 0.01)
    texture = np.fft.ifft2(spectrum, axes=(0, 1)).real
    clean = np.uint8(255 * (texture - texture.min()) / np.ptp(texture))
    noisy = np.clip(clean + rng.normal(0, 40, clean.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(clean).save(buffer, format="JPEG", quality=3)
    images = np.stack([clean, noisy, np.array(Image.open(buffer))])
    result: dict = {}
    for name in ("piqe", "entropy"):
        reward = IqaReward(name, device="cpu")
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        result[name] = {
            "ours": reward.score(images, [""] * 3, [{}] * 3),
            "one_by_one": [float(pyiqa.create_metric(name)(p[None])) for p in pixels],
            "lower_better": reward.metric.lower_better,
        }
    result["worst"] = [worst("0, 100", True), worst("~0, ~1", False), worst(None, False)]
    for metric in ("psnr", "no_such_metric"):
        try:
            IqaReward(metric, device="cpu")
        except RewardError as error:
            result[metric] = str(error)
    face = IqaReward("piqe", device="cpu")  # a face metric's behaviour without its weights
    face.faces, face.floor = True, -3.0

    def faceless(image: torch.Tensor) -> float:
        if image.mean() > 0.9:
            raise AssertionError("No face detected in the input image.")
        return 0.25

    face.metric, face.sign = faceless, 1.0
    white = np.full((1, 64, 64, 3), 255, dtype=np.uint8)
    result["faces"] = face.score(np.concatenate([white, white // 2]), ["", ""], [{}, {}])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
