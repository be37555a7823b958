"""`http` and `serve` against real local servers, good and bad."""

from __future__ import annotations

import base64
import io
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.rewards.services import Answer, fast, service, some_images
from texforce_ray.errors import RewardError
from texforce_ray.rewards import serve
from texforce_ray.rewards.base import checked_scores
from texforce_ray.rewards.http_client import HttpReward
from texforce_ray.rewards.images import from_png, to_png
from texforce_ray.rewards.jpeg import JpegIncompressibility
from texforce_ray.rewards.serve import RewardService

REPO = Path(__file__).parents[2]


def test_a_served_reward_scores_as_it_does_at_home() -> None:
    home = JpegIncompressibility()
    server = RewardService(("127.0.0.1", 0), "jpeg", home, token="secret")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    os.environ["TEST_REWARD_TOKEN"] = "secret"
    images = some_images()
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
    image = to_png(some_images(1)[0])
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
    image = some_images(1)[0]
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
        reward = fast(HttpReward(f"http://127.0.0.1:{server.server_address[1]}", retries=1))
        scores = reward.score(some_images(), ["a"] * 3, [{}] * 3)
        assert math.isnan(scores[0])
        assert scores[1:] == [1.0, 1.0]
        with pytest.raises(RewardError, match=r"HTTP 500.*ZeroDivisionError: no reason.*2 tries"):
            reward.score(some_images(), ["die"] * 3, [{}] * 3)
    finally:
        server.shutdown()


def test_a_busy_service_is_asked_again() -> None:
    def answer(request: Any, number: int) -> tuple[int, Any]:
        return (503, b"busy") if number < 2 else (200, {"scores": [1.5] * len(request["images"])})

    with service(answer) as url:
        assert fast(HttpReward(url)).score(some_images(), [""] * 3, [{}] * 3) == [1.5] * 3


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
        fast(HttpReward(url, timeout_s=0.5, retries=1)).score(some_images(), [""] * 3, [{}] * 3)


def test_a_wrong_number_of_scores_is_caught_by_the_server_shell() -> None:
    with service(lambda _, __: (200, {"scores": [1.0]})) as url:
        scores = HttpReward(url).score(some_images(), [""] * 3, [{}] * 3)
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
        scores = HttpReward(found.group()).score(some_images(), [""] * 3, [{}] * 3)
        assert scores == JpegIncompressibility(50).score(some_images(), [""] * 3, [{}] * 3)
    finally:
        process.kill()
        process.communicate()
    wrong = subprocess.run([*command, "jpeg"], check=False, **options)
    assert wrong.returncode == 1
    assert "unknown reward 'jpeg'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_urls_in_errors_name_no_password() -> None:
    with service(lambda *_: (404, b"")) as url:
        secret = url.replace("http://", "http://me:hunter2@") + "/?api_key=sk-1"
        reward = HttpReward(secret, retries=0)
        with pytest.raises(RewardError) as caught:
            reward.score(some_images(1), [""], [{}])
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
        Image.fromarray(some_images(1)[0]).save(buffer, kind)
        with pytest.raises(ValueError, match="not a PNG image"):
            from_png(base64.b64encode(buffer.getvalue()).decode())
