"""A web server of the test's own, on this machine, whose answers the test writes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """A status, a body, headers, and how much of the body to hold back."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    lost: int = 0


class Served:
    """Answers by path, in turn, the last one again and again; counts what was asked for."""

    def __init__(self, answers: dict[str, list[Answer]]) -> None:
        self.answers = answers
        self.asked: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = ""

    def answer(self, path: str) -> Answer:
        with self.lock:
            number = self.asked[path]
            self.asked[path] += 1
        mine = self.answers.get(path, [Answer(404)])
        return mine[min(number, len(mine) - 1)]


@contextmanager
def served(answers: dict[str, list[Answer]]) -> Iterator[Served]:
    """Serve these answers at `Served.url`."""
    state = Served(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with state.lock:
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
                state.agents.add(self.headers["User-Agent"])
            status, body, headers, lost = state.answer(self.path)
            with state.lock:
                state.at_once -= 1
            self.send_response(status)
            if ("Transfer-Encoding", "chunked") in headers:
                parts = [body[place : place + 1000] for place in range(0, len(body), 1000)]
                body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))
            else:
                headers = (*headers, ("Content-Length", str(len(body))))
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: len(body) - lost])

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
