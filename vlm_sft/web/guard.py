"""What stands before the page: who may ask, which addresses there are, and how much may come in.

Gradio has many addresses that this page does not use (a proxy, a history on the Hub, an editor of the page); it answers
under those alone that the page asks for, and its uploads and questions are bounded and name no URL.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..serving.access import check_host, check_key
from ..serving.refusal import Refusal, busy

READ = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static|svelte)/[\w./@~-]+"
    r"|/gradio_api/(startup-events|queue/data|upload_progress|app_id|info|theme\.css|heartbeat/\w+)"
)
WRITTEN = {"/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/cancel", "/gradio_api/reset"}
FILES = "/gradio_api/file="
ASKED_BYTES = 256 * 2**10  # of a question: its pictures are uploads, of which it has the names
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}
"""A browser that reads them asks no other host, whatever the page or an answer says."""


@dataclass(frozen=True)
class Guard:
    """An application of ASGI in front of the page's.

    Attributes:
        app: The page.
        uploads: Where Gradio puts pictures.
        key: That a browser must send as a password; None: none.
        local: Whether the page is for this machine alone.
        upload_bytes: The most of an upload.
        kept_bytes: The most of all uploads that are there.
    """

    app: ASGIApp
    uploads: Path
    key: str | None = None
    local: bool = True
    upload_bytes: int = 64 * 2**20
    kept_bytes: int = 2 * 2**30

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or hands on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        try:
            handed_on = await self._checked(Request(scope, receive), receive)
        except Refusal as error:
            headers = error.headers() | {"connection": "close"}
            if error.status == 401:
                headers["www-authenticate"] = 'Basic realm="vlm-sft web", charset="UTF-8"'
            await PlainTextResponse(str(error), error.status, headers)(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [pair for pair in message["headers"] if pair[0].lower() not in HEADERS]
                message = {**message, "headers": [*others, *HEADERS.items()]}
            await send(message)

        await self.app(scope, handed_on, with_headers)

    async def _checked(self, request: Request, receive: Receive) -> Receive:
        """Where the body of a request comes from, if it is one of the page's.

        Raises:
            Refusal: It is not.
        """
        headers, path = request.headers, request.url.path
        if self.local:
            check_host(headers)
        check_key(_as_bearer(headers), self.key)
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            raise Refusal("Another page may not ask here.", 403)
        if request.method in ("GET", "HEAD"):
            inside = path.startswith(FILES) and _is_within(path.removeprefix(FILES), self.uploads)
            if not inside and (not READ.fullmatch(path) or ".." in path):
                raise Refusal("There is nothing at this address: open the page at /.", 404)
            return receive
        if request.method != "POST" or path not in WRITTEN:
            raise Refusal("There is nothing at this address: open the page at /.", 404)
        if path != "/gradio_api/upload":
            body = await _read(receive, ASKED_BYTES)
            _check_names(body)
            return _again(body, receive)
        self._check_room(headers)
        return _counted(receive, self.upload_bytes)

    def _check_room(self, headers: Mapping[str, str]) -> None:
        told = headers.get("content-length", "")
        if not (told.isdecimal() and len(told) < 16):
            raise Refusal("An upload must say its length.", 411)
        if int(told) > self.upload_bytes:
            raise Refusal(f"The upload has more than {self.upload_bytes:,} bytes: give fewer or smaller pictures.", 413)
        there = sum(file.stat().st_size for file in self.uploads.rglob("*") if file.is_file())
        if there + int(told) > self.kept_bytes:
            raise busy("There are too many pictures here already: ask again later.", 600)


def _as_bearer(headers: Mapping[str, str]) -> dict[str, str]:
    """What a browser sends of a password, as a client of the server's sends a key; the name is not looked at."""
    kind, _, sent = headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return {}
    try:
        _, _, password = base64.b64decode(sent, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return {}
    return {"authorization": f"Bearer {password}"}


def _is_within(path: str, folder: Path) -> bool:
    return Path(unquote(path)).resolve().is_relative_to(folder.resolve())


async def _read(receive: Receive, most: int) -> bytes:
    """The body of a request.

    Raises:
        Refusal: It has more bytes.
    """
    data, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise Refusal("The client has left.", 499)
        data += message.get("body", b"")
        if len(data) > most:
            raise Refusal(f"The question has more than {most:,} bytes: shorten it.", 413)
        more = message.get("more_body", False)
    return bytes(data)


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read, and then what comes behind it."""
    given = False

    async def from_body() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return from_body


def _counted(receive: Receive, most: int) -> Receive:
    """What is received until it is more than was told; then the client is taken for gone."""
    count = 0

    async def counting() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        return message if count <= most else {"type": "http.disconnect"}

    return counting


def _check_names(body: bytes) -> None:
    """Looks that a question names no URL, which Gradio would fetch.

    Raises:
        Refusal: It does, or it is no JSON.
    """
    try:
        question = json.loads(body)
        _walk(question)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise Refusal("The question is no JSON.", 400) from None


def _walk(value: Any) -> None:
    if isinstance(value, list):
        for each in value:
            _walk(each)
    elif isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str) and "://" in path[:20]:
            raise Refusal("A picture is named by a URL, and none is fetched: upload it.", 400)
        for each in value.values():
            _walk(each)
