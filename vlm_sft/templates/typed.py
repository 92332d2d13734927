"""Marks control tokens in what people say, before a template prints it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from ..base.names import Values

LOCATION = re.compile(r"<loc\d+>|<patch_index_\d+>")
"""Tokens that say where something is. An answer may be typed with them; in a question, boxes alone make them."""


def mark_where_typed(chat: Sequence[Values], tools: object, control: tuple[str, ...], mark: str) -> tuple[Any, Any]:
    """Messages and tools with the marks of `mark_typed`; its arguments."""
    if not may_be_typed(chat, tools, control):
        return chat, tools
    return mark_typed(chat, control, mark), mark_typed(tools, control, mark)


def may_be_typed(chat: Sequence[Values], tools: object, control: tuple[str, ...]) -> bool:
    """Whether `mark_typed` may have something to mark; of most conversations one look says that it has not.

    Args:
        chat: Messages as `normalise_messages` gives them.
        tools: What may be called; they are always looked at.
        control: The control tokens.
    """
    parts = [part for message in chat for part in message["content"]]
    if tools or any("written" in part for part in parts) or any(len(message) > 2 for message in chat):
        return True
    whole = "".join(part["text"] for part in parts if part["type"] != "image")
    return bool(control) and any(pattern.search(whole) for pattern in (_any_of(control), LOCATION))


def mark_typed(value: object, control: tuple[str, ...], mark: str, locations: bool = False) -> Any:
    """What messages or tools say, with a mark behind the first character of every control token in it.

    What boxes were written as is left out. Questions and system texts get a mark in tokens of locations too.

    Args:
        value: Messages, a list of tools, or any part of them; roles and kinds of parts stay as they are.
        control: The control tokens.
        mark: A character that the value does not hold.
        locations: Whether the value is of a question.
    """
    if not control or not value:
        return value
    if isinstance(value, str):
        return _marked([{"text": value}], control, mark, locations)[0]
    if isinstance(value, Mapping):
        asks = locations or value.get("role") in ("user", "system")
        return {k: v if k in ("role", "type") else mark_typed(v, control, mark, asks) for k, v in value.items()}
    if not isinstance(value, Sequence):
        return value
    if not all(isinstance(part, Mapping) and part.get("type") in ("text", "image") for part in value):
        return [mark_typed(each, control, mark, locations) for each in value]
    # The parts of a message are searched as one text: a template may print them without anything between.
    texts = iter(_marked([part for part in value if part["type"] == "text"], control, mark, locations))
    return [{"type": "text", "text": next(texts)} if part["type"] == "text" else part for part in value]


def _marked(parts: Sequence[Values], control: tuple[str, ...], mark: str, locations: bool) -> list[str]:
    texts = [part["text"] for part in parts]
    whole = "".join(texts)
    patterns = (_any_of(control), *([LOCATION] if locations else []))
    places = sorted({match.start() + 1 for pattern in patterns for match in pattern.finditer(whole)})
    if any("written" in part for part in parts):
        offsets = accumulate(map(len, texts), initial=0)
        ours = [(a + at, b + at) for part, at in zip(parts, offsets, strict=False) for a, b in part.get("written", ())]
        places = [place for place in places if not any(low < place < high for low, high in ours)]
    marked, start = [], 0
    for text in texts:
        end = start + len(text)
        borders = [start, *(place for place in places if start <= place < end), end]
        marked.append(mark.join(whole[a:b] for a, b in pairwise(borders)))
        start = end
    return marked


@lru_cache(maxsize=64)
def _any_of(control: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
