"""`vlm-sft serve` as a program: 64 clients, other addresses, and its end."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from openai import APIError, OpenAI

from support.asking import Caller
from support.bundles import trained
from vlm_sft import answer, load
from vlm_sft.base.errors import UserError
from vlm_sft.serving.serve import listening

KEY = "a-key-of-ours-1"


def is_well(caller) -> bool:
    try:
        return caller(None, "/health", "GET").status == 200
    except OSError:  # its address is taken before it listens
        return False


@pytest.fixture
def program(tmp_path, forge):
    """Starts the command; gives the process, its port, and the file of what it says."""
    running = []

    def make(*arguments, **environment):
        log = tmp_path / f"log-{len(running)}"
        command = [str(Path(sys.executable).with_name("vlm-sft")), "serve", *map(str, arguments), "--port", "0"]
        with log.open("w") as output:
            process = forge.start(command, stderr=output, stdout=output, env={**os.environ, **environment})
        running.append(process)
        waits = Caller(0)
        waits.until(lambda: "/v1 answers" in log.read_text() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()
        line = next(line for line in log.read_text().splitlines() if "/v1 answers" in line)
        caller = Caller(int(line.split("/v1 answers")[0].rpartition(":")[2]))
        caller.until(partial(is_well, caller))
        return process, caller, log

    yield make
    for process in running:
        process.kill()
        process.wait(20)


@pytest.mark.slow
def test_bundles_are_served_to_sixty_four_clients_and_it_ends_when_told(
    program, bundle_recipe, tmp_path, photos, body
) -> None:
    for name, rank in (("one", 2), ("two", 4)):
        trained(bundle_recipe(name=name, chat_template="ziya", lora={"r": rank}), tmp_path / name)
    row = body(1)["messages"][0]["content"][1]["text"]
    content = [{"type": "image"}, {"type": "text", "text": row}]
    asked = {"messages": [{"role": "user", "content": content}], "images": [photos[1]]}
    wanted = {name: str(answer(*load(tmp_path / name), [asked], max_new_tokens=16)[0]) for name in ("one", "two")}
    process, caller, log = program(tmp_path / "one", tmp_path / "two", "--patience", "20", VLM_SFT_API_KEY=KEY)
    client = OpenAI(base_url=caller.url, api_key=KEY, max_retries=0, timeout=120)

    def ask(number: int) -> tuple[str, str]:
        name = "one" if number % 2 else "two"
        found = client.chat.completions.create(**{**body(1, max_tokens=16), "model": name})
        return name, found.choices[0].message.content

    with ThreadPoolExecutor(64) as clients:
        assert {(name, said) for name, said in clients.map(ask, range(64))} == set(wanted.items())
    stream = client.chat.completions.create(**{**body(1, max_tokens=300, stream=True), "model": "one"})
    pieces = [next(iter(stream)).choices[0].delta.content]
    process.send_signal(signal.SIGTERM)
    pieces += [chunk.choices[0].delta.content or "" for chunk in stream]
    assert process.wait(30) == 0 and "".join(pieces).startswith(wanted["one"][:5])
    said = log.read_text()
    assert KEY not in said and "Traceback" not in said and "in memory once" in said
    with pytest.raises((APIError, OSError)):
        client.models.list()


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once_and_answers_are_told(program, bundle_recipe, tmp_path, body) -> None:
    trained(bundle_recipe(chat_template="ziya", lora={"r": 2}), tmp_path / "one")
    process, caller, log = program(
        tmp_path / "one", "--host", "0.0.0.0", "--batch-size", "1", "--set", "max_new_tokens=5"
    )
    assert "Everyone who reaches 0.0.0.0 can ask" in log.read_text()
    del (asked := body(0, stream=True))["model"]
    with caller.open({**asked, "max_tokens": 450}) as response:
        response.readline()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        rest = response.read().decode()
    assert "[DONE]" in rest and process.wait(30) == 0


def test_an_address_that_is_taken_or_none_is_one_sentence() -> None:
    with listening("127.0.0.1", 0) as heard:
        heard.listen()
        port = heard.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}, cannot be listened on"), listening("127.0.0.1", port):
            pass
    with pytest.raises(UserError, match="correct --host"), listening("no such host.", 0):
        pass
