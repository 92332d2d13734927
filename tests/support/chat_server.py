"""A chat-completions server over real HTTP, for tests: `with ChatServerDouble() as server:`.

It scores by a rule (`server.says`), tells what it was asked (`server.asked`, `server.headers`), and `server.next` makes
the next requests go another way: a status with headers and a body, or bytes as they are.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Odd = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""


def verdict(prompt: str) -> str:
    """7 for a reference, which names itself, and 4 for an answer; one more for what is shown first."""
    first, second = (prompt.find(mark) for mark in ("reference", "answer"))
    return "8 4\nThe reference is better." if 0 <= first < second else "5 7\n第二个更好。"


class ChatServerDouble:
    """The server; a context manager."""

    def __init__(self, says: Callable[[str], str] = verdict) -> None:
        self.says, self.asked, self.headers, self.paths = says, [], [], []
        self.next: list[Odd] = []
        self.usage: Any = {"prompt_tokens": 100, "completion_tokens": 10}
        self.seconds = 0.0
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def __enter__(self) -> ChatServerDouble:
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                try:
                    data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                except ValueError:  # whoever asked has gone
                    return
                with double.lock:
                    double.asked.append(data)
                    double.headers.append(dict(self.headers))
                    double.paths.append(self.path)
                    double.at_once += 1
                    double.most_at_once = max(double.most_at_once, double.at_once)
                    odd = double.next.pop(0) if double.next else None
                time.sleep(double.seconds)
                status, headers, body = odd or double.completion(data)
                with double.lock:
                    double.at_once -= 1
                self.send_response(status)
                for name, value in (
                    {"Content-Type": "application/json", "Content-Length": str(len(body))} | headers
                ).items():
                    self.send_header(name, value)
                self.end_headers()
                with suppress(OSError):  # whoever asked has gone
                    self.wfile.write(body)

            def log_message(self, *words: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def completion(self, data: dict[str, Any]) -> Odd:
        message = {"role": "assistant", "content": self.says(data["messages"][-1]["content"])}
        said = {"model": data["model"], "choices": [{"index": 0, "message": message}], "usage": self.usage}
        return 200, {}, json.dumps(said, ensure_ascii=False).encode()
