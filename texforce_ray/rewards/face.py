"""Is there a face, and how sure is the detector? MediaPipe's face detector (not differentiable)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from texforce_ray.errors import RewardError
from texforce_ray.rewards.images import enlarged

_CERTAIN = 0.5


class Face:
    """Face detection score, 0 to 1; 0 where no face is found.

    faces: how many are wanted; the score is the mean over that many, where a missing one counts 0;
    extra faces of which the detector is sure lower it. landmarks: multiply by the share of eyes,
    nose, mouth and ears (6 points) that lie inside the image. full_range: the model for faces up to
    five metres away rather than two. min_side: smaller images are enlarged to this.
    """

    def __init__(
        self,
        faces: int = 1,
        landmarks: bool = False,
        full_range: bool = True,
        min_side: int = 256,
    ) -> None:
        os.environ.setdefault("GLOG_minloglevel", "2")
        import mediapipe

        if faces < 1:
            raise RewardError(f"reward face: faces: {faces} should be at least 1")
        self.faces, self.landmarks, self.min_side = faces, landmarks, min_side
        self.detector = mediapipe.solutions.face_detection.FaceDetection(
            model_selection=int(full_range), min_detection_confidence=0.0
        )

    def score(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        """Scores of uint8 [B, H, W, 3]; prompts are ignored."""
        del prompts, metadata
        return [self._score(image) for image in images]

    def _score(self, image: np.ndarray) -> float:
        found = self.detector.process(enlarged(image, self.min_side)).detections or []
        found = sorted(found, key=lambda detection: -detection.score[0])
        certain = sum(detection.score[0] >= _CERTAIN for detection in found)
        wanted = found[: self.faces]
        score = sum(float(d.score[0]) for d in wanted) / max(self.faces, certain)
        if not self.landmarks or not wanted:
            return score
        points = [p for d in wanted for p in d.location_data.relative_keypoints]
        inside = sum(0 <= p.x <= 1 and 0 <= p.y <= 1 for p in points)
        return score * inside / len(points)
