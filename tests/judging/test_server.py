"""A judge's server over real HTTP: asked again where it is busy, and one sentence where it lies."""

from __future__ import annotations

import json
import re
import socket
import time
from email.utils import formatdate

import pytest

from vlm_sft.base.errors import RowError, UserError
from vlm_sft.judging import server as module
from vlm_sft.judging.server import ChatServer, Reply, wait_of

MESSAGES = [{"role": "system", "content": "be fair"}, {"role": "user", "content": "哪个更好？"}]
SECRET = "kx-" + "0123456789abcdef"


def asked(double, **settings):
    server = ChatServer(double.url, "法官", **settings)
    try:
        return server.complete(MESSAGES, {"temperature": 0.2, "max_tokens": None})
    finally:
        server.close()


def test_a_completion_and_what_it_cost(double, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)  # which nobody named
    assert asked(double) == Reply("8 7\n哪个更好？", 100, 10)
    assert double.asked == [{"model": "法官", "messages": MESSAGES, "temperature": 0.2}]
    assert double.paths == ["/v1/chat/completions"]
    assert "Authorization" not in double.headers[0] and SECRET not in str(double.headers)


def test_a_key_goes_along_where_its_variable_is_named(double, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f" {SECRET}\n")
    asked(double, key="JUDGE_KEY")
    assert double.headers[0]["Authorization"] == f"Bearer {SECRET}"
    double.next = [(401, {}, json.dumps({"error": {"message": f"Incorrect key {SECRET} given."}}).encode())]
    with pytest.raises(
        UserError, match=r"answers 401 .Incorrect key … given.: name the variable .* --judge-key"
    ) as refused:
        asked(double, key="JUDGE_KEY")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("given", [SECRET, "GONE_KEY", "EMPTY_KEY", "BROKEN_KEY"])
def test_a_key_that_is_none_is_refused_and_never_repeated(given, monkeypatch):
    monkeypatch.setenv("EMPTY_KEY", " ")
    monkeypatch.setenv("BROKEN_KEY", f"{SECRET}\nHost: evil")
    with pytest.raises(UserError, match="--judge-key") as refused:
        ChatServer("http://localhost/v1", "m", given)
    assert SECRET not in str(refused.value)


def test_a_proxy_sees_nothing_of_ones_own_network_and_a_wrong_one_is_one_sentence(double, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert asked(double).text
    monkeypatch.setenv("HTTPS_PROXY", "socks9://nowhere")
    with pytest.raises(
        UserError, match=r"--judge https://judge.invalid/v1 cannot be asked: look at the environment's proxy"
    ):
        ChatServer("https://judge.invalid/v1", "m")


def test_a_key_does_not_go_unencrypted_over_the_open_network(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: [(0, 0, 0, "", ("93.184.215.14", 80))])
    with pytest.raises(UserError, match=r"http://judge.example/v1 would get the key unencrypted"):
        ChatServer("http://judge.example/v1", "m", "JUDGE_KEY")
    ChatServer("https://judge.example/v1", "m", "JUDGE_KEY").close()
    ChatServer("http://judge.example/v1", "m").close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://a/v1",
        "http://",
        "http://a:b@c/v1",
        "http://[1/v1",
        "http://a:99999/v1",
        "//a/v1",
        "http://a b/v1",
        "http://a/\x00",
    ],
)
def test_what_is_no_url_of_a_server(url):
    with pytest.raises(UserError, match=r"^--judge ") as refused:
        ChatServer(url, "m")
    assert "a:b" not in str(refused.value)


@pytest.mark.parametrize("status", [429, 500, 503, 408])
def test_a_busy_server_is_asked_again(double, status):
    double.next = [(status, {"Retry-After": "0"}, b"busy"), (status, {}, b"<html>")]
    assert asked(double).text.startswith("8 7") and len(double.asked) == 3


def test_it_waits_as_long_as_the_server_asks(double):
    double.next = [(429, {"Retry-After": "1"}, b"")]
    began = time.monotonic()
    asked(double)
    assert time.monotonic() - began >= 1
    double.next = [(429, {"Retry-After": "86400"}, b"")]
    with pytest.raises(UserError, match=r"answers 429 and wants 86,400 seconds to pass: run again later"):
        asked(double)


