"""Is there a hand, and how sure is the detector? MediaPipe's palm detector (not differentiable).

The paper uses a YOLO for this; MediaPipe's detector ships its weights in the wheel.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from texforce_ray.errors import RewardError
from texforce_ray.rewards.images import enlarged

_GRAPH = "mediapipe/modules/hand_landmark/hand_landmark_tracking_cpu.binarypb"
_PALM = "palmdetectioncpu__TensorsToDetectionsCalculator.min_score_thresh"
_POINTS = 21
_CERTAIN = 0.5


class Hand:
    """Palm detection score, 0 to 1; 0 where no hand is found.

    hands: how many are wanted; the score is the mean over that many, where a missing one counts 0;
    extra hands of which the detector is sure lower it. landmarks: multiply by the share of the 21
    hand points that lie inside the image. min_side: smaller images are enlarged to this.
    """

    def __init__(self, hands: int = 1, landmarks: bool = False, min_side: int = 256) -> None:
        os.environ.setdefault("GLOG_minloglevel", "2")
        from mediapipe.python.solution_base import SolutionBase

        if hands < 1:
            raise RewardError(f"reward hand: hands: {hands} should be at least 1")
        self.hands, self.landmarks, self.min_side = hands, landmarks, min_side
        # Hands.process() reports left/right certainty as its score; the palm detector's own is
        # an inner output of the same graph.
        self.graph = SolutionBase(
            binary_graph_path=_GRAPH,
            side_inputs={
                "model_complexity": 1,
                "num_hands": max(2, hands),
                "use_prev_landmarks": False,
            },
            calculator_params={_PALM: 0.05},
            outputs=["palm_detections", "multi_hand_landmarks"],
        )

    def score(
        self, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        """Scores of uint8 [B, H, W, 3]; prompts are ignored."""
        del prompts, metadata
        return [self._score(image) for image in images]

    def _score(self, image: np.ndarray) -> float:
        found = self.graph.process({"image": enlarged(image, self.min_side)})
        scores = sorted((float(d.score[0]) for d in found.palm_detections or []), reverse=True)
        certain = sum(score >= _CERTAIN for score in scores)
        score = sum(scores[: self.hands]) / max(self.hands, certain)
        if not self.landmarks:
            return score
        hands = found.multi_hand_landmarks or []
        inside = sum(0 <= p.x <= 1 and 0 <= p.y <= 1 for h in hands for p in h.landmark)
        return score * min(1.0, inside / (_POINTS * self.hands))
