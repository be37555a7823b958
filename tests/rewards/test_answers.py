"""Scores are read from what a model answers, or not at all: never a wrong one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from texforce_ray.rewards.answers import parse_ranking, parse_score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"score": 7}', 7),
        ('Thinking... {"score": 2} no: ```json\n{"reason": "x", "score": 3.5}\n```', 3.5),
        ("Score: 8/10", 8),
        ("The final score is **6.5**.", 6.5),
        ("9", 9),
        ("9 / 10.", 9),
        ("I see 3 squares and 2 circles.", None),
        ("no", None),
        ('{"score": "high"}', None),
        ("", None),
        # ranges and maxima
        ("Score (0-10): 6", 6),
        ("Score (out of 10): 6", 6),
        ("Score [0-10]: 6", 6),
        ("Score (1 = bad, 10 = good): 6", 6),
        ("Score on a scale of 0-10: 6", 6),
        ("My score for this image is 7.", 7),
        ("The score should be 7 because 10 is the maximum.", 7),
        ("Score out of 10: 6", 6),
        ("On a score from 0 to 10 … 7", 7),
        ("On a score from 0 to 10, I would rate this image a 7.", 7),
        ("On a scale from 0 (nothing) to 10 (everything), I rate it 7.", 7),
        ("4 out of a maximum score of 10", 4),
        ("I'd give it a 4 out of a maximum score of 10.", 4),
        ("The maximum score is 10.", None),
        ("A perfect score of 10 would need hands.", None),
        ("Scale: 0 = nothing, 10 = everything. Score: 4", 4),
        ("The score ranges from 0 to 10.", None),
        ("Score: 6-7", None),
        ("Score: 7 or 8", None),
        # numbers that are something else
        ("I count 2 out of 3 circles.", None),
        ("I would not give it a 9.", None),
        ("If it had hands, I'd give it 9.", None),
        ("A score of 9 would need hands.", None),
        ("A score of 5 or more is good.", None),
        ("A score above 5.", None),
        ("Score: 5 -> 7", None),
        ("Score: 7, maybe 8", None),
        ("I'd rate it 3 circles", None),
        ("Score: 7 of the 9 objects", None),
        ("Score: 10 minus 3 = 7", None),
        ("Score: 70%", None),
        ("Score: 1st", None),
        ("Score: 7/10. Explanation: 2 of 3 objects are there.", 7),
        # notation
        ("7,5", 7.5),
        ("Score: 7,5", 7.5),
        ("Score: 1,000", None),
        ("**Score:** 8", 8),
        ("**Score: 8**", 8),
        ('```json\n{"score": 4}\n```', 4),
        ("```\n7\n```", 7),
        ("Score: -3", -3),
        # several
        ("Score: 7. Score: 8", None),
        ("Colour score: 7. Overall score: 8", 8),
        ('{"score": 2} {"score": 3}', None),
        ('{"score": 3} again: {"score": 3}', 3),
        ("<think>Score: 3</think>Score: 5", 5),
        # JSON from outside
        ('{"score": 6, "parts": {"score": 2}}', 6),
        ('{"parts": {"score": 2}, "score": 6}', 6),
        ('{"parts": [{"score": 2}], "score": 6}', 6),
        ('{"parts": {"score": 2}}', None),
        ('{"parts": {"score": 2}, "score": ', None),
        ('{"score": 3, "score": 8}', None),
        ('{"score": true}', None),
        ('{"score": NaN}', None),
        ('{"score": "7/10"}', 7),
        ("true", None),
    ],
)
def test_scores_are_read_from_prose_and_json(text: str, score: float | None) -> None:
    assert parse_score(text) == score


def test_a_score_of_another_scale_is_none() -> None:
    assert parse_score("Score: 4/5", high=10) is None
    assert parse_score("Score: 4/5", high=5) == 4
    assert parse_score('{"score": "80/100"}', high=10) is None


_SCALES = ["", " (0-10)", " from 0 to 10", " (out of 10)", " (maximum 10)", " between 0 and 10"]
_FORMS = [
    "Score{scale}: {score}",
    "On a score{scale}, I give it {score}.",
    "**Score{scale}:** {score}/10\nIt has 3 circles and 12 squares.",
    "The scale{scale} is clear. I would rate it {score} out of 10.",
    '{{"note": "12 of 13", "score": {score}, "parts": {{"score": 1.25}}}}',
    "I see 12 things{scale}; 5 of them are red. The score is {score}.",
]


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(0, 100), st.sampled_from(_SCALES), st.sampled_from(_FORMS))
def test_no_form_of_an_answer_gives_a_wrong_score(tenths: int, scale: str, form: str) -> None:
    """None is asked again; a wrong number would be trained on."""
    score = tenths / 10
    text = form.format(scale=scale, score=f"{score:g}")
    assert parse_score(text) in (score, None), text
    assert parse_score(form.format(scale=scale, score="?")) is None


@settings(deadline=None, derandomize=True, database=None)
@given(st.text(alphabet='{}[]":,.0123456789 -/scoreoutf§\\\n', max_size=60))
def test_any_text_is_an_answer(text: str) -> None:
    value = parse_score(text)
    assert value is None or math.isfinite(value)
    parse_ranking(text, 3)
