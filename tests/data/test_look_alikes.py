"""Rows whose images look like held-out ones: which are named, which are not, and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from support.pictures import COPIES, photo, write
from vlm_sft.data import looks as module
from vlm_sft.data.dataset import ROW_FEATURES
from vlm_sft.data.look_alikes import LookAlikes, find_look_alikes


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of one's own."""
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def rows_of(source: str, *images) -> list[dict]:
    """A row for each image, which is a path or bytes."""
    return [
        {"messages": [], "source": source, "id": f"{source}/{n}", "images": [
            {"path": None, "bytes": image} if isinstance(image, bytes) else {"path": image, "bytes": None}
        ]}
        for n, image in enumerate(images, start=1)
    ]  # fmt: skip


def pairs_of(found: LookAlikes) -> list[tuple[str, str]]:
    return [(pair.train.row, pair.held_out.row) for pair in found.pairs]


@pytest.fixture
def originals(tmp_path):
    """Twelve photos with Chinese names."""
    return [write(photo(n), tmp_path / "训练" / f"照片 {n}.png") for n in range(12)]


def test_a_copy_is_named_with_file_row_and_likeness(tmp_path, originals):
    copy = write(COPIES["all of it"](photo(3)), tmp_path / "评测" / "副本.jpg")
    other = write(photo(99), tmp_path / "评测" / "别的.png")
    found = find_look_alikes(rows_of("训练", *originals), rows_of("评测", other, copy), shown=5)
    (pair,) = found.pairs
    assert str(pair).startswith(f"训练/4 ({originals[3]}) ≈ 评测/2 ({copy}): 0.9") and str(pair).endswith(" mirrored")
    assert found.between() == [("训练", "评测", 1)] and found.held_out_found == 1 and found.left_out() == []
    ((ours, theirs),) = found.pictures
    assert (ours["path"], theirs["path"]) == (originals[3], copy)
    assert json.loads(json.dumps(found.as_dict()))["pairs"][0]["train"]["path"] == originals[3]


def test_the_same_bytes_are_no_look_alikes(tmp_path, originals):
    """`shared_images` names them."""
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(originals[1]).read_bytes())
    embedded = Path(originals[2]).read_bytes()
    held_out = rows_of("e", originals[0], str(copy), embedded)
    assert find_look_alikes(rows_of("t", *originals), held_out).pairs == []
    assert find_look_alikes(rows_of("t", embedded), rows_of("e", embedded, originals[2])).pairs == []


def test_embedded_images_of_datasets_and_several_sources(tmp_path, originals):
    embedded = Path(write(COPIES["half the size"](photo(1)), tmp_path / "a.png")).read_bytes()
    train = Dataset.from_list([*rows_of("a", *originals), *rows_of("b", embedded)], features=ROW_FEATURES)
    held_out = [
        *rows_of("x", write(COPIES["darker"](photo(1)), tmp_path / "x.png")),
        *rows_of("y", write(COPIES["JPEG of quality 40"](photo(5)), tmp_path / "y.png")),
    ]
    found = find_look_alikes(train, held_out)
    assert sorted(pairs_of(found)) == [("a/2", "x/1"), ("a/6", "y/1"), ("b/1", "x/1")]
    assert sorted(found.between()) == [("a", "x", 1), ("a", "y", 1), ("b", "x", 1)] and found.held_out_found == 2
    assert found.repeated == 1 and next(p for p in found.pairs if p.train.row == "b/1").train.path is None


def test_what_is_not_compared_is_said(tmp_path, originals):
    (tmp_path / "坏.jpg").write_bytes(b"\xff\xd8\xff 123")
    blank = write(photo(1).resize((1, 1)).resize((60, 60)), tmp_path / "white.png")
    train = rows_of("t", *originals, str(tmp_path / "坏.jpg"), blank, "https://example.org/a.png")
    frame = {"path": "film.mp4", "bytes": None}
    held_out = [*rows_of("e", blank), {**rows_of("e", originals[0])[0], "images": [frame],
                                       "extras": json.dumps({"images": {"0": {"time": 1.5}}})}]  # fmt: skip
    found = find_look_alikes(train, held_out)
    assert (found.train.of, found.train.looked_at, found.train.urls, found.train.flat) == (14, 14, 1, 1)
    assert (found.held_out.of, found.held_out.flat) == (1, 1), "a frame of a video is not looked at"
    said = found.left_out()
    assert said[2].startswith("Not compared by look: 1 training image that cannot be read; the first: row t/13: the ")
    assert said[:2] + said[3:] == [
        "Not compared by look: 1 training image given by URL, which is not fetched.",
        "Not compared by look: 1 training image blank or almost so.",
        "Not compared by look: 1 held-out image blank or almost so.",
    ]


def test_a_sample_is_drawn_by_the_seed_and_said(tmp_path, originals):
    held_out = rows_of("e", *(write(COPIES["darker"](photo(n)), tmp_path / f"{n}.png") for n in range(3)))
    train = rows_of("t", *originals)
    found = [pairs_of(find_look_alikes(train, held_out, most=6, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1] and len({tuple(each) for each in found}) > 1
    sample = find_look_alikes(train, held_out, most=6)
    assert (sample.train.looked_at, sample.train.of, sample.held_out.looked_at) == (6, 12, 3)
    assert sample.left_out()[0] == (
        "Of 12 training images 6, drawn at random, were compared by look; data.look_images: null compares all."
    )
    assert len(find_look_alikes(train, held_out, most=12).pairs) == 3


def test_an_image_in_several_rows_is_one(tmp_path, originals):
    held_out = rows_of("e", write(COPIES["darker"](photo(0)), tmp_path / "e.png"))
    train = [*rows_of("t", *originals), *rows_of("again", *originals)]
    found = find_look_alikes(train, held_out)
    assert found.train.of == 12 and pairs_of(found) == [("t/1", "e/1")] and found.repeated == 0


def test_nothing_held_out_and_no_images():
    found = find_look_alikes([], [])
    assert found.pairs == [] and found.left_out() == [] and found.as_dict()["looked_at"] == {"train": 0, "held_out": 0}
    assert find_look_alikes([{"images": [], "id": "t", "source": "t", "messages": []}], []).train.of == 0
