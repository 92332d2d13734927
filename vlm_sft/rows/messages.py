"""A conversation as a row becomes it: messages of parts, the images they show, and how both are made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..base.errors import UserError
from ..base.names import IMAGE_TOKEN, VIDEO_TOKEN, ImageEntry, Row, Values
from ..base.whole_files import digest
from ..base.words import counted
from ..reading.image_refs import SIZES, TIME, image_key
from .raw_row import RowView

Part = dict[str, Any]
Message = dict[str, Any]

KEPT = ("loss", "reasoning_content", "tools", "answers", "choices")
"""What a message may have beside role and content: `loss` False, for an answer that is not learned; what is thought
before an answer; of the first message, the tools there are; the answers of all annotators, where they differ, of which
the content is the most frequent; and of a question of VCR, what there is to choose from (`vcr.choices`).
Templates decide what is printed of the thoughts and the tools; of answers and choices, encoders learn (`encoder:`)."""
ROW_BEGINS, SHARED = "row_begins", "shared"
"""What the first message of each row has in a merged one (`merging`): the row's id, and True where it is to see the
pictures and itself alone. No message of a file brings them along."""
PLACE = ("box", "scale", "image", "key")
"""What a part of type `box` has beside its type; see `box_part`."""
SAME = "same"
"""What an image of a stored row has in place of its bytes where these are another image's: its number."""
IN_EXTRAS = "extras"
"""The column of a dataset for what some rows say beyond its features, as JSON: see `packed`."""


class Example(NamedTuple):
    """One conversation.

    Attributes:
        messages: ``{"role": str, "content": [{"type": "image"} | {"type": "text", "text": str}]}``, the parts of
            `box_part` and `ref_part`, and of type `video` the place of a video, until `videos.with_frames` puts its
            frames there.
        images: what the row gives for each placeholder: a path, bytes, a data URI or ``{"path", "bytes"}``.
        id: the row's own id, if it has one.
        language: of what is learnt, such as ``zh``: the row's own `language`, else as `words.language_of` says.
        marked: whether every video has a mark, so that one without is an error.
    """

    messages: list[Message]
    images: list[Any]
    id: str | None = None
    language: str = ""
    marked: bool = False


def split_marks(text: str) -> list[Part]:
    """Cut text at every ``<image>`` and ``<video>``; the text between stays as it is, line breaks included."""
    if IMAGE_TOKEN not in text and VIDEO_TOKEN not in text:
        return [text_part(text)] if text else []
    pieces = re.split(f"({IMAGE_TOKEN}|{VIDEO_TOKEN})", text)
    places = {IMAGE_TOKEN: image_part, VIDEO_TOKEN: video_part}
    return [places[piece]() if piece in places else text_part(piece) for piece in pieces if piece]


def answer_message(answer: str) -> Message:
    """What the assistant says."""
    return {"role": "assistant", "content": [text_part(answer)]}


def check_marks(row: RowView, marks: int, images: int) -> None:
    """Look that a row has as many places for images as images; else it is a `RowError`."""
    if marks != images:
        found = f"{counted(marks, 'image mark')} ({IMAGE_TOKEN} in user text, or image parts)"
        raise row.error(
            f"{found} but {counted(images, 'image')}", "give every mark its image, in order", "marks differ"
        )


def text_part(text: str) -> Part:
    """A part of text."""
    return {"type": "text", "text": text}


def image_part() -> Part:
    """The place of an image."""
    return {"type": "image", "text": None}


def box_part(box: Sequence[float], scale: str, image: int, key: str) -> Part:
    """A box [x1, y1, x2, y2] or a point [x, y] on an image, which is written when the size of the picture is known.

    Args:
        box: numbers as the row has them.
        scale: what they count; a key of `box.SCALES`.
        image: number of the image among the row's, from 0.
        key: where in the row it stands, for errors.
    """
    return {"type": "box", "text": None, "box": list(box), "scale": scale, "image": image, "key": key}


def ref_part(text: str) -> Part:
    """The words for what the next boxes show."""
    return {"type": "ref", "text": text}


def has_boxes(messages: Sequence[Message]) -> bool:
    """Whether messages have boxes, or words for them, that are to be written."""
    contents = (message["content"] for message in messages if not isinstance(message["content"], str))
    return any(part["type"] in ("box", "ref") for content in contents for part in content)


def video_part(entry: ImageEntry | None = None) -> Part:
    """The place of a video; None: of the row's next one."""
    return {"type": "video", "text": None, "video": entry}


def spoken(row: Values) -> list[tuple[str, str]]:
    """(role, text) of every message of a row; what stands around an image is joined, a box is its numbers."""
    return [(m["role"], "".join(_said(part) for part in m["content"])) for m in row["messages"]]


def _said(part: Values) -> str:
    return part.get("text") or (str(part["box"]) if part["type"] == "box" and "box" in part else "")


def answers_of(row: Values) -> list[str]:
    """The texts that a row's assistant says."""
    return [text for role, text in spoken(row) if role == "assistant"]


def given_answers(message: Values) -> list[str]:
    """What each annotator answered, or the answer alone."""
    return message.get("answers") or ["".join(part["text"] or "" for part in message["content"])]


def row_key(row: Values) -> bytes:
    """A digest of what a row says and shows: equal for rows that differ in source and id alone."""
    said = repr((spoken(row), [image_key(image) for image in row["images"]]))
    return digest(said.encode("utf-8", "replace"))


