"""A conversation as a row becomes it: messages of parts, the images they show, and how both are made."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..reading.raw_row import RowView

IMAGE_MARK = "<image>"

Part = dict[str, Any]
Message = dict[str, Any]


class Example(NamedTuple):
    """One conversation.

    Attributes:
        messages: ``{"role": str, "content": [{"type": "image"} | {"type": "text", "text": str}]}``.
        images: what the row gives for each placeholder: a path, bytes, a data URI or ``{"path", "bytes"}``.
        id: the row's own id, if it has one.
        language: of what is learnt, such as ``zh``: the row's own `language`, else as `languages.language_of` says.
    """

    messages: list[Message]
    images: list[Any]
    id: str | None = None
    language: str = ""


def split_marks(text: str) -> list[Part]:
    """Cut text at every ``<image>``; the text between stays as it is, line breaks included."""
    if IMAGE_MARK not in text:
        return [text_part(text)] if text else []
    first, *rest = text.split(IMAGE_MARK)
    parts = [text_part(first)] + [part for piece in rest for part in (image_part(), text_part(piece))]
    return [part for part in parts if part["text"] != ""]


def answer_of(answer: str) -> Message:
    """What the assistant says."""
    return {"role": "assistant", "content": [text_part(answer)]}


def check_marks(row: RowView, marks: int, images: int) -> None:
    """Look that a row has as many places for images as images; else it is a `RowError`."""
    if marks != images:
        found = f"{_plural(marks, 'image mark')} ({IMAGE_MARK} in user text, or image parts)"
        raise row.error(
            f"{found} but {_plural(images, 'image')}", "give every mark its image, in order", "marks differ"
        )


def text_part(text: str) -> Part:
    """A part of text."""
    return {"type": "text", "text": text}


def image_part() -> Part:
    """The place of an image."""
    return {"type": "image", "text": None}


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
