"""What the page lets in: who may ask, which addresses there are, and how much may come."""

from __future__ import annotations

import asyncio
import base64
import json
from types import SimpleNamespace

import pytest

from vlm_sft.web.guard import ASKED_BYTES, Guard

KEY = "a-key-of-ours-1"
JOIN, UPLOAD = "/gradio_api/queue/join", "/gradio_api/upload"


@pytest.fixture
def ask(tmp_path):
    """Asks a page that says what it was given; bounds of the guard by keyword."""

    async def page(scope, receive, send) -> None:
        data, more = b"", True
        while more:
            message = await receive()
            more = message.get("more_body", False)
            data += message.get("body", b"")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"Content-Security-Policy", b"x")]})
        await send({"type": "http.response.body", "body": message["type"].encode() + b" " + data})

    def make(path="/", method="GET", body=b"", headers=None, pieces=None, **bounds) -> SimpleNamespace:
        pieces = [body] if pieces is None else pieces
        sent = []
        told = {"host": "127.0.0.1:7860", "content-length": str(len(body)), **(headers or {})}
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
                 "headers": [(name.encode(), value.encode()) for name, value in told.items() if value is not None],
                 "scheme": "http", "server": ("127.0.0.1", 7860)}  # fmt: skip
        messages = [{"type": "http.request", "body": piece, "more_body": piece is not pieces[-1]} for piece in pieces]

        async def receive():
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message) -> None:
            sent.append(message)

        asyncio.run(Guard(page, tmp_path / "uploads", **bounds)(scope, receive, send))
        text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
        return SimpleNamespace(status=sent[0]["status"], text=text, headers=dict(sent[0]["headers"]))

    (tmp_path / "uploads" / "ab").mkdir(parents=True)
    (tmp_path / "uploads" / "ab" / "猫.png").write_bytes(b"x" * 100)
    make.uploads = tmp_path / "uploads"
    return make


@pytest.mark.parametrize("path", ["/", "/config", "/theme.css", "/assets/index-Ab_1.js", "/gradio_api/queue/data"])
def test_the_page_is_shown_with_a_policy_that_asks_no_other_host(ask, path) -> None:
    shown = ask(path)
    policy = shown.headers[b"content-security-policy"].decode()
    assert shown.status == 200 and "default-src 'self'" in policy and "http" not in policy
    assert shown.headers[b"x-content-type-options"] == b"nosniff" and b"Content-Security-Policy" not in shown.headers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/monitoring"), ("GET", "/gradio_api/proxy=http://10.0.0.1/"),
        ("GET", "/gradio_api/run-history/buckets"),
        ("POST", "/gradio_api/run/predict"), ("POST", "/gradio_api/vibe-edit"), ("GET", "/docs"),
        ("GET", "/gradio_api/file=/etc/passwd"), ("GET", "/gradio_api/file=http://10.0.0.1/"), ("DELETE", "/"),
        ("POST", "/"), ("PUT", UPLOAD), ("GET", "/assets/../config"),
    ],
)  # fmt: skip
def test_what_the_page_does_not_use_is_not_there(ask, method, path) -> None:
    assert ask(path, method).status == 404


def test_files_are_uploads_alone(ask) -> None:
    assert ask(f"/gradio_api/file={ask.uploads}/ab/猫.png").status == 200
    assert ask(f"/gradio_api/file={ask.uploads}/ab/../../secret").status == 404
    (ask.uploads / "link").symlink_to("/etc")
    assert ask(f"/gradio_api/file={ask.uploads}/link/passwd").status == 404


def test_another_page_in_the_browser_cannot_ask(ask) -> None:
    assert ask(headers={"host": "evil.example"}).status == 403
    assert ask(headers={"host": "evil.example"}, local=False).status == 200
    for origin, status in (("http://evil.example", 403), ("null", 403), ("http://127.0.0.1:7860", 200)):
        assert ask(JOIN, "POST", b"{}", {"origin": origin}).status == status


def test_a_key_is_the_password(ask) -> None:
    def sent(text: str) -> dict:
        return {"authorization": "Basic " + base64.b64encode(text.encode()).decode()}

    for headers in ({}, sent("me:another-key"), sent("nothing"), {"authorization": "Basic %"}, {"authorization": KEY}):
        refused = ask(headers=headers, key=KEY)
        assert refused.status == 401 and refused.headers[b"www-authenticate"].startswith(b"Basic")
    assert ask(headers=sent(f"谁:{KEY}"), key=KEY).status == 200


def test_a_question_is_bounded_and_names_no_url(ask) -> None:
    fine = json.dumps({"data": [[{"image": {"path": "/tmp/a.png", "url": "http://127.0.0.1/a"}}], "问 http://x"]})
    done = ask(JOIN, "POST", fine.encode())
    assert done.status == 200 and fine in done.text
    for path in ("http://10.0.0.1/a.png", "HTTPS://example.com", "ftp://x"):
        body = json.dumps({"data": [{"a": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}]}).encode()
        assert "none is fetched" in ask(JOIN, "POST", body).text
    assert ask(JOIN, "POST", b"{").status == 400 and ask(JOIN, "POST", b"[" * 100_000).status == 400
    assert ask(JOIN, "POST", b" " * (ASKED_BYTES + 1)).status == 413


def test_uploads_are_bounded_each_and_together(ask) -> None:
    assert ask(UPLOAD, "POST", b"x" * 50, upload_bytes=50, kept_bytes=150).status == 200
    assert ask(UPLOAD, "POST", b"x" * 51, upload_bytes=50).status == 413
    full = ask(UPLOAD, "POST", b"x" * 51, kept_bytes=150)
    assert full.status == 429 and full.headers[b"retry-after"] == b"600"
    assert ask(UPLOAD, "POST", headers={"content-length": None}).status == 411
    assert ask(UPLOAD, "POST", headers={"content-length": "9" * 30}).status == 411
    lied = ask(UPLOAD, "POST", pieces=[b"x" * 40, b"y" * 40], headers={"content-length": "10"}, upload_bytes=50)
    assert lied.text.startswith("http.disconnect") and "y" not in lied.text


def test_nothing_but_requests_is_handed_on(tmp_path) -> None:
    told = []

    async def page(scope, receive, send) -> None:
        told.append(scope["type"])

    for kind in ("lifespan", "websocket"):
        asyncio.run(Guard(page, tmp_path)({"type": kind}, None, None))
    assert told == ["lifespan"]
