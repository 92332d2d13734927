"""The server over HTTP: OpenAI's own client, clients that err, leave and come all at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import BadRequestError, NotFoundError, OpenAI

from support.asking import QUESTIONS
from vlm_sft.base.limits import READERS
from vlm_sft.serving import pool as pools
from vlm_sft.serving import serve as program
from vlm_sft.serving.app import Stream
from vlm_sft.serving.prepare import Rules

KEY = "a-key-of-ours-1"


def test_openais_client_asks_whole_and_streamed(start, body, alone) -> None:
    caller = start()
    client = OpenAI(base_url=caller.url, api_key="none", max_retries=0)
    assert [each.id for each in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    for number in range(3):
        whole = client.chat.completions.create(**body(number))
        assert whole.choices[0].message.content == alone(number) and whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 12 and whole.usage.prompt_tokens > 8
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(client.chat.completions.create(**body(number), **options))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == alone(number) and chunks[-1].usage == whole.usage
        assert chunks[-2].choices[0].finish_reason == "length" and chunks[0].choices[0].delta.role == "assistant"


def test_stop_seed_and_probabilities(start, body, alone) -> None:
    client = OpenAI(base_url=start().url, api_key="none", max_retries=0)
    text = alone(0, 40)
    mark = text[len(text) // 2 :][:3]
    stopped = client.chat.completions.create(**body(0, max_tokens=40, stop=[mark])).choices[0]
    assert stopped.message.content == text.split(mark)[0].strip() and stopped.finish_reason == "stop"
    drawn = [
        client.chat.completions.create(**body(0, temperature=1.5, seed=seed)).choices[0].message.content
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    asked = body(0, logprobs=True, top_logprobs=3)
    told = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert len(told) == 12 and all(each.logprob == each.top_logprobs[0].logprob for each in told)
    chunks = client.chat.completions.create(**asked, stream=True)
    streamed = [each for chunk in chunks if (found := chunk.choices[0].logprobs) for each in found.content]
    assert [each.logprob for each in streamed] == pytest.approx([each.logprob for each in told], abs=1e-4)


def test_sixty_four_clients_at_once_each_have_the_answer_of_their_question_alone(start, body, alone) -> None:
    caller = start(batch_size=16)
    wanted = [alone(number, 6 + number % 9) for number in range(40)]
    gate = threading.Barrier(64)

    def ask(number: int) -> tuple[int, str]:
        gate.wait(30)
        number %= 40
        asked = body(number, max_tokens=6 + number % 9)
        if number % 3:
            return number, caller.says(asked)
        with caller.open({**asked, "stream": True}) as response:
            events = [line[6:] for line in response.read().decode().split("\n\n") if line]
        assert events[-1] == "[DONE]"
        return number, "".join(json.loads(each)["choices"][0]["delta"].get("content", "") for each in events[:-1])

    with ThreadPoolExecutor(64) as clients:
        for number, said in clients.map(ask, range(64)):
            assert said == wanted[number]
    text = caller(None, "/metrics", "GET").told
    assert 'vlm_sft_requests_total{model="tiny",status="200"} 64' in text and "vlm_sft_questions_waiting 0" in text
    assert 'vlm_sft_batch_size_bucket{le="1"} 64' not in text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(start, body, alone, stream) -> None:
    caller = start(batch_size=1)
    data = json.dumps(body(0, max_tokens=400, stream=stream)).encode()
    with socket.create_connection(("127.0.0.1", caller.port)) as leaving:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        leaving.sendall((head + "Content-Type: application/json\r\n\r\n").encode() + data)
        caller.until(lambda: caller.server.pool.counts()[0] == 1)
    assert caller.says(body(1, max_tokens=3)) == alone(1, 3)
    metrics = caller(None, "/metrics", "GET").told
    assert "vlm_sft_clients_gone_total 1" in metrics
    written = next(line for line in metrics.splitlines() if 'kind="written"' in line)
    assert int(written.split()[-1]) < 400
    caller.until(lambda: caller.server.inside == 0)


def test_what_is_wrong_is_an_error_in_openais_form(start, body, picture) -> None:
    caller = start(Rules(body_bytes=20_000))
    client = OpenAI(base_url=caller.url, api_key="none", max_retries=0)
    with pytest.raises(BadRequestError, match="n can only be 1 here"):
        client.chat.completions.create(**body(0, n=2))
    with pytest.raises(NotFoundError, match="There is no model 'tinny'; did you mean tiny"):
        client.chat.completions.create(**{**body(0), "model": "tinny"})
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    for stream in (False, True):
        asked = {"messages": [{"role": "user", "content": [broken]}], "stream": stream}
        assert caller(asked).status == 400
    for sent, status in ((b"{}", 400), (b"\x00", 400), (b"x" * 30_000, 413)):
        answer = caller(sent)
        assert answer.status == status and answer.told["error"]["type"] == "invalid_request_error"
    assert caller(body(0), Content_Type="text/plain").status == 415
    assert caller(None, "/v1/nothing", "GET").status == 404 and caller(None, "/health", "DELETE").status == 405
    assert caller(None, "/v1/models/none", "GET").told["error"]["code"] == "model_not_found"
    assert caller(None, "/health", "GET", Host="evil.example").status == 403
    assert caller(None, "/health", "GET").told == {"status": "ok"}


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)


@given(
    data=st.binary(max_size=40)
    | ANY.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from(["model", "messages", "stop", "seed", "stream", "max_tokens"]), ANY).map(
        lambda value: json.dumps({"messages": [{"role": "user", "content": "?"}], **value}).encode()
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_ends_the_server(start, data) -> None:
    caller = _once(start)
    answer = caller(data)
    assert answer.status in (200, 400, 404), answer.told
    if answer.status != 200:
        assert answer.told["error"]["message"]
    assert caller(None, "/health", "GET").status == 200


def _once(start):
    """One server for all examples of a test."""
    if not hasattr(start, "running"):
        start.running = start(Rules(tokens=4))
    return start.running


def test_a_key_is_asked_for(start, body) -> None:
    caller = start(key=KEY)
    for path, method in (("/v1/models", "GET"), ("/metrics", "GET"), ("/v1/chat/completions", "POST")):
        for sent in ({}, {"Authorization": "Bearer wrong-key-of-1"}):
            answer = caller(body(0) if method == "POST" else None, path, method, **sent)
            assert answer.status == 401 and KEY not in str(answer.told)
    assert caller(None, "/health", "GET").status == 200
    client = OpenAI(base_url=caller.url, api_key=KEY, max_retries=0)
    assert client.chat.completions.create(**body(0, max_tokens=2)).choices


def test_a_full_server_says_when_to_come_again(start, body, monkeypatch) -> None:
    go = threading.Event()
    real = pools.new_tokens
    monkeypatch.setattr(pools, "new_tokens", lambda *given, **more: go.wait(30) and real(*given, **more))
    caller = start(batch_size=1, queue=1)
    with ThreadPoolExecutor(2) as clients:
        asked = [clients.submit(caller.says, body(number, max_tokens=2)) for number in range(2)]
        caller.until(lambda: caller.server.inside == 2)
        answer = caller(body(2))
        assert answer.status == 429 and int(answer.headers["retry-after"]) > 0
        assert answer.told["error"]["type"] == "rate_limit_error"
        assert 'vlm_sft_requests_total{model="",status="429"} 1' in caller(None, "/metrics", "GET").told
        caller.server.stopping = True
        assert caller(body(2)).status == caller(None, "/health", "GET").status == 503
        go.set()
        assert all(isinstance(each.result(30), str) for each in asked)


def test_a_body_that_does_not_come_is_not_waited_for(start) -> None:
    caller = start(Rules(seconds=0.3))
    with socket.create_connection(("127.0.0.1", caller.port), timeout=20) as slow:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow.sendall((head + "Content-Length: 100\r\n\r\n{").encode())
        assert b" 408 " in slow.recv(999)
    caller.until(lambda: caller.server.inside == 0)


def test_a_head_that_does_not_come_is_not_waited_for(start) -> None:
    caller = start(Rules(seconds=0.5))
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for sent in (b"", b"GET /health HT", whole[:-2], whole + b"GET /hea"):
        with socket.create_connection(("127.0.0.1", caller.port), timeout=20) as slow:
            slow.sendall(sent)
            said = b""
            with contextlib.suppress(ConnectionResetError):
                while more := slow.recv(999):
                    said += more
            assert (b" 200 " in said) == (whole in sent)


def test_more_connections_than_are_answered_are_closed_at_once(start, monkeypatch) -> None:
    monkeypatch.setattr(program, "READERS", replace(READERS, connections=3))
    caller = start(Rules(seconds=20))
    address = ("127.0.0.1", caller.port)
    held = [socket.create_connection(address, timeout=20) for _ in range(3)]
    caller.until(lambda: len(held) == 3)
    with socket.create_connection(address, timeout=20) as more, contextlib.suppress(ConnectionResetError):
        assert more.recv(1) == b""
    for each in held:
        each.close()
    caller.until(lambda: _is_well(caller))


def _is_well(caller) -> bool:
    try:
        return caller(None, "/health", "GET").status == 200
    except OSError:
        return False


def test_bodies_that_are_too_large_together_and_readers_that_stop_reading(start, body) -> None:
    caller = start(Rules(body_bytes=10_000))
    caller.server.held = 8 * 10_000
    answer = caller(body(0))
    assert answer.status == 429 and "too large together" in answer.told["error"]["message"]
    caller.server.held = 0
    assert caller(body(0)).status == 200 and caller.server.held == 0 == caller.server.inside


def test_a_client_that_reads_no_more_is_taken_for_gone() -> None:
    async def events():
        yield b"data: {}\n\n"
        yield b"data: {}\n\n"

    async def send(message) -> None:
        sent.append(message)
        if message.get("body"):
            await asyncio.sleep(60)

    sent: list[dict] = []
    ended: list[bool] = []
    asyncio.run(Stream(events(), 0.05, [lambda: ended.append(True)])({"type": "http"}, None, send))
    assert ended == [True] and len(sent) == 2


def test_a_stream_that_is_cut_short_is_told_so(start, body) -> None:
    caller = start()
    with caller.open(body(0, max_tokens=450, stream=True)) as response:
        assert response.readline().startswith(b"data: ")
        caller.server.pool.close()
        rest = response.read().decode()
    assert '"type": "server_error"' in rest and rest.endswith("data: [DONE]\n\n")


def test_chinese_questions_and_several_images(start, picture, tiny, shared_photos) -> None:
    from vlm_sft import answer

    texts = [{"type": "text", "text": f"第{n}张：" + QUESTIONS[1]} for n in range(3)]
    content = [part for number in range(3) for part in (picture(number), texts[number])]
    said = start().says({"messages": [{"role": "user", "content": content}], "max_tokens": 9})
    ours = [part for text in texts for part in ({"type": "image"}, text)]
    row = {"messages": [{"role": "user", "content": ours}], "images": shared_photos[:3]}
    assert [said] == answer(*tiny, [row], max_new_tokens=9)
