"""One source → its rows ``{"messages", "images", "source", "id"}``, one at a time, as plain Python objects."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from .assets import closest
from .chat_template import normalise_messages
from .errors import RowError, UserError, raise_it
from .formats import COLUMNS, convert
from .image_refs import resolve_image
from .readers import Row, read_rows


class SourceLike(Protocol):
    """What is read of a `recipe.Source`; any object with these attributes will do."""

    path: str
    format: Any
    name: str | None
    images: str | None
    split: str
    revision: str | None
    columns: dict[str, str]
    prompts: list[str]
    weight: float
    max_rows: int | None
    allow_urls: bool


def name_of(source: SourceLike) -> str:
    """The name of a source in ids and messages: its own, else the last part of its path without the suffix."""
    return source.name or Path(source.path).stem


def source_rows(
    source: SourceLike, *, seed: int = 0, reject: Callable[[RowError], None] = raise_it
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one source in the order of its files, each as it is used; nothing is held.

    Args:
        source: where the rows lie and what they mean; a `recipe.Source`. Its `max_rows` counts rows that are yielded.
        seed: draws the prompts of captions. The draw of a row depends on seed, source name and row number only.
        reject: told of every row that is wrong by itself, which is then left out; by default it stops the run.

    Raises:
        UserError: the source is not what the recipe says. Raised while iterating.
    """
    _check(source, name_of(source))
    return islice(_rows(source, seed, reject), source.max_rows)


def _check(source: SourceLike, name: str) -> None:
    if source.format not in COLUMNS:
        raise UserError(
            f'The source "{name}" has the format "{source.format}": it must be one of {", ".join(COLUMNS)}.'
        )
    known = COLUMNS[source.format]
    for ours in source.columns:
        if ours not in known:
            hint = f'; did you mean "{near}"' if (near := closest(ours, known)) else ""
            raise UserError(
                f'The source "{name}" maps the column "{ours}", which the format {source.format} does not have{hint}: '
                f"it has {', '.join(known)}."
            )
    if source.prompts and source.format != "caption":
        raise UserError(f'The source "{name}" has prompts, but only the format caption takes them: remove them.')
    if source.images is not None and not os.path.isdir(os.path.expanduser(source.images)):
        raise UserError(f'The source "{name}" takes its images from {source.images}, which is no folder: correct it.')


def _rows(source: SourceLike, seed: int, reject: Callable[[RowError], None]) -> Iterator[dict[str, Any]]:
    images_folder = None if source.images is None else os.path.abspath(os.path.expanduser(source.images))
    unseen = set(source.columns.values())
    rows = read_rows(source.path, split=source.split, revision=source.revision, keep_wrong=True)
    for number, row in enumerate(rows, start=1):
        unseen -= row.values.keys()
        folder = images_folder or (None if row.folder is None else os.path.abspath(row.folder))
        try:
            # All of a row before any of it: one wrong caption of five rejects the row, not a part of it.
            yield from list(_examples(source, row, number, folder, seed))
        except RowError as error:
            reject(error)
    if unseen:
        raise UserError(
            f'No row of {source.path} has the column "{min(unseen)}" that `columns` maps: correct the name.'
        )


def _examples(source: SourceLike, row: Row, number: int, folder: str | None, seed: int) -> Iterator[dict[str, Any]]:
    """The conversations of one row, each as a row of the contract."""
    if row.problem is not None:
        raise row.problem
    name = name_of(source)
    draw = partial(random.Random(f"{seed}/{name}/{number}").choice, source.prompts) if source.prompts else str
    examples = list(convert(row.values, source.format, where=row.where, columns=source.columns, draw_prompt=draw))
    for k, example in enumerate(examples, start=1):
        yield {
            "messages": _checked(example.messages, row.where),
            "images": [resolve_image(image, folder, row.where, source.allow_urls) for image in example.images],
            "source": name,
            "id": f"{name}/{example.id or number}" + (f"#{k}" if len(examples) > 1 else ""),
        }


def _checked(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    try:
        messages = normalise_messages(messages)
    except UserError as error:
        raise RowError(f"{where}: {error}", where=where, reason="messages wrong") from None
    if not any(message["role"] == "assistant" for message in messages):
        sentence = f"{where}: there is no answer to learn from: add an assistant's message or remove the row."
        raise RowError(sentence, where=where, reason="no answer")
    return messages
