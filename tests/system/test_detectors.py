"""Drawn hands and faces against mediapipe's real detectors, in an environment of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from texforce_ray.shapes import people


def test_mediapipe_finds_whole_hands_and_faces_and_doubts_malformed_ones() -> None:
    uv = Path(sys.executable).parent / "uv"
    if not uv.exists():
        pytest.skip("uv is not in this environment; `make setup` puts it there")
    done = subprocess.run(
        [
            uv, "run", "--isolated", "--no-project", "--no-config", "--quiet",
            "--python", f"{sys.version_info.major}.{sys.version_info.minor}",
            "--with", "mediapipe==0.10.21", "--with", "pillow",
            "python", str(Path(__file__).with_name("detectors.py")), "40", people.__file__,
        ],
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    means = json.loads(done.stdout.strip().splitlines()[-1])
    assert means["hand_whole"] > 0.85
    assert means["face_whole"] > 0.75
    assert means["hand_whole"] - means["hand_malformed"] > 0.3
    assert means["face_whole"] - means["face_malformed"] > 0.3
