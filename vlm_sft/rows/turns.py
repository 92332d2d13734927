"""One message of a row, in any of the ways that people write it → role, content and what it says of the loss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..base.names import Json, Values
from ..base.words import kind, short
from ..reading.image_refs import OPTIONS
from .box import given_box
from .keys import ASSISTANT, SYSTEM, USER, check_left, role_of
from .messages import PLACE, Message, Part, image_part, ref_part, split_marks, text_part, video_part
from .raw_row import RowView, is_given
from .videos import REFERENCES as VIDEOS
from .videos import video_entry

# Whether a value that is true puts the answer into the loss.
SWITCHES = {
    "loss": True, "train": True, "training": True, "weight": True, "loss_scale": True, "loss_mask": True, "mask": False,
}  # fmt: skip
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_READ = (*_THOUGHTS, "tools", "answers", *SWITCHES)
FROM_AND_VALUE = "from and value"  # what messages of ShareGPT have, and under which they are read first
_OPENAI = (("role", "from"), ("content", "value"))
_SHAREGPT = tuple((other, one) for one, other in _OPENAI)
_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image", "image_url", "input_image")
_REFERENCES = ("image", "path", "bytes", "url", "image_url", "source")
COLUMN_REFERENCES = ("image", "path", "bytes", "image_url")
_PAIRS = (("prompt", "completion"), ("query", "response"), ("instruction", "output"))


class Turn(NamedTuple):
    """A message as it was read.

    Attributes:
        role: one of the three, or what the row says.
        content: text, or a list of raw parts.
        more: `loss: False`, `reasoning_content`, `tools` and `answers`, of a message that has them.
        key: the message's place in the row.
    """

    role: Any
    content: Any
    more: Json
    key: str


def read_turn(row: RowView, turn: object, key: str, names: str = "role and content") -> Turn:
    """Reads one message; the keys of it that mean something else are refused, and unknown ones counted.

    Args:
        row: where it stands.
        turn: the raw message.
        key: its place in the row.
        names: the keys that it should have, for the error.

    Raises:
        RowError: it is no message, or one that cannot be trained on as it is.
    """
    if not isinstance(turn, dict):
        raise row.error(f"{key} is {kind(turn)}, not an object with {names}", "correct the row")
    pairs = _SHAREGPT if names == FROM_AND_VALUE else _OPENAI
    speaker, text = pairs[0][0], pairs[1][0]
    if len(turn) == 2 and speaker in turn and text in turn:  # as most are, and then nothing is left to look at
        return Turn(role_of(row, turn[speaker], key), turn[text], {}, key)
    if calls := next((name for name in ("tool_calls", "function_call") if is_given(turn.get(name))), None):
        raise row.error(f"{key} calls tools ({calls}), which are not supported", "remove the row", "wrong role")
    speaker, text = (next((name for name in pair if turn.get(name) is not None), pair[0]) for pair in pairs)
    role, content = role_of(row, turn.get(speaker), key), turn.get(text)
    check_left(row, "message", turn, (speaker, text, *_READ), f"{key}.")
    more: Json = {}
    if not _learned(row, turn, role, key):
        more["loss"] = False
    if thoughts := {name: row.text(turn[name], f"{key}.{name}") for name in _THOUGHTS if is_given(turn.get(name))}:
        if role != ASSISTANT:
            raise row.error(f"{key}.{next(iter(thoughts))} is not of an assistant", "move it to the answer")
        if len(set(thoughts.values())) > 1:
            raise row.error(f"{key} has {' and '.join(thoughts)}, which differ", "keep one of them")
        more["reasoning_content"] = next(iter(thoughts.values()))
    if is_given(tools := turn.get("tools")):
        more["tools"] = tools_in(row, tools, f"{key}.tools")
    if is_given(answers := turn.get("answers")):
        if role != ASSISTANT or not isinstance(answers, list):
            raise row.error(f"{key}.answers is no list of what annotators answered", "write one, on the answer")
        more["answers"] = [row.text(answer, f"{key}.answers") for answer in answers]
    return Turn(role, content, more, key)


def tools_in(row: RowView, tools: object, key: str) -> list[Any]:
    """The tools that a row or its first message describes, of which some rows hold the JSON.

    Raises:
        RowError: they are no list of objects.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise row.error(f"{key} is text, but no JSON", "write the list of tools") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise row.error(f"{key} is no list of objects", "write the list of tools as transformers takes it")
    return tools


