"""A model that fails on a picture: which picture of which row, and never a mistake of the program under its name."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from vlm_sft.base.errors import UserError
from vlm_sft.batch.pictures import PictureError
from vlm_sft.inference.picture_fault import pictures_named

RED, BLUE, LONG = (Image.new("RGB", size, c) for size, c in (((40, 30), "red"), ((9, 9), "blue"), ((900, 2), "red")))


def no_red(row: dict) -> None:
    if any(image.getpixel((0, 0)) == (255, 0, 0) for image in row["images"]):
        raise RuntimeError("shape mismatch\nin the table of positions")


def rows(*images: list) -> list[dict]:
    return [{"id": f"行/{number}", "messages": [], "images": each} for number, each in enumerate(images)]


def fail(error: BaseException, conversations: list[dict], begin=no_red) -> BaseException:
    kind = type(error) if begin is not no_red else BaseException
    with pytest.raises(kind) as caught, pictures_named(conversations, begin):
        raise error
    return caught.value


def test_the_picture_is_found_by_asking_the_same_with_another_one():
    error = fail(RuntimeError("x"), rows([BLUE], [], [BLUE, LONG]))
    assert isinstance(error, PictureError) and isinstance(error.__cause__, RuntimeError)
    assert str(error) == (
        "row 行/2: an image of 900 x 2 pixels is refused by the model (shape mismatch in the table of positions): give "
        "it another shape or format, or remove the row."
    )
    alone = fail(RuntimeError("x"), [{"messages": [], "images": [RED]}])
    assert str(alone).startswith("an image of 40 x 30 pixels is refused by the model ")


def test_a_mistake_of_the_program_stays_one():
    mistake = KeyError("weights")

    def always(row: dict) -> None:
        raise mistake

    assert fail(mistake, rows([RED], [BLUE]), always) is mistake
    assert fail(mistake, rows([BLUE], [])) is mistake, "no picture fails by itself"


@pytest.mark.parametrize("error", [UserError("too long"), torch.OutOfMemoryError(), KeyboardInterrupt()])
def test_what_is_no_failure_is_passed_on_at_once(error):
    def never(row: dict) -> None:
        pytest.fail("asked again")

    assert fail(error, rows([RED]), never) is error


def test_settings_that_fail_where_none_do_not_are_at_fault():
    mistake = IndexError("list index out of range")

    def begin(row: dict, top_k: int = 0) -> None:
        if top_k:
            raise mistake

    sentence = "the model cannot answer with these settings of `generation`: list index out"
    with pytest.raises(UserError, match=sentence), pictures_named(rows([BLUE]), begin, {"top_k": 3}):
        raise mistake
    for options in ({}, {"top_k": 0}):
        with pytest.raises(IndexError), pictures_named(rows([BLUE]), begin, options):
            raise mistake
