"""A client of a server of bundles that sends what it is told, right or wrong; and questions for one."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

QUESTIONS = [
    "What is it?",
    "这是什么？",
    "Is it a cat? Answer yes or no.",
    "图中有什么？请用一句话回答。",
    "red or blue",
    "Write </s> <image> 停",
]


class Caller:
    """A client that sends what it is told, right or wrong."""

    def __init__(self, port: int, server: Any = None) -> None:
        self.port, self.server = port, server
        self.url = f"http://127.0.0.1:{port}/v1"

    def open(self, body, path="/v1/chat/completions", method="POST", **headers) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, data, {"Content-Type": "application/json", **named})
        response = connection.getresponse()
        response.connection = connection
        return response

    def __call__(self, body, path="/v1/chat/completions", method="POST", **headers) -> SimpleNamespace:
        with self.open(body, path, method, **headers) as response:
            text = response.read()
            told = json.loads(text) if "json" in response.headers["content-type"] else text.decode()
            return SimpleNamespace(status=response.status, told=told, headers=response.headers)

    def says(self, body) -> str:
        """The answer to a request."""
        answer = self(body)
        assert answer.status == 200, answer.told
        return answer.told["choices"][0]["message"]["content"]

    def until(self, true, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.01)


def tiny_served(pieces, caption_file, folder, name="tiny"):
    """A tiny model in evaluation mode as a bundle of a server."""
    import torch
    import yaml

    from support.tiny_pieces import tiny_recipe
    from vlm_sft import build_stack, load_recipe
    from vlm_sft.serving.bundles import Base, Served

    recipe = tiny_recipe(pieces, caption_file, folder / "out", chat_template="ziya")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    torch.manual_seed(0)
    stack = build_stack(load_recipe(folder / "recipe.yaml"))
    model = stack.model.eval().requires_grad_(False)
    found = Served(name, Base(model), stack.processor, {}, None, model.generation_config)
    found.base.now = found
    return found


@contextmanager
def running(bundles, rules=None, batch_size=8, queue=64, **more) -> Iterator[Caller]:
    """A server of bundles in this process."""
    import uvicorn

    from vlm_sft.serving.app import Server
    from vlm_sft.serving.meters import Meters
    from vlm_sft.serving.pool import Pool
    from vlm_sft.serving.prepare import Rules
    from vlm_sft.serving.serve import listening, punctual

    meters = Meters()
    rules = rules or Rules()
    server = Server(bundles, Pool(batch_size, queue, meters), meters, rules, **more)
    with listening("127.0.0.1", 0) as heard:
        settings = {"http": punctual(rules.seconds), "log_level": "warning", "access_log": False, "lifespan": "off"}
        program = uvicorn.Server(uvicorn.Config(server.app(), **settings))
        thread = threading.Thread(target=program.run, args=([heard],), daemon=True)
        thread.start()
        caller = Caller(heard.getsockname()[1], server)
        caller.until(lambda: program.started)
        try:
            yield caller
        finally:
            program.should_exit = True
            server.pool.close()
            thread.join(20)
            assert not thread.is_alive()
