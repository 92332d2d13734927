"""An export answers through `transformers serve`, asked by OpenAI's client, as the bundle does."""

from __future__ import annotations

import base64
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from support.bundles import BLIP2, LLAVA, trained
from vlm_sft import answer, load
from vlm_sft.export.export import export

QUESTION = "这是什么？ What?"
STACKS = {"llava": LLAVA, "blip2": BLIP2}


@contextmanager
def server(folder: Path):
    """`transformers serve` in `folder`, where a model's name is the name of a folder; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1", "--device", "cpu"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(1200):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        yield address, log
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def exports(bundle_recipe, instruct_bundle, tmp_path, photos):
    """Folders `llava`, `blip2` and `instructblip` beside each other, and what their bundles answer to the question."""
    wanted = {}
    torch.manual_seed(0)  # what a random model says must not depend on the tests before
    bundles = {"instructblip": instruct_bundle("instructblip")}
    for name, stack in STACKS.items():
        bundles[name] = tmp_path / f"bundle-{name}"
        trained(bundle_recipe(**stack), bundles[name])
    for name, bundle in bundles.items():
        export(bundle, tmp_path / "models" / name)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        row = {"messages": messages, "images": [photos[1]]}
        (wanted[name],) = answer(*load(bundle), [row], max_new_tokens=24)
    return tmp_path / "models", wanted


@pytest.mark.slow
def test_exports_answer_over_http(exports, photos):
    from openai import OpenAI

    folder, wanted = exports
    picture = base64.b64encode(Path(photos[1]).read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}]
    with server(folder) as (address, log):
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        for name in wanted:
            options = {"model": name, "messages": messages, "max_tokens": 24, "temperature": 0}
            if name == "instructblip":  # whose processor has no place for a template
                template = (folder / name / "chat_template.jinja").read_text()
                options["extra_body"] = {"chat_template_kwargs": {"chat_template": template}}
            whole = client.chat.completions.create(**options).choices[0].message.content
            chunks = list(client.chat.completions.create(**options, stream=True))
            parts = [part for chunk in chunks if (part := chunk.choices[0].delta.content)]
            assert plain(whole) and plain(whole) == plain(wanted[name]), log.read_text()
            assert plain("".join(parts)) == plain(whole) and len(chunks) > 1, log.read_text()


def plain(text: str) -> str:
    """Without space and halves of characters, of which a tiny model says many: a stream waits for the other half."""
    return re.sub(r"[\s\ufffd]", "", text)
