"""What a picture looks like is seen once: a second start reads it, and looks only at what is new or changed."""

from __future__ import annotations

import os
import sqlite3

import datasets
import numpy as np
import pytest
from PIL import Image

from support.pictures import photo, write
from vlm_sft.data import looks as module
from vlm_sft.data.looks import BYTES, SIDE, LookCache, look_of, read_looks, stamp_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of one's own."""
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vlm_sft" / "looks.sqlite"


@pytest.fixture
def opened(monkeypatch):
    """The rows whose images were opened."""
    rows: list[str] = []

    def load(image, **how):
        rows.append(how["where"])
        return loader(image, **how)

    loader = module.load_image
    monkeypatch.setattr(module, "load_image", load)
    return rows


def entries(*paths):
    return [({"path": path, "bytes": None}, f"照片/{n}") for n, path in enumerate(paths)]


def seen(*paths):
    return read_looks(entries(*paths), len(paths))


def test_a_look_is_grey_levels_and_colours():
    look = look_of(Image.new("RGB", (7, 900), (255, 0, 0)))
    assert look.shape == (BYTES,) and look.dtype == np.uint8
    assert set(look[: SIDE * SIDE].tolist()) == {76} and set(look[SIDE * SIDE :].tolist()) <= {84, 85, 255}


def test_a_second_start_looks_at_new_and_changed_files_alone(tmp_path, opened):
    paths = [write(photo(n), tmp_path / f"图 {n}.png") for n in range(3)]
    first = seen(*paths)
    assert len(opened) == 3 and first.readable.all()
    opened.clear()
    paths.append(write(photo(3), tmp_path / "新.png"))
    write(photo(9), tmp_path / "图 1.png")
    os.utime(paths[1], ns=(1, 1))
    second = seen(*paths)
    assert sorted(opened) == ["row 照片/1", "row 照片/3"]
    assert (second.looks[0] == first.looks[0]).all() and (second.looks[1] != first.looks[1]).any()
    assert (second.looks[1] == look_of(photo(9))).all()


def test_embedded_pictures_are_kept_by_their_bytes(tmp_path, opened):
    data = (tmp_path / "a.png", write(photo(1), tmp_path / "a.png"))[0].read_bytes()
    embedded = [({"path": None, "bytes": data}, "a"), ({"path": "x.png", "bytes": data}, "b")]
    found = read_looks(embedded, 2)
    assert found.stamps[0] == found.stamps[1] and (found.looks[0] == look_of(photo(1))).all()
    opened.clear()
    read_looks(embedded, 2)
    assert opened == []


def test_unreadable_pictures_are_told_and_the_others_seen(tmp_path):
    (tmp_path / "坏.jpg").write_bytes(b"\xff\xd8\xff 123")
    good = write(photo(1), tmp_path / "a.png")
    for _ in range(2):
        found = seen(str(tmp_path / "坏.jpg"), good, str(tmp_path / "none.png"), str(tmp_path))
        assert found.readable.tolist() == [False, True, False, False] and not found.looks[0].any()
        assert "row 照片/0" in found.problems[0] and "坏.jpg" in found.problems[0] and len(found.problems) == 3


def test_without_caching_nothing_is_kept(tmp_path, cache, opened):
    path = write(photo(1), tmp_path / "a.png")
    datasets.disable_caching()
    try:
        seen(path), seen(path)
    finally:
        datasets.enable_caching()
    assert len(opened) == 2 and not cache.exists()


@pytest.mark.parametrize("what", ["damaged", "a folder", "of another version"])
def test_a_cache_that_cannot_be_used_is_done_without_or_made_anew(what, tmp_path, cache, opened):
    path = write(photo(1), tmp_path / "a.png")
    cache.parent.mkdir(parents=True)
    if what == "damaged":
        cache.write_bytes(b"no database" * 1000)
    elif what == "a folder":
        cache.mkdir()
    else:
        with sqlite3.connect(cache) as old:
            old.execute("CREATE TABLE looks (stamp BLOB PRIMARY KEY, look BLOB)")
            stamp = stamp_of({"path": path, "bytes": None})
            old.execute("INSERT INTO looks VALUES (?, ?)", [stamp, bytes(BYTES)])
            old.execute("PRAGMA user_version = 999")
    assert (seen(path).looks[0] == look_of(photo(1))).all() and len(opened) == 1


def test_the_oldest_looks_go(monkeypatch):
    monkeypatch.setattr(module, "MOST_KEPT", 3)
    kept = LookCache.open()
    kept.put({bytes([n] * 16): bytes(BYTES) for n in range(5)})
    kept.close()
    left = LookCache.open().get([bytes([n] * 16) for n in range(5)])
    assert sorted(stamp[0] for stamp in left) == [2, 3, 4]


def test_many_are_told_of_in_between(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    paths = [write(photo(n, (40, 40)), tmp_path / f"{n}.png") for n in range(5)]
    told = []
    found = read_looks(entries(*paths), 5, lambda done, of: told.append((done, of)))
    assert told == [(2, 5), (4, 5), (5, 5)] and len(found.stamps) == 5
