"""Local HTTP servers in place of reward services, good and bad."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

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


def some_images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 48, 3), dtype=np.uint8)


def fast(client: Any) -> Any:
    client.client.pause_s = 0.01
    return client
