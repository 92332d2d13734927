"""Answers as OpenAI's clients read them: whole, or as events of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable

from ..base.names import Json
from .writing import UNREADABLE, Share

LEAST = -9999.0  # the logarithm of what has no probability, as OpenAI writes it


class Reply:
    """What stands in every part of one reply.

    Args:
        model: The name of the bundle.
    """

    def __init__(self, model: str) -> None:
        self._same = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, reason: str, usage: Json, shares: Iterable[Share] | None) -> Json:
        """An answer at once."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": _likely(shares)}
        return {**self._same, "object": "chat.completion", "choices": [choice], "usage": usage}

    def piece(self, delta: Json, reason: str | None = None, shares: Iterable[Share] | None = None) -> Json:
        """An event of a stream: what is added, and at the end why it ends."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": _likely(shares)}
        return {**self._same, "object": "chat.completion.chunk", "choices": [choice]}

    def counts(self, usage: Json) -> Json:
        """The last event of a stream whose counts were asked for."""
        return {**self._same, "object": "chat.completion.chunk", "choices": [], "usage": usage}


def usage_of(prompt: int, written: int) -> Json:
    """Tokens of the prompt, with those of its images, and of the answer without the one that ended it."""
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def listed(name: str, began: int) -> Json:
    """A bundle in the list of models."""
    return {"id": name, "object": "model", "created": began, "owned_by": "vlm_sft"}


def dumped(value: object) -> bytes:
    """JSON in UTF-8; halves of characters, which only a client can have sent, as escapes."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False).encode()


def event(value: object) -> bytes:
    """An event of a stream."""
    return b"data: " + dumped(value) + b"\n\n"


def _likely(shares: Iterable[Share] | None) -> Json | None:
    if shares is None:
        return None
    told = [{**_share(share), "top_logprobs": [_share(other) for other in share.others]} for share in shares]
    return {"content": told, "refusal": None}


def _share(share: Share) -> Json:
    # A token that is a part of a character has no text, and JSON no minus infinity.
    data = None if UNREADABLE in share.text else list(share.text.encode())
    return {"token": share.text, "logprob": share.log if share.log > LEAST else LEAST, "bytes": data}
