"""Runs in mediapipe's own environment: scores drawings with its real detectors, prints JSON.

Usage: detectors.py COUNT PEOPLE_PY
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys

os.environ["GLOG_minloglevel"] = "2"  # noqa: SIM112 - glog spells it so

import mediapipe as mp
import numpy as np
from mediapipe.python.solution_base import SolutionBase
from PIL import Image

GRAPH = "mediapipe/modules/hand_landmark/hand_landmark_tracking_cpu.binarypb"


def main(count: int, people_file: str) -> None:
    spec = importlib.util.spec_from_file_location("people", people_file)
    people = importlib.util.module_from_spec(spec)
    sys.modules["people"] = people
    spec.loader.exec_module(people)
    hands = SolutionBase(
        binary_graph_path=GRAPH,
        side_inputs={"model_complexity": 1, "num_hands": 2, "use_prev_landmarks": False},
        calculator_params={
            "palmdetectioncpu__TensorsToDetectionsCalculator.min_score_thresh": 0.05
        },
        outputs=["palm_detections"],
    )
    faces = mp.solutions.face_detection.FaceDetection(
        model_selection=1, min_detection_confidence=0.0
    )

    def best(detections: list | None) -> float:
        return max((d.score[0] for d in detections or []), default=0.0)

    def enlarged(image: np.ndarray) -> np.ndarray:
        return np.array(Image.fromarray(image).resize((256, 256), Image.Resampling.BICUBIC))

    result = {}
    for malformed in (False, True):
        rng = np.random.default_rng(5)
        drawn = "malformed" if malformed else "whole"
        palm = [
            people.draw_hand(people.random_hand(rng), rng, malformed=malformed)
            for _ in range(count)
        ]
        head = [
            people.draw_face(people.random_face(rng), rng, malformed=malformed)
            for _ in range(count)
        ]
        result[f"hand_{drawn}"] = [
            best(hands.process({"image": enlarged(i)}).palm_detections) for i in palm
        ]
        result[f"face_{drawn}"] = [best(faces.process(enlarged(i)).detections) for i in head]
    print(json.dumps({name: float(np.mean(scores)) for name, scores in result.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
