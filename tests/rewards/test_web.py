"""`http`, `serve` and `vlm` against real local servers, good and bad."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from texforce_ray.errors import RewardError
from texforce_ray.rewards import deadline, serve
from texforce_ray.rewards.answers import parse_ranking, parse_score
from texforce_ray.rewards.base import checked_scores
from texforce_ray.rewards.http_client import HttpReward
from texforce_ray.rewards.images import from_png, to_png
from texforce_ray.rewards.jpeg import JpegIncompressibility
from texforce_ray.rewards.serve import RewardService
from texforce_ray.rewards.vlm import VlmJudge

REPO = Path(__file__).parents[2]
Answer = Callable[[Any, int], tuple[int, Any]]  # request, count of earlier ones: code and body


@contextmanager
def service(answer: Answer) -> Iterator[str]:
    """A real HTTP server; `answer` may return bytes (sent as they are) or data (sent as JSON)."""
    seen = 0
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal seen
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                number, seen = seen, seen + 1
            code, data = answer(json.loads(body) | {"headers": dict(self.headers)}, number)
            raw = data if isinstance(data, bytes) else json.dumps(data).encode()
            try:
                self.send_response(code)
                self.end_headers()
                self.wfile.write(raw)
            except OSError:
                pass  # the client has given up

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def _images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 48, 3), dtype=np.uint8)


def _fast(client: Any) -> Any:
    client.client.pause_s = 0.01
    return client


# ---- http ------------------------------------------------------------------------------------


def test_a_served_reward_scores_as_it_does_at_home() -> None:
    home = JpegIncompressibility()
    server = RewardService(("127.0.0.1", 0), "jpeg", home, token="secret")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    os.environ["TEST_REWARD_TOKEN"] = "secret"
    images = _images()
    try:
        reward = HttpReward(url, token_env="TEST_REWARD_TOKEN")
        assert reward.score(images, [""] * 3, [{}] * 3) == home.score(images, [""] * 3, [{}] * 3)
        with pytest.raises(RewardError, match="HTTP 401"):
            HttpReward(url, retries=0).score(images, [""] * 3, [{}] * 3)
        allowed = {"Authorization": "Bearer secret"}
        for request, word in (
            ([], "JSON object"),
            ({"images": []}, "lists"),
            ({"images": ["@"], "prompts": ["a"]}, ""),
            ({"images": [to_png(images[0])], "prompts": ["a", "b"]}, "equally many"),
        ):
            answer = httpx.post(url, json=request, headers=allowed)
            assert answer.status_code == 400, request
            assert word in answer.json()["error"]
        assert httpx.get(url + "health").json() == {"reward": "jpeg"}
    finally:
        del os.environ["TEST_REWARD_TOKEN"]
        server.shutdown()


def test_a_request_cannot_take_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    server = RewardService(("127.0.0.1", 0), "jpeg", JpegIncompressibility())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    image = to_png(_images(1)[0])
    request = {"images": [image] * 3, "prompts": ["a"] * 3}
    try:
        monkeypatch.setattr(serve, "MAX_PIXELS", 2 * 32 * 48 + 10)  # two of the three
        answer = httpx.post(url, json=request)
        assert answer.status_code == 400
        assert "too large" in answer.json()["error"]
        monkeypatch.undo()
        for _ in range(serve.MAX_CONNECTIONS):
            server.places.acquire()
        assert httpx.post(url, json=request).status_code == 503
        server.places.release()
        assert httpx.post(url, json=request).status_code == 200
        monkeypatch.setattr(serve, "MAX_REQUEST", 100)
        assert httpx.post(url, json=request).status_code == 413
    finally:
        server.shutdown()


def test_png_keeps_every_bit() -> None:
    image = _images(1)[0]
    assert np.array_equal(from_png(to_png(image)), image)


def test_null_is_not_scored_and_a_reward_that_raises_is_an_http_500() -> None:
    class Half:
        def score(self, images: np.ndarray, prompts: list[str], metadata: list) -> list[float]:
            if prompts[0] == "die":
                raise ZeroDivisionError("no reason")
            return [float("nan"), *[1.0] * (len(images) - 1)]

    server = RewardService(("127.0.0.1", 0), "half", Half())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        reward = _fast(HttpReward(f"http://127.0.0.1:{server.server_address[1]}", retries=1))
        scores = reward.score(_images(), ["a"] * 3, [{}] * 3)
        assert math.isnan(scores[0])
        assert scores[1:] == [1.0, 1.0]
        with pytest.raises(RewardError, match=r"HTTP 500.*ZeroDivisionError: no reason.*2 tries"):
            reward.score(_images(), ["die"] * 3, [{}] * 3)
    finally:
        server.shutdown()


def test_a_busy_service_is_asked_again() -> None:
    def answer(request: Any, number: int) -> tuple[int, Any]:
        return (503, b"busy") if number < 2 else (200, {"scores": [1.5] * len(request["images"])})

    with service(answer) as url:
        assert _fast(HttpReward(url)).score(_images(), [""] * 3, [{}] * 3) == [1.5] * 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda _, __: (200, b"<html>hello</html>"), "not JSON"),
        (lambda _, __: (200, {"result": [1]}), "no list 'scores'"),
        (lambda _, __: (200, b"[" + b"1," * 3_000_000), "larger than"),
        (lambda _, __: (404, b"nobody here"), "HTTP 404: nobody here"),
        (lambda _, __: (time.sleep(3), (200, {}))[1], "tries"),
    ],
    ids=["prose", "other-json", "huge", "missing", "slow"],
)
def test_bad_answers_are_named(answer: Answer, message: str) -> None:
    with service(answer) as url, pytest.raises(RewardError, match=re.escape(message)):
        _fast(HttpReward(url, timeout_s=0.5, retries=1)).score(_images(), [""] * 3, [{}] * 3)


def test_a_wrong_number_of_scores_is_caught_by_the_server_shell() -> None:
    with service(lambda _, __: (200, {"scores": [1.0]})) as url:
        scores = HttpReward(url).score(_images(), [""] * 3, [{}] * 3)
    with pytest.raises(RewardError, match="1 numbers for 3 images"):
        checked_scores(scores, 3, "http")


def test_the_command_serves_and_checks_its_input() -> None:
    command = [sys.executable, "-m", "texforce_ray.rewards.serve"]
    options: dict[str, Any] = {
        "cwd": REPO, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
    }  # fmt: skip
    process = subprocess.Popen(
        [*command, "jpeg_incompressibility", "--port", "0", "--kwargs", '{"quality": 50}'],
        **options,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert found
        scores = HttpReward(found.group()).score(_images(), [""] * 3, [{}] * 3)
        assert scores == JpegIncompressibility(50).score(_images(), [""] * 3, [{}] * 3)
    finally:
        process.kill()
        process.communicate()
    wrong = subprocess.run([*command, "jpeg"], check=False, **options)
    assert wrong.returncode == 1
    assert "unknown reward 'jpeg'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


# ---- vlm -------------------------------------------------------------------------------------


def _says(text: str, tokens: int = 100) -> dict:
    return {
        "choices": [{"message": {"content": text}}],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 10},
    }


def _judge(url: str, **options: Any) -> VlmJudge:
    return VlmJudge(url + "/v1", "some-model", pause_s=0.01, **options)


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
        assert judge.score(_images(2), ["red", "blue"], [{}] * 2) == [4, 4]
    texts = {r["messages"][0]["content"][0]["text"] for r in requests}
    assert texts == {"Is it red? {json}", "Is it blue? {json}"}
    sent = {r["messages"][0]["content"][1]["image_url"]["url"].partition(",")[2] for r in requests}
    assert sent == {to_png(image) for image in _images(2)}
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
        scores = _judge(url, retries=2).score(_images(2), ["red", "blue"], [{}] * 2)
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
        assert _judge(url, concurrency=3).score(_images(9), ["a"] * 9, [{}] * 9) == [5.0] * 9
    assert 2 <= highest <= 3


def test_the_budget_ends_the_spending() -> None:
    with service(lambda _, __: (200, _says('{"score": 5}', tokens=1_000_000))) as url:
        judge = _judge(url, max_cost=2.5, input_price=1.0, output_price=0.0, concurrency=1)
        scores = judge.score(_images(6), ["a"] * 6, [{}] * 6)
        assert scores[:3] == [5.0] * 3
        assert all(math.isnan(score) for score in scores[3:])
        with pytest.raises(RewardError, match=r"max_cost: 3\.0000 of 2\.5 is spent"):
            judge.score(_images(2), ["a"] * 2, [{}] * 2)
        counted = _judge(url, max_requests=2, concurrency=1)
        assert sum(math.isnan(s) for s in counted.score(_images(3), ["a"] * 3, [{}] * 3)) == 1


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
            _judge(url).score(_images(1), ["a"], [{}])
        for part in ("max_tokens: null", "extra_body: {max_completion_tokens: 2048}", "kwargs"):
            assert part in str(caught.value)
        judge = _judge(
            url, max_tokens=None, temperature=None, seed=None, extra_body={"reasoning": "low"}
        )
        assert judge.score(_images(1), ["a"], [{}]) == [4]
    assert requests[-1].keys() == {"model", "messages", "reasoning", "headers"}
    assert requests[0]["temperature"] == requests[0]["seed"] == 0
    with pytest.raises(RewardError, match="'messages' cannot be given"):
        _judge("http://x", extra_body={"messages": []})


def test_a_judge_stops_before_its_deadline_and_keeps_what_it_has() -> None:
    """All its tries could take two hours: 4 answers x 4 requests x 60 s for each eight images."""

    def answer(request: Any, _: int) -> tuple[int, Any]:
        if "slow" in request["messages"][0]["content"][0]["text"]:
            time.sleep(5)
        return 200, _says('{"score": 5}')

    with service(answer) as url:
        judge = _judge(url)
        deadline.begin(3.0)
        began = time.monotonic()
        try:
            scores = judge.score(_images(2), ["slow", "quick"], [{}] * 2)
        finally:
            deadline.end()
        assert time.monotonic() - began < 3.0
    assert math.isnan(scores[0])
    assert scores[1] == 5


def test_urls_in_errors_name_no_password() -> None:
    with service(lambda *_: (404, b"")) as url:
        secret = url.replace("http://", "http://me:hunter2@") + "/?api_key=sk-1"
        reward = HttpReward(secret, retries=0)
        with pytest.raises(RewardError) as caught:
            reward.score(_images(1), [""], [{}])
    assert "hunter2" not in str(caught.value)
    assert "sk-1" not in str(caught.value)
    assert url.partition("//")[2] in str(caught.value)


def test_headers_that_are_no_ascii_are_refused_not_raised_upon() -> None:
    server = RewardService(("127.0.0.1", 0), "jpeg", JpegIncompressibility(), token="geheim")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for header, value, code in (
            ("Authorization", "Bearer ü", 401),
            ("Content-Length", "²", 413),
            ("Content-Length", "9" * 5000, 413),
        ):
            lines = {"Host": "x", "Authorization": "Bearer geheim", "Content-Length": "2"}
            lines |= {header: value}
            head = "".join(f"{name}: {text}\r\n" for name, text in lines.items())
            with socket.create_connection(server.server_address[:2], timeout=10) as client:
                client.sendall(f"POST / HTTP/1.1\r\n{head}\r\n{{}}".encode("latin-1"))
                assert client.recv(100).startswith(f"HTTP/1.1 {code}".encode()), header
    finally:
        server.shutdown()


def test_only_pngs_are_opened() -> None:
    """Pillow hands other formats to other programs: EPS to Ghostscript."""
    for kind in ("EPS", "BMP", "JPEG", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(_images(1)[0]).save(buffer, kind)
        with pytest.raises(ValueError, match="not a PNG image"):
            from_png(base64.b64encode(buffer.getvalue()).decode())
