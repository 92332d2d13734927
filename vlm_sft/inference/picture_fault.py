"""A model that fails on a picture: which one it is, found by asking the same with another picture in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from PIL import Image

from ..base.errors import UserError
from ..base.names import Row, Values
from ..batch.pictures import BLANK, PictureError, name_of, picture_size, refused
from ..rows.messages import unpacked
from .settings import refusal


def place_of(row: Row, number: int, rows: int) -> str:
    """A conversation in words: `row a/1`; "" for one alone that has no id."""
    return f"row {row.get('id', number)}" if rows > 1 or "id" in row else ""


@contextmanager
def pictures_named(
    conversations: Sequence[Row],
    begin: Callable[..., object],
    options: Values | None = None,
) -> Iterator[None]:
    """Makes what a model raises the error of the picture that it fails on, where there is one.

    A mistake of the program fails on a blank picture too, and is raised as it is; so is a GPU that is full.

    Args:
        conversations: What is asked within, each `{"messages", "images"}`.
        begin: Asks one of them and raises what the model raises.
        options: Settings that were asked for; `begin` takes them too.

    Raises:
        PictureError: The model takes blank pictures in a conversation, and fails with one of its own among them.
        UserError: It takes the conversation, and fails with the settings that were asked for alone.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        for number, row in enumerate(map(unpacked, conversations)):
            if found := _at_fault(row, place_of(row, number, len(conversations)), begin):
                raise found from error
        first = unpacked(conversations[0])
        if options and _begins(begin, first) and not _begins(partial(begin, **options), first):
            raise refusal(error) from error
        raise


def _begins(begin: Callable[[Row], object], row: Row) -> bool:
    """Whether the model takes a conversation, asked in the plainest way."""
    try:
        begin(row)
    except Exception:
        return False
    return True


def _at_fault(row: Row, where: str, begin: Callable[[Row], object]) -> PictureError | None:
    def failure(images: Sequence[object]) -> Exception | None:
        try:
            begin({**row, "images": images})
        except Exception as error:
            return error
        return None

    blank: list[Any] = [Image.new("RGB", BLANK)] * len(row["images"])
    if not blank or failure(blank):
        return None
    for number, image in enumerate(row["images"]):
        if error := failure([*blank[:number], image, *blank[number + 1 :]]):
            return refused(where, name_of(image), picture_size(image), "the model", error)
    return None