def packed(row: Values) -> str | None:
    """What a row's messages and images say beyond the features of a dataset, as the JSON of its column `extras`.

    None for most rows, which say no more; `unpacked` puts it back.
    """
    messages, images = {}, {}
    for i, message in enumerate(row["messages"]):
        parts = enumerate(message["content"])
        boxes = {k: {key: part[key] for key in PLACE} for k, part in parts if part["type"] == "box"}
        more = {key: message[key] for key in (*KEPT, ROW_BEGINS, SHARED) if key in message}
        if more := more | ({"boxes": boxes} if boxes else {}):
            messages[i] = more
    for i, image in enumerate(row["images"]):
        if more := {k: image[k] for k in (*SIZES, TIME, SAME) if k in image}:
            images[i] = more
    return json.dumps({"messages": messages, "images": images}, ensure_ascii=False) if messages or images else None


def each_once(row: Row) -> Row:
    """A row, to be stored, in which the frames of an embedded video have its bytes once; `unpacked` puts them back."""
    firsts: dict[int, int] = {}
    images = list(row["images"])
    for i, image in enumerate(images):
        if TIME in image and image["bytes"] is not None and (first := firsts.setdefault(id(image["bytes"]), i)) != i:
            images[i] = {**image, "path": None, "bytes": None, SAME: first}
    return {**row, "images": images} if firsts else row


def unpacked(row: Values) -> Row:
    """A row of a dataset, or some columns of it, with what its `extras` say at its messages and images."""
    found = {key: value for key, value in row.items() if key != IN_EXTRAS}
    if row.get(IN_EXTRAS) is None:
        return found
    for column, more in json.loads(row[IN_EXTRAS]).items():
        if column in found:
            found[column] = [{**entry, **more.get(str(i), {})} for i, entry in enumerate(found[column])]
    for message in found.get("messages", ()):
        if boxes := message.pop("boxes", None):
            message["content"] = [{**part, **boxes.get(str(i), {})} for i, part in enumerate(message["content"])]
    for image in found.get("images", ()):
        if (first := image.pop(SAME, None)) is not None:
            image |= {name: found["images"][first][name] for name in ("path", "bytes")}
    return found


def normalise_messages(messages: Sequence[Values]) -> list[Message]:
    """Checks a conversation and returns a copy in which every content is a list of parts.

    The rules: an optional system message first; then user and assistant in turn, the user first; content is a string
    or a list of `{"type": "image"}`, `{"type": "text", "text": str}` and the parts of `box_part` and `ref_part`; no
    image stands in a system message; a user message has an image or some text; an answer has text that is more than
    white space, or a box. Parts without text are dropped, and so are keys other than these and `KEPT`. `<image>` typed
    in a text stays text.

    Args:
        messages: Mappings with `role` and `content`.

    Raises:
        UserError: A rule is broken; the message is named by its index.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise UserError(f"messages must be a list of messages with role and content, not {type(messages).__name__}.")
    chat = [_normalise(message, index) for index, message in enumerate(messages)]
    offset = 1 if chat and chat[0]["role"] == "system" else 0
    if len(chat) == offset:
        raise UserError("the conversation has no user message; give it at least one.")
    for index, message in enumerate(chat[offset:], start=offset):
        expected = ("user", "assistant")[(index - offset) % 2]
        if message["role"] != expected:
            raise UserError(
                f'message {index} has role "{message["role"]}" where "{expected}" must come; an optional system '
                f"message comes first, then user and assistant in turn."
            )
    return chat


def _normalise(message: Values, index: int) -> Message:
    if not _is_mapping(message) or "role" not in message or "content" not in message:
        raise UserError(f"message {index} must have the keys role and content.")
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise UserError(f"message {index} has role {role!r}; roles are system, user and assistant.")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) and (_is_mapping(content) or not isinstance(content, Sequence)):
        raise UserError(f"message {index} ({role}): content must be a string or a list of parts, not {content!r}.")
    parts = []
    for number, part in enumerate(content):
        normal = _normalise_part(part, index, role, number)
        if normal["type"] == "image" and role == "system":
            raise UserError(f"message {index} ({role}) holds an image; only the turns after it may, so move it there.")
        if normal["type"] in ("image", "box") or normal["text"]:
            parts.append(normal)
    if role == "assistant" and not any(part["type"] == "box" or part.get("text", "").strip() for part in parts):
        if parts and parts[0]["type"] == "image":
            raise UserError(f"message {index} ({role}) holds an image; an answer has text too, so write some.")
        raise UserError(f"message {index} is an empty answer; drop the turn or give the answer some text.")
    if role == "user" and not parts:
        raise UserError(f"message {index} (user) is empty; give it some text or an image.")
    if len(message) == 2:
        return {"role": role, "content": parts}
    return {"role": role, "content": parts, **{key: message[key] for key in KEPT if message.get(key) is not None}}


def _normalise_part(part: Any, index: int, role: str, number: int) -> Part:
    kind = part.get("type") if _is_mapping(part) else None
    if kind in ("text", "ref") and isinstance(text := part.get("text"), str):
        # A subclass could bring methods into the sandbox.
        text = text if type(text) is str else str.__str__(text)
        written = part.get("written")  # where a box was written into it
        return {"type": kind, "text": text, "written": written} if written else {"type": kind, "text": text}
    if kind == "image":
        return {"type": "image"}
    if kind == "box" and all(key in part for key in PLACE):
        return {"type": "box", "text": None, **{key: part[key] for key in PLACE}}
    where = f"message {index} ({role}), part {number}"
    if kind != "text":
        raise UserError(f'{where} must be {{"type": "image"}} or {{"type": "text", "text": …}}, not {part!r}.')
    raise UserError(f"{where} is of type text but its text is {part.get('text')!r}; give a string.")


def _is_mapping(value: object) -> bool:
    return isinstance(value, (dict, Mapping))  # the first is found ten times faster
