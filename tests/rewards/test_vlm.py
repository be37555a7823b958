"""`vlm` against a real local server, good and bad."""

from __future__ import annotations

import json
import math
import threading
import time
from typing import Any

import pytest

from tests.rewards.services import service, some_images
from texforce_ray.errors import RewardError
from texforce_ray.rewards import deadline
from texforce_ray.rewards.images import to_png
from texforce_ray.rewards.vlm import VlmJudge


def _says(text: str, tokens: int = 100) -> dict:
    return {
        "choices": [{"message": {"content": text}}],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 10},
    }


def _judge(url: str, **options: Any) -> VlmJudge:
    return VlmJudge(url + "/v1", "some-model", pause_s=0.01, **options)


def test_the_judge_sees_image_and_prompt_and_its_key_is_in_the_header_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = []

    def answer(request: Any, _: int) -> tuple[int, Any]:
        requests.append(request)
        return 200, _says('{"score": 4}')

    monkeypatch.setenv("JUDGE_KEY", "sk-test")
    with service(answer) as url:
        judge = _judge(url, rubric="Is it {prompt}? {{json}}", api_key_env="JUDGE_KEY", min_side=32)
        assert judge.score(some_images(2), ["red", "blue"], [{}] * 2) == [4, 4]
    texts = {r["messages"][0]["content"][0]["text"] for r in requests}
    assert texts == {"Is it red? {json}", "Is it blue? {json}"}
    sent = {r["messages"][0]["content"][1]["image_url"]["url"].partition(",")[2] for r in requests}
    assert sent == {to_png(image) for image in some_images(2)}
    assert all(r["headers"]["Authorization"] == "Bearer sk-test" for r in requests)
    assert "sk-test" not in json.dumps(
        [{k: v for k, v in r.items() if k != "headers"} for r in requests]
    )


def test_an_answer_without_a_score_is_asked_again_then_not_scored() -> None:
    def answer(request: Any, number: int) -> tuple[int, Any]:
        if "red" in request["messages"][0]["content"][0]["text"]:
            return 200, _says("I cannot judge this." if number % 2 else '{"score": 99}')
        return 200, _says('{"score": 1}')

    with service(answer) as url:
        scores = _judge(url, retries=2).score(some_images(2), ["red", "blue"], [{}] * 2)
    assert math.isnan(scores[0])
    assert scores[1] == 1


def test_requests_run_at_once_but_no_more_than_asked_for() -> None:
    running = highest = 0
    lock = threading.Lock()

    def answer(_: Any, __: int) -> tuple[int, Any]:
        nonlocal running, highest
        with lock:
            running += 1
            highest = max(highest, running)
        time.sleep(0.1)
        with lock:
            running -= 1
        return 200, _says('{"score": 5}')

    with service(answer) as url:
        assert _judge(url, concurrency=3).score(some_images(9), ["a"] * 9, [{}] * 9) == [5.0] * 9
    assert 2 <= highest <= 3


def test_the_budget_ends_the_spending() -> None:
    with service(lambda _, __: (200, _says('{"score": 5}', tokens=1_000_000))) as url:
        judge = _judge(url, max_cost=2.5, input_price=1.0, output_price=0.0, concurrency=1)
        scores = judge.score(some_images(6), ["a"] * 6, [{}] * 6)
        assert scores[:3] == [5.0] * 3
        assert all(math.isnan(score) for score in scores[3:])
        with pytest.raises(RewardError, match=r"max_cost: 3\.0000 of 2\.5 is spent"):
            judge.score(some_images(2), ["a"] * 2, [{}] * 2)
        counted = _judge(url, max_requests=2, concurrency=1)
        assert sum(math.isnan(s) for s in counted.score(some_images(3), ["a"] * 3, [{}] * 3)) == 1


def test_wrong_settings_of_the_judge_are_refused() -> None:
    with pytest.raises(RewardError, match="input_price"):
        VlmJudge("http://x", "m", max_cost=1.0)
    with pytest.raises(RewardError, match="rubric"):
        VlmJudge("http://x", "m", rubric="{image}")
    with pytest.raises(RewardError, match="NO_SUCH_KEY is not set"):
        VlmJudge("http://x", "m", api_key_env="NO_SUCH_KEY")
    with pytest.raises(RewardError, match="http://"):
        VlmJudge("localhost:8000", "m")


def test_fields_that_a_service_refuses_can_be_left_out() -> None:
    requests = []

    def answer(request: Any, _: int) -> tuple[int, Any]:
        requests.append(request)
        if "max_tokens" in request:
            return 400, {"error": "Unsupported: 'max_tokens'. Use 'max_completion_tokens'"}
        return 200, _says('{"score": 4}')

    with service(answer) as url:
        with pytest.raises(RewardError) as caught:
            _judge(url).score(some_images(1), ["a"], [{}])
        for part in ("max_tokens: null", "extra_body: {max_completion_tokens: 2048}", "kwargs"):
            assert part in str(caught.value)
        judge = _judge(
            url, max_tokens=None, temperature=None, seed=None, extra_body={"reasoning": "low"}
        )
        assert judge.score(some_images(1), ["a"], [{}]) == [4]
    assert requests[-1].keys() == {"model", "messages", "reasoning", "headers"}
    assert requests[0]["temperature"] == requests[0]["seed"] == 0
    with pytest.raises(RewardError, match="'messages' cannot be set"):
        _judge("http://x", extra_body={"messages": []})


def test_a_judge_stops_before_its_deadline_and_keeps_what_it_has() -> None:
    """All its tries could take two hours: 4 answers x 4 requests x 60 s for each eight images."""

    judged = threading.Event()

    def answer(request: Any, _: int) -> tuple[int, Any]:
        if "slow" in request["messages"][0]["content"][0]["text"]:
            judged.wait()  # it answers only after the judge has given up
        return 200, _says('{"score": 5}')

    with service(answer) as url:
        judge = _judge(url)
        deadline.begin(3.0)
        try:
            scores = judge.score(some_images(2), ["slow", "quick"], [{}] * 2)
        finally:
            deadline.end()
            judged.set()
    assert math.isnan(scores[0])
    assert scores[1] == 5
