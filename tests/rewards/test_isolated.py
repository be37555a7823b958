"""Rewards in environments of their own, with the real packages; no downloaded weights."""

from __future__ import annotations

import pytest

from tests.rewards.conftest import RunInside


def test_mediapipe_finds_hands_and_faces_and_doubts_what_is_wrong(run_inside: RunInside) -> None:
    found = run_inside("mediapipe", "score_people")
    assert found["photo"] > 0.8
    assert found["photo_blurred"] < found["photo"] - 0.1
    assert found["photo_hand"] < 0.3
    for nothing in ("noise_face", "noise_hand", "blank_face", "blank_hand"):
        assert found[nothing] < 0.35, nothing
    assert found["blank_face"] == found["blank_hand"] == 0
    assert found["hand_whole"] > 0.85
    assert found["face_whole"] > 0.75
    assert found["hand_whole"] - found["hand_malformed"] > 0.3
    assert found["face_whole"] - found["face_malformed"] > 0.3
    assert found["again"]
    # A missing hand halves the score, and so does one too many.
    assert found["two_asked_one"] < 0.55
    assert found["one_asked_two"] < 0.55
    assert found["two_asked_two"] > 0.8
    assert 0.5 < found["landmarks"] <= found["hand_whole"] + 1e-6
    assert 0.5 < found["landmarks_face"] <= found["face_whole"] + 1e-6


@pytest.mark.environments
def test_pyiqa_metrics_are_turned_so_that_higher_is_better(run_inside: RunInside) -> None:
    found = run_inside("pyiqa", "score_iqa")
    for name, sign in (("piqe", -1), ("entropy", 1)):
        metric = found[name]
        assert metric["lower_better"] == (sign < 0)
        assert metric["ours"] == pytest.approx([sign * x for x in metric["one_by_one"]], abs=1e-4)
    clean, noisy, blocky = found["piqe"]["ours"]
    assert clean > noisy
    assert clean > blocky
    assert found["worst"] == [-100, 0, 0]
    assert "compares with a reference image" in found["psnr"]
    assert "no such metric" in found["no_such_metric"]
    assert "piqe" in found["no_such_metric"]
    # An image without a face is a bad face, not an unscored image.
    assert found["faces"] == [-3.0, 0.25]


@pytest.mark.environments
def test_hps_equals_a_direct_computation_with_open_clip(run_inside: RunInside) -> None:
    found = run_inside("open-clip", "score_hps")
    assert found["ours"] == pytest.approx(found["direct"], abs=1e-5)
    assert max(found["pixels"]) < 1e-6
    assert len(set(found["ours"])) > 6
    # Pillow rounds to 8 bits after its resize, torch does not.
    assert found["differentiable"] == pytest.approx(found["smooth"], abs=2e-3)
    assert min(found["slopes"]) > 0


@pytest.mark.environments
def test_imagereward_in_a_batch_equals_the_packages_own_score(run_inside: RunInside) -> None:
    found = run_inside("image-reward", "score_image_reward")
    assert found["ours"] == pytest.approx(found["package"], abs=1e-4)
    assert max(found["ours"]) - min(found["ours"]) > 0.01
