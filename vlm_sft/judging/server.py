"""An OpenAI-compatible server, asked for chat completions: within limits, again where it is busy, never elsewhere."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit, urlunsplit

import httpx2

from ..base.errors import RowError, UserError, refused_by_library
from ..base.limits import READERS, bounded
from ..base.names import Values
from ..base.words import one_line, reason_of
from ..reading.fetch import is_public

ATTEMPTS = 5
LONGEST_WAIT = 120.0  # seconds; a server that wants more is asked again by the user
REFUSED = (400, 413, 422)  # statuses that refuse one prompt: it is too long, or against the server's rules
TAKEN = {"model", "messages", "stream", "n"}
"""Settings that nobody makes: what is asked, and that one whole reply is wanted."""
_NOT_FOUND = "give the URL up to its /v1, and a model that it has"


class Names(NamedTuple):
    """What a server is called in messages.

    Attributes:
        option: Of a command, which names its address; `-key` and `-set` behind it name further ones.
        what: In a sentence.
        replies: What it says.
    """

    option: str = "--judge"
    what: str = "judge"
    replies: str = "verdicts"

    def hint(self, status: int) -> str:
        """How to mend what a status says; "" where that is not known."""
        key = f"name the variable that holds the key with {self.option}-key"
        return {401: key, 403: key, 404: _NOT_FOUND}.get(status, "")


JUDGE = Names()

Message = Mapping[str, str]
"""`role` and `content`."""


class Reply(NamedTuple):
    """What a server said, and how many tokens it counted; None where it does not say."""

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class ChatServer:
    """A server; safe to be asked by several threads.

    Args:
        url: Up to `/v1`, or with `/chat/completions`. Redirects are not followed: what is asked goes to this address
            alone.
        model: As the server calls it.
        key: Name of the environment variable that holds the key; without it no key is sent, whatever is in the
            environment.
        seconds: Longest time of one attempt.
        names: What it is called in messages.

    Raises:
        UserError: The URL is none, the variable is empty, or the key would go over the open network unencrypted.
    """

    def __init__(
        self, url: str, model: str, key: str | None = None, *, seconds: float = 300.0, names: Names = JUDGE
    ) -> None:
        parts = _parts(url, names.option)
        self.model, self.seconds, self.names = model, seconds, names
        self.shown = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))  # a query may hold a key
        path = parts.path.rstrip("/")
        path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
        self._url = urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
        self._key = _key_of(key, names.option)
        self._is_far = _is_far(parts)
        if self._key and parts.scheme == "http" and self._is_far:
            raise UserError(
                f"{names.option} {self.shown} would get the key unencrypted over the open network: give https://."
            )
        self._ended = threading.Event()
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "vlm_sft"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        # What lies in one's own network is asked without the environment's proxy, which would see the key.
        with refused_by_library(
            f"{names.option} {self.shown} cannot be asked: look at the environment's proxy and certificates"
        ):
            self._client = httpx2.Client(
                headers=headers, timeout=seconds, follow_redirects=False, trust_env=self._is_far, verify=True
            )

    def close(self) -> None:
        """Ends every question under way: threads that wait for an answer, or to ask again, raise."""
        self._ended.set()
        self._client.close()

    def complete(self, messages: Sequence[Message], settings: Values) -> Reply:
        """What the model says to messages.

        Args:
            messages: Of the conversation.
            settings: `temperature`, `max_tokens` and their like; those that are None are left out.

        Raises:
            RowError: The server refuses these messages.
            UserError: It cannot be reached, refuses everything, or says what is no chat completion.
        """
        wanted = {"model": self.model, "messages": list(messages), **settings}
        body = json.dumps({name: value for name, value in wanted.items() if value is not None}, ensure_ascii=False)
        data = body.encode("utf-8", "replace")  # JSON may hold no half characters
        for attempt in range(1, ATTEMPTS + 1):
            pause = min(2.0 ** (attempt - 1), 30.0) * random.uniform(0.5, 1.0)
            try:
                status, headers, said = self._post(data)
            except (httpx2.RequestError, RuntimeError) as error:
                if self._ended.is_set():
                    raise self._fails("is asked no more") from None
                why = f"does not answer ({reason_of(error) or type(error).__name__})"
            else:
                if status == 200:
                    return self._reply(said)
                if status not in (408, 425, 429) and status < 500:
                    raise self._refusal(status, headers, said)
                why = f"answers {status}{self._words(said)}"
                pause = max(pause, wait_of(headers.get("Retry-After", "")))
            if attempt == ATTEMPTS or pause > LONGEST_WAIT:
                wait = f" and wants {pause:,.0f} seconds to pass" if pause > LONGEST_WAIT else ""
                raise self._fails(f"{why}{wait}", f"run again later (the {self.names.replies} so far are kept)")
            if self._ended.wait(pause):
                raise self._fails("is asked no more")
        raise AssertionError("the last attempt returns or raises")

    def _post(self, data: bytes) -> tuple[int, Mapping[str, str], bytes]:
        over = time.monotonic() + self.seconds
        said = bytearray()
        with self._client.stream(
            "POST", self._url, content=data, headers={"Content-Type": "application/json"}
        ) as response:
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise self._fails("compresses its answer though it was asked not to")
            for chunk in response.iter_raw():
                said += chunk
                if len(said) > READERS.judge_reply:
                    raise self._fails(f"answers with more than {READERS.judge_reply // 2**20} MiB")
                if time.monotonic() > over:
                    raise httpx2.ReadTimeout(f"it took more than {self.seconds:g} seconds")
            return response.status_code, response.headers, bytes(said)

    def _refusal(self, status: int, headers: Mapping[str, str], said: bytes) -> UserError:
        if 300 <= status < 400:
            to = one_line(headers.get("Location", ""))[:200]
            return self._fails(f"redirects to {to or 'nowhere'}", "give the address that it leads to, if you trust it")
        what = f"answers {status}{self._words(said)}"
        if status in REFUSED:
            return RowError(
                self._sentence(what, f"shorten the question, or correct {self.names.option}-set"),
                reason=f"{self.names.what} refused",
            )
        return self._fails(what, self.names.hint(status))

    def _reply(self, said: bytes) -> Reply:
        found: Any = None
        try:
            found = json.loads(bounded(said))
            message = found["choices"][0]["message"]
            text = message["content"]
            if isinstance(text, list):
                text = "".join(part["text"] for part in text if part["type"] == "text")
            text = text or message.get("refusal") or ""
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            error = isinstance(found, dict) and found.get("error")
            html = said.lstrip()[:1] == b"<"
            what = "HTML" if html else f"an error{self._words(said)}" if error else "something else"
            raise self._fails(f"answers with {what} in place of a chat completion", _NOT_FOUND) from None
        usage = found.get("usage") if isinstance(found.get("usage"), dict) else {}
        return Reply(text, _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))

    def _words(self, said: bytes) -> str:
        """What a server says of an error, in brackets, without the key."""
        try:
            found = json.loads(said)["error"]
            text = str(found["message"] if isinstance(found, dict) else found or "")
        except (ValueError, LookupError, TypeError, RecursionError):
            return ""
        text = one_line(text)[:300]
        text = text.replace(self._key, "…") if self._key else text
        return f" ({text.rstrip('.')})" if text else ""

    def _sentence(self, what: str, mend: str) -> str:
        return f"The {self.names.what} {self.shown} {what}: {mend or 'give the URL of an OpenAI-compatible server'}."

    def _fails(self, what: str, mend: str = "") -> UserError:
        return UserError(self._sentence(what, mend))


def wait_of(header: str) -> float:
    """Seconds that a `Retry-After` header asks for, as a number or as a date; 0 where it says neither."""
    try:
        return max(0.0, float(header)) if re.fullmatch(r"\d{1,9}(\.\d+)?", header.strip()) else max(
            0.0, parsedate_to_datetime(header).timestamp() - time.time()
        )  # fmt: skip
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _parts(url: str, option: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        whole, _ = parts.scheme in ("http", "https") and bool(parts.hostname), parts.port
        whole = whole and not re.search(r"\s", url) and bool(httpx2.URL(url))
    except (ValueError, httpx2.InvalidURL):
        whole = False
    if not whole:
        raise UserError(f"{option} is no URL of a server: write it like http://localhost:8000/v1.")
    if "@" in parts.netloc:
        raise UserError(
            f"{option} holds a name or password: leave it out, and name the variable of a key: {option}-key."
        )
    return parts


def _key_of(name: str | None, option: str) -> str:
    if name is None:
        return ""
    # What is given may be the key itself: it is not repeated.
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None or name not in os.environ:
        raise UserError(f"{option}-key names no environment variable that is set: write its name, as OPENAI_API_KEY.")
    key = os.environ[name].strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(f"{option}-key: the environment variable {name} is empty or holds no key: set it anew.")
    return key


def _is_far(parts: SplitResult) -> bool:
    """Whether a host has an address outside one's own network."""
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except OSError:
        return True
    return any(is_public(str(entry[4][0])) for entry in found)


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9 else None