def _learned(row: RowView, turn: Values, role: object, key: str) -> bool:
    """What the switches of a message say, of an answer without any: yes."""
    said = {}
    for name, positive in SWITCHES.items():
        if (value := turn.get(name)) is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            mend = "write true, false, 1 or 0: a part of a loss cannot be had"
            raise row.error(f"{key}.{name} is {short(str(value))}, which is not a switch", mend)
        said[name] = bool(value) == positive
    if len(set(said.values())) > 1:
        raise row.error(f"{key} has {' and '.join(said)}, which do not agree", "keep one of them")
    learned = all(said.values())
    if said and learned and role in (USER, SYSTEM):
        mend = "only answers are; take it away, or set it to leave the message out"
        raise row.error(f"{key}.{next(iter(said))} asks for the {role}'s text to be learned", mend)
    return learned or role != ASSISTANT


def raw_turns(row: RowView) -> list[Turn]:
    """The messages of a row, under whichever of the known keys they are, with the row's `history`."""
    earlier = _history(row)
    if row.values.get("messages") is None:
        for name in ("conversations", "conversation"):
            if row.get(name) is not None:
                return earlier + _listed(row, name, FROM_AND_VALUE)
        there = [pair for pair in _PAIRS if any(name in row.values for name in pair)]
        if "messages" not in row.values and there:
            whole = [pair for pair in there if all(row.values.get(name) is not None for name in pair)]
            return earlier + _pair(row, *(whole or there)[0])
    row.need("messages")
    return earlier + _listed(row, "messages", "role and content")


def _listed(row: RowView, name: str, names: str) -> list[Turn]:
    found: list[Turn] = []
    for index, turn in enumerate(row.listed(name, f"objects with {names}")):
        key = f"{name}[{index}]"
        if isinstance(turn, dict) and "human" in turn and "assistant" in turn:  # ms-swift's pairs
            check_left(row, "message", turn, ("human", "assistant"), f"{key}.")
            found += [Turn(USER, turn["human"], {}, f"{key}.human")]
            found += [Turn(ASSISTANT, turn["assistant"], {}, f"{key}.assistant")]
        else:
            found.append(read_turn(row, turn, key, names))
    return found


def _pair(row: RowView, asked: str, answered: str) -> list[Turn]:
    """A question and its answer, each text or a list of messages."""
    turns: list[Turn] = []
    for key, role in ((asked, USER), (answered, ASSISTANT)):
        value = row.need(key)
        if isinstance(value, list):
            turns += [read_turn(row, turn, f"{key}[{index}]") for index, turn in enumerate(value)]
            continue
        text = row.text(value, key)
        if key == "instruction" and is_given(about := row.get("input")):
            text += "\n" + row.text(about, "input")
        turns.append(Turn(role, text, {}, key))
    return turns


def _history(row: RowView) -> list[Turn]:
    """The pairs of `history`: Alpaca of LLaMA-Factory, query and response of ms-swift."""
    pairs = row.get("history")
    if not is_given(pairs):
        return []
    if not isinstance(pairs, list) or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs):
        raise row.error('"history" is no list of pairs', "write a list of [question, answer]")
    if row.get("messages", "conversations", "conversation") is not None:
        raise row.error('the row has "history" beside a list of its turns', "write all turns into the list")
    turns = []
    for index, (asked, answer) in enumerate(pairs):
        turns += [Turn(USER, asked, {}, f"history[{index}][0]"), Turn(ASSISTANT, answer, {}, f"history[{index}][1]")]
    return turns


