"""A picture is known by its bytes: the same file under another name is, a file that was written anew is not."""

from __future__ import annotations

import os
import shutil

import pytest
from PIL import Image

from vlm_sft.cache.keys import Keys, key_of_pixels
from vlm_sft.reading.image_refs import TIME


@pytest.fixture
def old(tmp_path):
    """A picture that was written some time ago."""
    path = tmp_path / "猫.png"
    Image.new("RGB", (4, 3), "red").save(path)
    return path


@pytest.fixture
def settled(monkeypatch):
    """Every file is old enough to be known by its times."""
    monkeypatch.setattr("vlm_sft.cache.keys.SETTLED", -1)


def test_the_same_bytes_have_one_key_wherever_they_lie(tmp_path, old):
    keys = Keys(tmp_path / "cache")
    copy = shutil.copy(old, tmp_path / "copy.png")
    key, _ = keys.of({"path": str(old), "bytes": None})
    assert key == keys.of({"path": str(copy)})[0] == keys.of({"path": None, "bytes": old.read_bytes()})[0]
    assert key != keys.of({"path": str(old), "resized_height": 2, "resized_width": 2})[0]
    other = tmp_path / "other.png"
    Image.new("RGB", (4, 3), "blue").save(other)
    assert key != keys.of({"path": str(other)})[0]


def test_a_file_that_is_known_is_not_read_again_and_one_that_changed_is(tmp_path, old, settled, monkeypatch):
    keys = Keys(tmp_path / "cache")
    key, new = keys.of({"path": str(old)})
    keys.note([new, new])
    later = Keys(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("vlm_sft.cache.keys.open_regular", lambda path: pytest.fail("it was read"))
        assert later.of({"path": str(old)}) == (key, None)
    content, times = old.read_bytes(), os.stat(old)
    old.write_bytes(content[:-1] + b"!")
    os.utime(old, ns=(times.st_atime_ns, times.st_mtime_ns))  # as large, and as old as before
    assert later.of({"path": str(old)})[0] != key


def test_a_file_of_this_moment_is_not_taken_for_settled(tmp_path, old):
    assert Keys(tmp_path / "cache").of({"path": str(old)})[1] is None


def test_what_cannot_be_read_or_is_a_frame_has_no_key(tmp_path, old):
    keys = Keys(tmp_path / "cache")
    for image in ({"path": str(tmp_path / "no.png")}, {"path": "https://x.org/a.png"}, {"path": str(tmp_path)}, {},
                  {"path": str(old), TIME: 1.0}):  # fmt: skip
        assert keys.of(image) == (None, None)
    fetched = Keys(tmp_path / "cache", fetch=lambda url: str(old))
    assert fetched.of({"path": "https://x.org/a.png"})[0] == keys.of({"path": str(old)})[0]


def test_pixels_tell_pictures_apart():
    a, b = (Image.new("RGB", size, "red") for size in ((2, 3), (3, 2)))
    assert key_of_pixels(a) != key_of_pixels(b) and key_of_pixels(a) == key_of_pixels(a.copy())
