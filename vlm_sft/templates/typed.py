"""Marks control tokens in what people say, before a template prints it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any


def mark_typed(value: Any, control: tuple[str, ...], mark: str) -> Any:
    """What messages or tools say, with a mark behind the first character of every control token in it.

    Args:
        value: Messages, a list of tools, or any part of them; roles and kinds of parts stay as they are.
        control: The control tokens.
        mark: A character that the value does not hold.
    """
    if not control or not value:
        return value
    if isinstance(value, str):
        return _marked([value], control, mark)[0]
    if isinstance(value, Mapping):
        return {k: v if k in ("role", "type") else mark_typed(v, control, mark) for k, v in value.items()}
    if not isinstance(value, Sequence):
        return value
    if not all(isinstance(part, Mapping) and part.get("type") in ("text", "image") for part in value):
        return [mark_typed(each, control, mark) for each in value]
    # The parts of a message are searched as one text: a template may print them without anything between.
    texts = iter(_marked([part["text"] for part in value if part["type"] == "text"], control, mark))
    return [{**part, "text": next(texts)} if part["type"] == "text" else part for part in value]


def _marked(texts: Sequence[str], control: tuple[str, ...], mark: str) -> list[str]:
    whole = "".join(texts)
    places = [match.start() + 1 for match in _any_of(control).finditer(whole)]
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
