"""Rows of a file of questions → conversations to answer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from PIL import Image

from ..base.errors import UserError
from ..base.names import Json, Row
from ..batch.box_text import in_units
from ..batch.pictures import check_frames
from ..batch.processor import VLMProcessor
from ..reading.image_refs import Folders, resolve_image
from ..reading.images import load_image
from ..reading.locations import FileRow, read_rows
from ..reading.video import Films
from ..rows.formats import examples_of
from ..rows.messages import split_marks
from ..rows.raw_row import is_given
from ..rows.videos import COLUMNS as VIDEOS
from ..rows.videos import Sampling, frames_of, with_frames

# What is written beside a row's own columns → what a column of that name is called then.
MADE = {
    "answer": "reference",
    "top_answers": "reference_top_answers",
    "picture_caption": "reference_picture_caption",
    "error": "row_error",
}
_KEPT = ("images", "image", "videos", "video", "objects", "bboxes", "bbox")


class QuestionRow(NamedTuple):
    """A row of the input.

    Attributes:
        id: The row's own id, else its number from 1.
        row: The row as it was read.
    """

    id: str | int
    row: FileRow

    def kept(self) -> Row:
        """The row's columns as they are written beside its answer; its own answer (a reference) is renamed."""
        values: Json = {"id": self.id} | self.row.values | {"id": self.id}
        for name, new in MADE.items():
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
    question: QuestionRow,
    images: str | None,
    image_folders: Sequence[str] = (),
    boxes: str | None = None,
    processor: VLMProcessor | None = None,
) -> Row:
    """A row as `{"messages", "images", "id"}`, images decoded.

    Args:
        question: The row.
        images: Folder that relative paths start from; None: that of the row's file.
        image_folders: Further folders in which its images may lie.
        boxes: What the numbers of its boxes count where it does not say it, as a source's `boxes`.
        processor: Says which frames of videos are shown, and whether its model takes them.

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
    resolve = partial(resolve_image, folder=folder, where=where, within=Folders(named))
    messages, refs = with_frames(example, resolve, where, Sampling() if processor is None else processor.video)
    if processor is not None:
        check_frames(processor, refs, where)
    with Films() as films:
        loaded = [load_image(image, where=where, films=films) for image in refs]
    # Boxes in pixels are of the file, and what was loaded may have another size.
    return {"messages": in_units(messages, refs, where), "images": loaded, "id": question.id}


def frames_of_file(path: str, processor: VLMProcessor) -> list[tuple[str, Image.Image]]:
    """The frames of a video file that a model is shown, each with what stands before it.

    Raises:
        UserError: It cannot be read, or the model takes one image only.
    """
    file = {"path": os.path.abspath(os.path.expanduser(path)), "bytes": None}
    named = frames_of({"file": path}, lambda given, **more: file, "", processor.video)
    check_frames(processor, [image for _, image in named], "")
    with Films() as films:
        return [(said, load_image(image, films=films)) for said, image in named]


def _as_messages(values: Json, where: str) -> Row:
    text = values.get("question")
    if not isinstance(text, str | int) or not str(text).strip():
        problem = "is empty" if text is None or isinstance(text, str) else "is not text"
        problem = problem if "question" in values else "is missing, and so are messages"
        raise UserError(f'{where}: "question" {problem}: write a question.')
    content = split_marks(str(text).strip())
    for name, column in (("video", VIDEOS), ("image", ("images", "image"))):
        given = next((values[key] for key in column if is_given(values.get(key))), None)
        count = len(given) if isinstance(given, list) else int(given is not None)
        if not any(part["type"] == name for part in content):
            content = [{"type": name} for _ in range(count)] + content
    return {
        "messages": [{"role": "user", "content": content}],
        **{name: values[name] for name in _KEPT if is_given(values.get(name))},
    }