def test_retry_after_is_a_number_or_a_date():
    assert wait_of("3") == 3 and wait_of("1.5") == 1.5
    assert 8 < wait_of(formatdate(time.time() + 10, usegmt=True)) <= 11
    assert (
        wait_of(formatdate(0, usegmt=True))
        == wait_of("")
        == wait_of("soon")
        == wait_of("-3")
        == wait_of("9" * 400)
        == 0
    )


def test_a_server_that_stays_busy_or_is_not_there(double):
    double.next = [(503, {}, json.dumps({"error": "overloaded"}).encode())] * 5
    with pytest.raises(
        UserError, match=r"answers 503 .overloaded.: run again later .the verdicts so far are kept."
    ) as failed:
        asked(double)
    assert not isinstance(failed.value, RowError) and len(double.asked) == 5
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=f"The judge {url} does not answer"):
        ChatServer(url, "m").complete(MESSAGES, {})


def test_a_server_that_is_too_slow(double):
    double.seconds = 0.5
    server = ChatServer(double.url, "m", seconds=0.1)
    with pytest.raises(UserError, match=r"does not answer .*tim"):
        server.complete(MESSAGES, {})


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ((200, {}, b"{"), "answers with something else in place of a chat completion: give the URL up to its /v1"),
        ((200, {"Content-Type": "text/html"}, b"<!doctype html><p>\xe4\xbd\xa0"), "answers with HTML in place of"),
        ((200, {}, b"[" * 100_000), "answers with something else"),
        ((200, {}, b'{"choices": []}'), "answers with something else"),
        ((200, {}, b'{"choices": [{"message": {"content": 7}}]}'), "answers with something else"),
        ((200, {}, b'{"error": {"message": "no such model"}}'), r"answers with an error .no such model. in place"),
        ((200, {}, b" " * (9 * 2**20)), "answers with more than 8 MiB"),
        ((200, {"Content-Encoding": "gzip"}, b"\x1f\x8b"), "compresses its answer though it was asked not to"),
        ((302, {"Location": "http://169.254.169.254/latest/meta-data"}, b""), "redirects to http://169.254.169.254/latest"),
        ((307, {}, b""), "redirects to nowhere"),
        ((404, {}, b"not found"), "answers 404: give the URL up to its /v1, and a model that it has"),
        ((403, {}, b'{"error": "nein"}'), r"answers 403 .nein.: name the variable"),
        ((451, {}, b'{"error": {"message": 7}}'), r"answers 451 .7."),
    ],
)  # fmt: skip
def test_a_server_that_lies_is_one_sentence(double, odd, said):
    double.next = [odd]
    with pytest.raises(UserError, match=said) as failed:
        asked(double)
    assert not isinstance(failed.value, RowError) and "\n" not in str(failed.value)
    assert len(double.asked) == 1 and re.match(r"The judge http://127.0.0.1:\d+/v1 ", str(failed.value))


@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_prompt_that_is_refused_is_an_error_of_its_row(double, status):
    double.next = [(status, {}, json.dumps({"error": {"message": "内容被拒绝"}}, ensure_ascii=False).encode())]
    with pytest.raises(RowError, match=f"answers {status} .内容被拒绝."):
        asked(double)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None}, ""),
        ({"content": None, "refusal": "I cannot."}, "I cannot."),
        ({"content": [{"type": "text", "text": "8"}, {"type": "reasoning"}, {"type": "text", "text": " 7"}]}, "8 7"),
    ],
)
def test_a_message_may_have_parts_or_nothing(double, message, text):
    body = json.dumps({"choices": [{"message": message}], "usage": {"prompt_tokens": -1, "completion_tokens": True}})
    double.next = [(200, {}, body.encode())]
    assert asked(double) == Reply(text, None, None)


def test_half_a_character_is_sent_as_a_question_mark(double):
    server = ChatServer(double.url + "/chat/completions?version=1", "m")
    assert server.complete([{"role": "user", "content": "a\ud83d"}], {}).text == "8 7\na?"
    assert double.paths == ["/v1/chat/completions?version=1"] and "version" not in server.shown


def test_what_is_under_way_ends_when_it_is_closed(double):
    double.next = [(429, {"Retry-After": "60"}, b"")]
    server = ChatServer(double.url, "m")
    timer = module.threading.Timer(0.3, server.close)
    timer.start()
    began = time.monotonic()
    with pytest.raises(UserError, match="is asked no more"):
        server.complete(MESSAGES, {})
    assert time.monotonic() - began < 10
