"""What a file is by its first bytes, and the sentence for what is no image."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from vlm_sft.reading.image_kinds import KINDS, describe_unreadable, ending_of, kind_of


@pytest.mark.parametrize("name", sorted({kind.name for kind in KINDS}))
def test_what_pil_writes_is_known_by_its_first_bytes(name):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, name)
    assert kind_of(file.getvalue()).name == name
    assert f".{ending_of(file.getvalue())}" in Image.registered_extensions()


def test_what_is_no_image_has_no_kind_but_an_ending():
    assert kind_of(b"<html>") is None and ending_of(b"<html>") == "png"


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        (b"\xff\xd8\xff\xe0", "starts like a JPEG but is truncated or damaged"),
        (b"\xef\xbb\xbf <!DOCTYPE html>", "looks like HTML: a web page was saved in its place"),
        (b"\0\0\0\x18ftypheic", "looks like HEIC or a video"),
        (b"\0" * 64, "looks like only zero bytes, as after a broken download"),
        ("没有图片".encode(), "looks like text: download the image again"),
        (b"\x01\x02\x03", "is not an image in a format that can be read"),
    ],
)
def test_the_sentence_says_what_it_looks_like(head, sentence):
    assert sentence in describe_unreadable(head)
