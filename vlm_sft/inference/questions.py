"""Rows of a file of questions → conversations to answer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..base.errors import UserError
from ..batch.box_text import in_units
from ..reading.image_refs import Folders, resolve_image
from ..reading.images import load_image
from ..reading.locations import Row, read_rows
from ..rows.formats import examples_of
from ..rows.messages import split_marks

_KEPT = ("images", "image", "objects", "bboxes", "bbox")


class QuestionRow(NamedTuple):
    """A row of the input.

    Attributes:
        id: The row's own id, else its number from 1.
        row: The row as it was read.
    """

    id: str | int
    row: Row

    def kept(self) -> dict[str, Any]:
        """The row's columns as they are written beside its answer; its own answer (a reference) is renamed."""
        values: dict[str, Any] = {
            "id": self.id,
            **{name: value for name, value in self.row.values.items() if name != "id"},
        }
        for name, new in (("answer", "reference"), ("error", "row_error")):
            if name in values:
                while new in values:
                    new = f"_{new}"
                values = {new if key == name else key: value for key, value in values.items()}
        return values


def read_questions(path: str) -> Iterator[QuestionRow]:
    """Rows of the input with their ids.

    Raises:
        UserError: The file cannot be read, or an id is neither text nor a whole number.
    """
    for number, row in enumerate(read_rows(path), start=1):
        own = row.values.get("id")
        if own is not None and (not isinstance(own, str | int) or isinstance(own, bool)):
            raise UserError(f"{row.where}: the id {own!r} is neither text nor a whole number: correct it.")
        yield QuestionRow(number if own is None else own, row)


def conversation(
    question: QuestionRow, images: str | None, image_folders: Sequence[str] = (), boxes: str | None = None
) -> dict[str, Any]:
    """A row as `{"messages", "images", "id"}`, images decoded.

    Args:
        question: The row.
        images: Folder that relative paths start from; None: that of the row's file.
        image_folders: Further folders in which its images may lie.
        boxes: What the numbers of its boxes count where it does not say it, as a source's `boxes`.

    Raises:
        UserError: The row has no question, its marks and images differ in number, or an image cannot be read.
    """
    values, where = question.row.values, question.row.where
    if values.get("messages") is None:
        values = _as_messages(values, where)
    example = next(iter(examples_of(values, "messages", where=where, boxes=boxes)))
    folder = images or question.row.folder
    folder = None if folder is None else os.path.abspath(os.path.expanduser(folder))
    named = [each for each in (folder, question.row.folder, *image_folders) if each is not None]
    refs = [resolve_image(image, folder, where, within=Folders(named)) for image in example.images]
    loaded = [load_image(image, where=where) for image in refs]
    # Boxes in pixels are of the file, and what was loaded may have another size.
    return {"messages": in_units(example.messages, refs, where), "images": loaded, "id": question.id}


def _as_messages(values: dict[str, Any], where: str) -> dict[str, Any]:
    text = values.get("question")
    if not isinstance(text, str | int) or not str(text).strip():
        problem = "is empty" if text is None or isinstance(text, str) else "is not text"
        problem = problem if "question" in values else "is missing, and so are messages"
        raise UserError(f'{where}: "question" {problem}: write a question.')
    content = split_marks(str(text).strip())
    given = values.get("image") if values.get("images") is None else values["images"]
    count = len(given) if isinstance(given, list) else int(given not in (None, ""))
    if not any(part["type"] == "image" for part in content):
        content = [{"type": "image"}] * count + content
    return {
        "messages": [{"role": "user", "content": content}],
        **{name: values[name] for name in _KEPT if values.get(name) not in (None, "")},
    }
