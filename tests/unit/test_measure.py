"""The shipped weights draw what docs/shapes.md says of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from texforce_ray.experiments.measuring import REGISTERS
from texforce_ray.shapes import measure
from texforce_ray.shapes.scene import ABILITIES


@pytest.mark.long
def test_careful_prompts_are_drawn_right_and_plain_ones_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure.main(["--images", "24", "--guidance", "5", "--out", str(tmp_path)]) == 0
    cells = json.loads((tmp_path / "measure.json").read_text())
    scores = {(cell["prompt"], cell["ability"]): cell["score"] for cell in cells}
    assert scores.keys() == {(r, a) for r in REGISTERS for a in ABILITIES}
    assert min(scores["careful", ability] for ability in ABILITIES) > 0.9
    assert 0.4 < np.mean([scores["plain", ability] for ability in ABILITIES]) < 0.68
    assert (tmp_path / "measure.png").is_file()
    assert "| careful | 5 |" in capsys.readouterr().out
