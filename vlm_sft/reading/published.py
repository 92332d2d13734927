"""Data sets as their authors publish them, in whole JSON documents → one raw row for each caption or question.

COCO captions, VQAv2, GQA and CC-SBU-align keep images, questions and answers in tables of their own; here they are put
together. What the rows mean is in `formats.FORMATS` under the same names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..base.errors import RowError, UserError, row_error
from ..base.names import Json
from ..base.words import kind, short
from .json_text import parse_document, read_text

Rows = Iterator[tuple[str, Json | RowError]]
_ID = re.compile(r"\{id(?::0?(\d{1,2})d?)?\}")


class Document:
    """One JSON file with checked access to its tables."""

    def __init__(self, path: Path) -> None:
        self.path, self.value = path, parse_document(read_text(path), path)

    def table(self, key: str, of: str) -> list[tuple[str, Json | RowError]]:
        """The objects of a list, each with its place in words, or the error of one that is no object."""
        found = self.value.get(key) if isinstance(self.value, dict) else None
        if not isinstance(found, list):
            there = kind(self.value)
            if isinstance(self.value, dict):
                there = ", ".join(f'"{short(name)}"' for name in list(self.value)[:8]) or "nothing"
            raise UserError(f'{self.path}: there is no list "{key}" (it holds {there}): name the file of {of}.')
        places = ((f"{self.path}, {key} {number}", entry) for number, entry in enumerate(found, start=1))
        return [(where, _checked(where, entry)) for where, entry in places]


def _checked(where: str, entry: object) -> Json | RowError:
    if isinstance(entry, dict):
        return entry
    return row_error(where, f"the entry is {kind(entry)}, not an object", "correct it", "wrong type")


def image_file(pattern: str, number: object, where: str) -> str:
    """The file of an image id: `{id}` in the pattern is the id, `{id:012}` with zeros in front to 12 digits.

    Raises:
        RowError: the id is neither a whole number nor text.
    """
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise row_error(where, f"the image id is {kind(number)}", "write a number or text", "wrong type")
    return _ID.sub(lambda found: str(number).zfill(int(found[1] or 0)), pattern)


def check_pattern(pattern: str, name: str) -> None:
    """Look that a pattern has `{id}` and nothing else in braces.

    Raises:
        UserError: it has not.
    """
    if not _ID.search(pattern) or re.search(r"[{}]", _ID.sub("", pattern)):
        raise UserError(
            f'The source "{name}" has image_name: {pattern}: write {{id}} where the image\'s id stands, or {{id:012}} '
            "for one of 12 digits."
        )


def _coco(document: Document, pattern: str | None, annotations: Sequence[Document]) -> Rows:
    """`captions_train2014.json`: `images` with file names, `annotations` with captions; a row for each caption."""
    of = "COCO captions, such as captions_train2017.json"
    files = {image.get("id"): image.get("file_name") for image in _objects(document.table("images", of)) if _id(image)}
    for where, entry in document.table("annotations", of):
        yield where, _guarded(_coco_row, where, entry, files, pattern)


def _coco_row(where: str, entry: Json, files: dict[Any, Any], pattern: str | None) -> Json:
    number = entry.get("image_id")
    image = image_file(pattern or "{id}", number, where)
    if pattern is None:
        if number not in files:
            what = f'the image_id {short(str(number))} is not among "images"'
            raise row_error(where, what, "correct it or remove the row", "image unknown")
        image = files[number]
    return {**entry, "image": image}


def _vqav2(document: Document, pattern: str | None, annotations: Sequence[Document]) -> Rows:
    """Questions in one file, their ten answers in another (VQAv2, OK-VQA); a row for each question."""
    of = "questions, such as v2_OpenEnded_mscoco_train2014_questions.json"
    questions = document.table("questions", of)
    subset = document.value.get("data_subtype")
    if pattern is None and not isinstance(subset, str):
        raise UserError(
            f'{document.path}: it has no "data_subtype", which names the images: set the source\'s `image_name`, such '
            "as COCO_train2014_{id:012}.jpg."
        )
    answers: dict[Any, Json] = {}
    for other in annotations:
        entries = _objects(other.table("annotations", "annotations, such as v2_mscoco_train2014_annotations.json"))
        answers |= {entry.get("question_id"): entry for entry in entries if _id(entry, "question_id")}
    for where, entry in questions:
        yield where, _guarded(_vqav2_row, where, entry, answers, pattern or f"COCO_{subset}_{{id:012}}.jpg")


def _vqav2_row(where: str, entry: Json, answers: dict[Any, Any], pattern: str) -> Json:
    number = entry.get("question_id")
    answer = answers.get(number) if _id(entry, "question_id") else None
    if answer is None:
        what = f"the question_id {short(str(number))} is not among the annotations"
        raise row_error(where, what, "name the annotations of these questions", "no answer")
    image = image_file(pattern, entry.get("image_id"), where)
    return {"id": number, **answer, **entry, "image": image}


def _gqa(document: Document, pattern: str | None, annotations: Sequence[Document]) -> Rows:
    """`train_balanced_questions.json`: an object of question id to question; a row for each."""
    if not isinstance(document.value, dict):
        what = f"{document.path}: the top level is {kind(document.value)}, not an object of question ids"
        raise UserError(f"{what}: name a file of GQA questions, such as train_balanced_questions.json.")
    for number, entry in document.value.items():
        where = f"{document.path}, question {short(number)}"
        yield where, _guarded(_with_image, where, _checked(where, entry), number, "imageId", pattern or "{id}.jpg")


def _cc_sbu_align(document: Document, pattern: str | None, annotations: Sequence[Document]) -> Rows:
    """MiniGPT-4's `filter_cap.json`: `annotations` with captions, beside a folder `image`; a row for each caption."""
    for where, entry in document.table("annotations", "captions, such as filter_cap.json"):
        yield where, _guarded(_with_image, where, entry, None, "image_id", pattern or "image/{id}.jpg")


