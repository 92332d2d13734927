"""The size in which a row wants a picture: read, checked, and the size that a picture is then brought to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm_sft.base.errors import RowError
from vlm_sft.reading.image_options import size_asked, sizes_of
from vlm_sft.reading.image_refs import resolve_image
from vlm_sft.reading.images import image_size, load_image


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({"path": "a"}, {}),
        ({"max_pixels": 9.0, "min_pixels": None}, {"max_pixels": 9}),
        ({"detail": "low"}, {"max_pixels": 262144}),
        ({"detail": "low", "max_pixels": 100}, {"max_pixels": 100}),
        ({"detail": "auto"}, {}),
        ({"resized_height": 28}, {"resized_height": 28}),
    ],
)
def test_sizes_that_are_asked_for(entry, found):
    assert sizes_of(entry, "行 1") == found
    assert resolve_image({**entry, "path": "/猫.png"}, "/", "行 1") == {"path": "/猫.png", "bytes": None, **found}
    assert resolve_image({**entry, "bytes": b"x"}, None, "行 1") == {"path": entry.get("path"), "bytes": b"x", **found}


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"max_pixels": 0}, "行 1: max_pixels of an image is 0: write a whole number of pixels from 1 on."),
        ({"min_pixels": "9"}, "min_pixels of an image is 9"),
        ({"resized_width": True}, "resized_width of an image is True"),
        ({"resized_height": float("nan")}, "resized_height of an image is nan"),
        ({"max_pixels": 1, "min_pixels": 2}, "min_pixels above its max_pixels"),
        ({"detail": "ultra"}, 'detail of an image is "ultra": it must be one of auto, high, original, low.'),
    ],
)
def test_sizes_that_cannot_be(entry, sentence):
    with pytest.raises(RowError) as error:
        sizes_of(entry, "行 1")
    assert sentence in str(error.value)


SIDE = st.integers(1, 5000)


@given(SIDE, SIDE, st.integers(1, 10**6), st.integers(1, 10**6))
def test_bounds_hold_and_shapes_are_kept(width, height, one, other):
    least, most = sorted((one, other))
    asked = size_asked((width, height), {"min_pixels": least, "max_pixels": most})
    assert min(asked) >= 1
    assert asked[0] * asked[1] <= most or width * height < least
    if least <= width * height <= most:
        assert asked == (width, height)
    assert (asked[0] >= asked[1]) == (width >= height) or abs(asked[0] - asked[1]) <= 1


def test_a_size_that_is_named_goes_before_the_bounds():
    assert size_asked((100, 50), {"resized_width": 30, "resized_height": 40, "max_pixels": 9}) == (30, 40)
    assert size_asked((100, 50), {"resized_width": 30}) == (30, 15)
    assert size_asked((100, 50), {"resized_height": 30}) == (60, 30)
    assert size_asked((3, 1), {"resized_width": 1}) == (1, 1)


@pytest.mark.parametrize(
    "more", [{"max_pixels": 800}, {"min_pixels": 20_000}, {"resized_width": 30, "resized_height": 7}]
)
def test_pictures_come_in_that_size_and_are_measured_so(tmp_path, more):
    path = tmp_path / "图.png"
    Image.new("RGB", (100, 50), (9, 99, 200)).save(path)
    entry = {"path": str(path), "bytes": None, **more}
    loaded = load_image(entry)
    assert loaded.size == image_size(entry) == size_asked((100, 50), more) != (100, 50)
    assert loaded.getpixel((0, 0)) == (9, 99, 200)


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    entry = {"path": str(tmp_path / "a.png"), "bytes": None, "resized_width": 10**6, "resized_height": 10**6}
    with pytest.raises(
        RowError, match=r"row 7: an image of 100 x 50 pixels is to become 1,000,000 x 1,000,000"
    ) as error:
        load_image(entry, where="row 7")
    assert error.value.reason == "image too large"