def message_of(row: RowView, turn: Turn, inline: list[Any], marks: Sequence[str] = (USER,)) -> Message:
    """A turn as a message of parts.

    Args:
        row: where it stands.
        turn: as it was read.
        inline: gets, for each place of an image, what the part itself carries, None where the column has it.
        marks: the roles in whose text `<image>` is the place of an image.
    """
    if isinstance(turn.content, list):
        parts = [_part(row, part, f"{turn.key}.content[{i}]", inline) for i, part in enumerate(turn.content)]
    else:
        text = row.text(turn.content, f"{turn.key}.content")
        parts = split_marks(text) if turn.role in marks else [text_part(text)]
        inline += [None for part in parts if part["type"] == "image"]
    return {"role": turn.role, "content": parts, **turn.more}


def _part(row: RowView, part: object, key: str, inline: list[Any]) -> Part:
    """One explicit part. The text in it is literal; an image may carry its own file or take the column's next."""
    if not isinstance(part, dict):
        raise row.error(f"{key} is {kind(part)}, not an object with a type", 'write {"type": "text", "text": ...}')
    named = part.get("type")
    if named is None:  # Qwen's first rows
        named = next((name for name in ("image", "video", "text") if is_given(part.get(name))), None)
    if named == "box":
        check_left(row, "part", part, ("type", *PLACE), f"{key}.")
        return given_box(row, part, key)
    if named == "ref" or named in _TEXTS:
        check_left(row, "part", part, ("type", "text"), f"{key}.")
        return (ref_part if named == "ref" else text_part)(row.text(part.get("text"), f"{key}.text"))
    if named in ("video", "video_url"):
        own = any(is_given(part.get(name)) for name in VIDEOS)
        if not own:
            check_left(row, "part", part, ("type",), f"{key}.")
        return video_part(video_entry(row, part, key) if own else None)
    if named not in _IMAGES:
        mend = 'only "text", "image" and "video" are known; correct the row'
        raise row.error(f'{key} has the type "{short(str(named))}"', mend)
    of_column = all(part.get(name) is None for name in _REFERENCES)
    unsaid = ("type", "index") if of_column else ("type",)
    image = image_entry(row, {name: value for name, value in part.items() if name not in unsaid}, key)
    if isinstance(image, dict) and image.get("path") is None and image.get("bytes") is None:
        if size := next((name for name in OPTIONS if name in image), None):
            what = f"{key} has {size} but no picture of its own"
            raise row.error(what, "write the picture into the part, or the size beside it in the row's `images`")
        image = None
        if is_given(part.get("index")) and part["index"] != inline.count(None):
            what = f"{key} shows image {short(str(part['index']))} where {inline.count(None)} comes"
            raise row.error(what, "write the row's images in the order in which they are shown", "marks differ")
    inline.append(image)
    return image_part()


def image_entry(row: RowView, image: object, key: str, names: Sequence[str] = _REFERENCES) -> Any:
    """An entry of a row's images, or the object in a part: path or bytes, with what it says of the size."""
    if not isinstance(image, dict):
        return image
    given = next((name for name in names if image.get(name) is not None), None)
    embedded = given in ("path", "bytes") and image.get("bytes") is not None
    check_left(row, "part", image, (*(("path", "bytes") if embedded else [given]), *OPTIONS), f"{key}.")
    options = {name: image[name] for name in OPTIONS if image.get(name) is not None}
    if embedded and (options or "path" in image):
        return {"path": image.get("path"), "bytes": image["bytes"], **options}
    given = "bytes" if embedded else given
    found = None if given is None else image[given]
    if given == "source" and isinstance(found, dict) and isinstance(found.get("data"), str):
        found = f"data:{found.get('media_type')};base64,{found['data']}"
    if isinstance(found, dict):
        return image_entry(row, {**found, **options}, key)
    if isinstance(found, bytes) and options:
        return {"path": None, "bytes": found, **options}
    return {"path": found, **options} if options or found is None else found
