"""Serve any reward over HTTP: `python -m texforce_ray.rewards.serve NAME [--port 8700]`.

The protocol is that of the reward `http` (docs/rewards.md). Binds to loopback by default.
"""

from __future__ import annotations

import argparse
import hmac
import json
import logging
import math
import os
import re
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from texforce_ray.console import exit_code
from texforce_ray.errors import RewardError
from texforce_ray.files import from_json
from texforce_ray.rewards import arguments as reward_arguments
from texforce_ray.rewards import resolve, split_name
from texforce_ray.rewards.base import Reward, checked_scores, load_reward
from texforce_ray.rewards.images import from_png
from texforce_ray.rewards.isolation import Environment, build, choose, default_root

log = logging.getLogger(__name__)

MAX_REQUEST = 256_000_000  # bytes
MAX_PIXELS = 128_000_000  # of all images of a request: a small PNG can hold a very large image
MAX_CONNECTIONS = 32  # requests at a time; each holds its body in memory


class RewardService(ThreadingHTTPServer):
    """One reward behind POST / (any path) and GET /health."""

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], name: str, reward: Reward, token: str | None = None
    ) -> None:
        super().__init__(address, _Handler)
        self.name, self.reward, self.token = name, reward, token
        self.lock = threading.Lock()  # rewards need not be thread-safe
        self.places = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def scores(self, request: Any) -> list[float | None]:
        """Scores for a decoded request.

        Raises:
            ValueError: the request breaks the protocol.
            RewardError: the reward broke the contract.
        """
        if not isinstance(request, dict):
            raise ValueError("the request should be a JSON object")
        images, prompts = request.get("images"), request.get("prompts")
        if not isinstance(images, list) or not images or not isinstance(prompts, list):
            raise ValueError("'images' and 'prompts' should be lists with at least one image")
        metadata = request.get("metadata") or [{}] * len(images)
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(
                f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata "
                "entries should be equally many"
            )
        decoded, left = [], MAX_PIXELS
        for image in images:
            decoded.append(from_png(image, max_pixels=left))
            left -= decoded[-1].shape[0] * decoded[-1].shape[1]
        if len({image.shape for image in decoded}) > 1:
            raise ValueError("all images of a request should have the same size")
        with self.lock:
            values = self.reward.score(np.stack(decoded), [str(p) for p in prompts], metadata)
        checked = checked_scores(values, len(images), self.name)
        return [None if math.isnan(value) else value for value in checked]


class _Handler(BaseHTTPRequestHandler):
    server: RewardService
    timeout = 120  # seconds for a client to send its request
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, {"reward": self.server.name})
        else:
            self._answer(404, {"error": "POST a request to / or GET /health"})

    def do_POST(self) -> None:
        token = self.server.token
        given = self.headers.get("Authorization", "").encode("latin-1")  # the bytes as sent
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            self._reject(401, "a bearer token is needed")
            return
        length = self.headers.get("Content-Length", "")
        # Not isdigit(): it accepts "²". And int() rejects a number of 5,000 digits.
        if not re.fullmatch(r"[0-9]{1,12}", length) or int(length) > MAX_REQUEST:
            self._reject(413, f"Content-Length should be at most {MAX_REQUEST:,}")
            return
        if not self.server.places.acquire(blocking=False):
            self._reject(503, f"{MAX_CONNECTIONS} requests are being answered; try again")
            return
        try:
            self._answer(
                200, {"scores": self.server.scores(from_json(self.rfile.read(int(length))))}
            )
        except (ValueError, TypeError) as error:
            self._answer(400, {"error": str(error)})
        except Exception as error:  # user code: the client must learn of any failure
            log.exception("reward %s failed", self.server.name)
            self._answer(500, {"error": f"{type(error).__name__}: {error}"})
        finally:
            self.server.places.release()

    def _reject(self, code: int, why: str) -> None:
        self.close_connection = True  # the body is not read
        self._answer(code, {"error": why})

    def _answer(self, code: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *values: Any) -> None:
        log.info("%s %s", self.address_string(), format % values)


def main(given: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m texforce_ray.rewards.serve",
        description="Serve one reward over HTTP, in the environment that it needs.",
    )
    parser.add_argument("name", help="a built-in reward, or package.module:Class")
    parser.add_argument(
        "--kwargs", type=json.loads, default={}, help="constructor arguments, as JSON"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0: reachable from other machines"
    )
    parser.add_argument("--port", type=int, default=8700, help="0: any free port")
    parser.add_argument("--token-env", help="variable with the bearer token that clients must send")
    parser.add_argument("--environment", help="driver, isolated or the path of an interpreter")
    parser.add_argument(
        "--requirements", nargs="*", default=[], help="packages that your own class needs"
    )
    options = parser.parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(lambda: _serve(options, sys.argv[1:] if given is None else given))


def _serve(options: argparse.Namespace, arguments: list[str]) -> int:
    name, target = split_name(options.name)
    if not os.environ.get("TEXFORCE_IN_ENVIRONMENT"):
        place = choose(name, options.environment, options.requirements, options.name)
        if place is not None:
            try:
                _continue_in(place, arguments)
            except OSError as error:
                raise RewardError(f"environment {place}: {error}") from None
    token = None
    if options.token_env:
        token = os.environ.get(options.token_env)
        if not token:
            raise RewardError(f"the environment variable {options.token_env} is not set")
    reward = load_reward(resolve(name, target), reward_arguments(name, options.kwargs))
    try:
        service = RewardService((options.host, options.port), options.name, reward, token)
    except OSError as error:
        raise RewardError(f"--host {options.host}, --port {options.port}: {error}") from None
    host, port = service.server_address[:2]
    print(f"serving {options.name} at http://{host!s}:{port}/", flush=True)
    service.serve_forever()
    return 0


def _continue_in(place: Environment | str, arguments: list[str]) -> None:
    """Become the environment's interpreter; it can import this package and the working directory.

    The package's parent folder cannot be put on its path: it may be a whole site-packages.
    """
    python = place
    if isinstance(place, Environment):
        python = build(place, default_root(), 3600, lambda line: print(line, file=sys.stderr))
    package, link = Path(__file__).parents[1], Path(tempfile.mkdtemp()) / "texforce_ray"
    link.symlink_to(package)
    os.environ["PYTHONPATH"] = os.pathsep.join((str(link.parent), str(Path.cwd())))
    for name in ("PYTHONHOME", "VIRTUAL_ENV"):  # of another Python
        os.environ.pop(name, None)
    os.environ["TEXFORCE_IN_ENVIRONMENT"] = "1"
    os.execv(str(python), [str(python), "-m", "texforce_ray.rewards.serve", *arguments])


if __name__ == "__main__":
    sys.exit(main())