def _with_image(where: str, entry: Json, number: str | None, key: str, pattern: str) -> Json:
    """The entry with its id (None: that of its image) and the file of its image."""
    image = entry.get(key)
    return {"id": image if number is None else number, **entry, "image": image_file(pattern, image, where)}


def _guarded(make: Callable[..., Json], where: str, entry: object, *more: Any) -> Json | RowError:
    """A row, or the error that it is."""
    try:
        return entry if isinstance(entry, RowError) else make(where, entry, *more)
    except RowError as error:
        return error


def _objects(entries: list[tuple[str, Json | RowError]]) -> Iterator[Json]:
    return (entry for _, entry in entries if not isinstance(entry, RowError))


def _id(entry: Json, key: str = "id") -> bool:
    return isinstance(entry.get(key), int | str)


PUBLISHED: dict[str, Callable[[Document, str | None, Sequence[Document]], Rows]] = {
    "coco": _coco,
    "vqav2": _vqav2,
    "gqa": _gqa,
    "cc_sbu_align": _cc_sbu_align,
}
"""Format to how its documents become rows."""

ANNOTATED = frozenset(("vqav2",))
"""Of these, the formats whose answers are documents of their own."""


def read_published(
    format_name: str, files: Sequence[Path], image_name: str | None = None, annotations: Sequence[Path] = ()
) -> Iterator[tuple[Path, str, Json | RowError]]:
    """Yield (file, place in words, raw row or its error) of every document of a published data set.

    Args:
        format_name: a key of `PUBLISHED`.
        files: JSON documents.
        image_name: the file of an image with `{id}` in it; None: as the data set is published.
        annotations: of `vqav2`, the documents with the answers.

    Raises:
        UserError: a file is no such document. Raised while iterating.
    """
    answers = [Document(path) for path in annotations]
    for path in files:
        for where, row in PUBLISHED[format_name](Document(path), image_name, answers):
            yield path, where, row
