"""Latency and throughput of `vlm-sft serve` on a bundle, under clients that all ask at once, on the loopback.

Each kind of server is started as a user starts it and asked the same questions about the same pictures (made here, of
random colours): first one by one, then by all clients together, each as fast as its answers come. Every answer must
equal that of its question asked alone, greedily, and none may be lost; otherwise the program ends with an error. Half
of the clients read their answers as a stream. The kinds differ in how many answers are written at a time.

    python benchmarks/serving.py outputs/quickstart_stage2 --clients 64 --out outputs/benchmark_serving
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

QUESTIONS = ["What is in the image?", "图中有什么？", "Describe it in one sentence.", "左上角是什么？", "How many?"]
Found = dict[str, float]


def main() -> None:
    """Measures each kind; prints a table and writes results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_serving"))
    given = parser.parse_args()
    bodies = make_bodies(given.requests, given.tokens, given.side)
    results = {}
    for size in given.batch_sizes:
        with server(given.bundle, size) as port:
            ask(port, bodies[0])  # and warm
            alone = [ask(port, {**body, "stream": False})["text"] for body in bodies[: given.clients]]
            results[size] = load(port, bodies, given.clients, alone)
    print(table(results))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")


def make_bodies(count: int, tokens: int, side: int) -> list[dict[str, Any]]:
    """Requests about pictures of random blocks; the second of two is streamed."""
    rng = np.random.default_rng(0)
    bodies = []
    for number in range(count):
        blocks = rng.integers(0, 255, (4, 4, 3)).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST).save(stream, "PNG")
        url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
        text = {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}
        content = [{"type": "image_url", "image_url": {"url": url}}, text]
        more = {"max_tokens": tokens, "temperature": 0, "stream": number % 2 == 1}
        bodies.append({"messages": [{"role": "user", "content": content}], **more})
    return bodies


@contextmanager
def server(bundle: str, batch_size: int) -> Iterator[int]:
    """`vlm-sft serve`; gives its port."""
    program = "from vlm_sft.cli.main import main; main()"
    command = [sys.executable, "-c", program, "serve", bundle, "--port", "0", "--batch-size", str(batch_size)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            while True:
                time.sleep(0.2)
                log.seek(0)
                said = log.read()
                if process.poll() is not None:
                    raise SystemExit(f"The server has ended: {said}")
                if "/v1 answers" in said:
                    port = int(said.split("/v1 answers")[0].rpartition(":")[2])
                    break
            while True:
                try:
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                    connection.request("GET", "/health")
                    if connection.getresponse().status == 200:
                        break
                except OSError:
                    time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            process.wait(60)


def ask(port: int, body: dict[str, Any]) -> dict[str, Any]:
    """The answer's text, its tokens, and seconds to its first piece and its end."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    sent = {**body, "stream_options": {"include_usage": True}} if body["stream"] else body
    connection.request("POST", "/v1/chat/completions", json.dumps(sent), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"status {response.status}: {response.read().decode()}")
    if not body["stream"]:
        told = json.loads(response.read())
        seconds = time.perf_counter() - began
        text, tokens = told["choices"][0]["message"]["content"], told["usage"]["completion_tokens"]
        return {"text": text, "tokens": tokens, "first": seconds, "seconds": seconds}
    pieces, first, tokens = [], 0.0, 0
    while line := response.readline():
        if not line.startswith(b"data: {"):
            continue
        told = json.loads(line[6:])
        tokens = (told.get("usage") or {}).get("completion_tokens", tokens)
        for choice in told["choices"]:
            if choice["delta"].get("content"):
                first = first or time.perf_counter() - began
                pieces.append(choice["delta"]["content"])
    return {"text": "".join(pieces), "tokens": tokens, "first": first, "seconds": time.perf_counter() - began}


def load(port: int, bodies: list[dict[str, Any]], clients: int, alone: list[str]) -> Found:
    """All clients at once.

    Raises:
        SystemExit: An answer is another one than alone.
    """
    gate = threading.Barrier(clients)

    def client(number: int) -> list[tuple[int, dict[str, Any]]]:
        gate.wait()
        return [(each, ask(port, bodies[each])) for each in range(number, len(bodies), clients)]

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = [pair for pairs in pool.map(client, range(clients)) for pair in pairs]
    seconds = time.perf_counter() - began
    wrong = [number for number, each in found if number < len(alone) and each["text"] != alone[number]]
    if wrong or len(found) != len(bodies):
        raise SystemExit(f"{len(wrong)} answers are not those of their questions alone, {len(found)} have come.")
    whole = [each["seconds"] for _, each in found]
    streamed = [each["first"] for number, each in found if bodies[number]["stream"]]
    shares = {f"p{share}": float(np.percentile(whole, share)) for share in (50, 95, 99)}
    firsts = {f"first_p{share}": float(np.percentile(streamed, share)) for share in (50, 95, 99)}
    tokens = sum(each["tokens"] for _, each in found)
    return {**shares, **firsts, "requests_a_second": len(found) / seconds, "tokens_a_second": tokens / seconds}


def table(results: dict[int, Found]) -> str:
    """The results as Markdown."""
    names = ["p50", "p95", "p99", "first_p50", "first_p95", "first_p99", "requests_a_second", "tokens_a_second"]
    lines = ["| answers at a time | " + " | ".join(name.replace("_", " ") for name in names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for size, found in results.items():
        told = [f"{found[name]:.0f}" if name == "tokens_a_second" else f"{found[name]:.2f}" for name in names]
        lines.append(f"| {size} | " + " | ".join(told) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
