"""Rows on the same pictures become one row: turns of one conversation, or questions of which none sees another.

A picture is the same where rows name the same path, or embed the same bytes; no file is opened. A merged row has the
messages of its rows behind each other, the pictures once, and at the first message of each row a mark with its id.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from ..base.names import Row, Values
from ..base.whole_files import digest
from ..reading.image_refs import SIZES, TIME, image_key
from .filling import pack
from .messages import KEPT, ROW_BEGINS, SHARED, Message, Part, text_part

NAMED = 3  # rows that the id of a merged one names


def merge_key(row: Values, independent: bool, language: str = "") -> bytes | None:
    """What rows must have in common to be merged: equal for those that may be; None for one that stays as it is.

    That is their pictures, what they say up to the last of them, the system message, the tools and the language. A row
    stays as it is where it has no picture, where one comes after the first question, and, as turns of one conversation,
    where anything stands before the pictures, nothing after them, or thoughts do, which templates print of the last
    answer alone.

    Args:
        row: With its `extras` where they belong.
        independent: Whether the questions will not see each other.
        language: Of the row, where rows are told apart by it.
    """
    messages = row["messages"]
    first = _first_question(messages)
    lead, rest = _split(messages[first]["content"])
    if not row["images"] or len(row["images"]) != sum(part["type"] == "image" for part in lead):
        return None
    if not independent:
        thoughts = any("reasoning_content" in message for message in messages)
        asked = any(part["type"] == "box" or part["text"].strip() for part in rest)
        if thoughts or not asked or any(part["type"] != "image" for part in lead):
            return None
    before = [[m["role"], m["content"], {key: m[key] for key in KEPT if key in m}] for m in messages[:first]]
    shown = [{key: image[key] for key in (*SIZES, TIME) if key in image} for image in row["images"]]
    said = [language, before, lead, shown, messages[first].get("tools"), independent]
    text = json.dumps(said, ensure_ascii=False, sort_keys=True, default=str)
    return digest(text.encode("utf-8", "surrogatepass") + b"".join(map(image_key, row["images"])))


def groups_of(keys: Sequence[bytes | None], seed: int) -> list[list[int]]:
    """Numbers of the rows of each key, in the order of their first rows; within a key in one that is drawn.

    Args:
        keys: What `merge_key` says of each row; one without a key is a group of its own.
        seed: Decides the order.
    """
    groups: dict[bytes | int, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(number if key is None else key, []).append(number)
    chance = np.random.default_rng([seed % 2**32, len(keys)])
    return [chance.permutation(group).tolist() if len(group) > 1 else group for group in groups.values()]


def fill(
    group: Sequence[int], lengths: np.ndarray, fronts: np.ndarray, room: int | None, extra: int = 0
) -> list[list[int]]:
    """The rows of a group by the merged row that each goes into, so that none should have more than `room` tokens.

    Args:
        group: Numbers of rows.
        lengths: Tokens of every row.
        fronts: How many of these there are up to the end of its last picture.
        room: Tokens of a merged row; None for no limit.
        extra: Tokens that a later turn brings beside its own.
    """
    if len(group) == 1 or room is None:
        return [list(group)]
    front = int(fronts[group[0]])
    own = [int(lengths[number]) - front + extra for number in group]
    return [[group[place] for place in sorted(places)] for places in pack(own, max(room - front + extra, 1))]


def merged(rows: Sequence[Row], independent: bool) -> Row:
    """Rows of one `merge_key` as one row.

    Args:
        rows: With their `extras` where they belong; the first question of each but the first loses the pictures, what
            stands before them and, as a turn of a conversation, the white space that parted it from them.
        independent: Whether `apart` takes it apart again, so that no question sees another.
    """
    messages: list[Message] = []
    for row in rows:
        own = [dict(message) for message in row["messages"]]
        first = _first_question(own)
        if messages:
            _, rest = _split(own[first]["content"])
            if not independent:
                own[first].pop("tools", None)
                if rest[0]["type"] == "text":
                    rest = [text_part(rest[0]["text"].lstrip()), *rest[1:]]
            own[first]["content"] = rest
            own = own[first:]
            first = 0
        own[first] |= {ROW_BEGINS: row["id"], **({SHARED: True} if independent else {})}
        messages += own
    ids = [row["id"] for row in rows]
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return {**rows[0], "messages": messages, "id": ", ".join(ids[:NAMED]) + more}


def ids_of(row: Values) -> list[str]:
    """The ids of the rows that were merged into one; of any other row its own."""
    return [message[ROW_BEGINS] for message in row["messages"] if ROW_BEGINS in message] or [str(row["id"])]


def apart(row: Row) -> list[Row]:
    """The rows of which no question sees another, each as it was before they were merged; any other row as it is.

    Args:
        row: With its `extras` where they belong.
    """
    messages = row["messages"]
    starts = [place for place, message in enumerate(messages) if SHARED in message]
    if not starts:
        return [row]
    lead, _ = _split(messages[starts[0]]["content"])
    found = []
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(messages)], strict=True)):
        question = {key: value for key, value in messages[start].items() if key not in (ROW_BEGINS, SHARED)}
        if number:
            question["content"] = [*lead, *question["content"]]
        own = [*messages[: starts[0]], question, *messages[start + 1 : end]]
        found.append({**row, "messages": own, "id": messages[start][ROW_BEGINS]})
    return found


def _first_question(messages: Sequence[Message]) -> int:
    return int(messages[0]["role"] == "system")


def _split(parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """The parts up to the last picture, and those behind it."""
    end = max((place + 1 for place, part in enumerate(parts) if part["type"] == "image"), default=0)
    return list(parts[:end]), list(parts[end:])
