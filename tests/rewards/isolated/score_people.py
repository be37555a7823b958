"""mediapipe's real detectors on a photograph, drawings, noise and blanks."""

from __future__ import annotations

import json

import matplotlib
import numpy as np
from PIL import Image, ImageFilter

from texforce_ray.rewards.face import Face
from texforce_ray.rewards.hand import Hand
from texforce_ray.shapes import people

COUNT = 30


def main() -> None:
    photo = Image.open(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg").convert("RGB")
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    blank = np.full((256, 256, 3), 255, dtype=np.uint8)
    face, hand = Face(), Hand()

    def one(reward: Face | Hand, image: np.ndarray) -> float:
        return reward.score(image[None], [""], [{}])[0]

    def drawn(kind: str, *, malformed: bool) -> np.ndarray:
        draw = {"hand": people.draw_hand, "face": people.draw_face}[kind]
        random = {"hand": people.random_hand, "face": people.random_face}[kind]
        return np.stack([draw(random(rng), rng, malformed=malformed) for _ in range(COUNT)])

    def mean(reward: Face | Hand, images: np.ndarray) -> float:
        return float(np.mean(reward.score(images, [""] * COUNT, [{}] * COUNT)))

    hands, faces = drawn("hand", malformed=False), drawn("face", malformed=False)
    two = np.concatenate([hands[0], hands[1]], axis=1)
    result = {
        "photo": one(face, np.array(photo)),
        "photo_blurred": one(face, np.array(photo.filter(ImageFilter.GaussianBlur(12)))),
        "photo_hand": one(hand, np.array(photo)),
        "noise_face": one(face, noise), "noise_hand": one(hand, noise),
        "blank_face": one(face, blank), "blank_hand": one(hand, blank),
        "hand_whole": mean(hand, hands),
        "hand_malformed": mean(hand, drawn("hand", malformed=True)),
        "face_whole": mean(face, faces),
        "face_malformed": mean(face, drawn("face", malformed=True)),
        "again": hand.score(hands, [""] * COUNT, [{}] * COUNT)
        == hand.score(hands, [""] * COUNT, [{}] * COUNT),
        "two_asked_one": one(Hand(hands=2), hands[0]),
        "one_asked_two": one(hand, two),
        "two_asked_two": one(Hand(hands=2), two),
        "landmarks": mean(Hand(landmarks=True), hands),
        "landmarks_face": mean(Face(landmarks=True), faces),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
