"""Images that look alike, as preflight finds them among rows and shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from support.conversations import make_row, turn
from support.pictures import COPIES, photo, write
from vlm_sft.data.dataset import ROW_FEATURES
from vlm_sft.preflight.pairs import compare_looks, show_pairs


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of one's own."""
    monkeypatch.setattr("vlm_sft.data.looks.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def rows_of(source: str, *paths: str) -> Dataset:
    rows = [make_row(turn("图？", "图", images=1), [path], n) for n, path in enumerate(paths)]
    rows = [{**row, "source": source, "id": f"{source}/{n}"} for n, row in enumerate(rows)]
    return Dataset.from_list(rows, features=ROW_FEATURES)


def test_pairs_are_found_between_all_sets_and_shown(tmp_path):
    train = rows_of("训练", *(write(photo(n), tmp_path / f"照片{n}.png") for n in range(4)))
    copies = [write(COPIES["mirrored"](photo(n)), tmp_path / f"副本{n}.png") for n in (2, 3, 9)]
    found = compare_looks(train, [rows_of("e", copies[0]), rows_of("f", *copies[1:])], None, 0)
    assert sorted((pair.train.row, pair.held_out.row, pair.mirrored) for pair in found.pairs) == [
        ("训练/2", "e/0", True), ("训练/3", "f/0", True),
    ]  # fmt: skip
    Path(copies[1]).unlink()
    shown = {each.pair.train.row: each for each in show_pairs(found)}
    assert shown["训练/2"].train.data_uri.startswith("data:image/jpeg;base64,")
    assert max(shown["训练/2"].held_out.width, shown["训练/2"].held_out.height) == 144
    assert shown["训练/3"].train is not None and shown["训练/3"].held_out is None


def test_rows_of_a_stream_are_a_list(tmp_path):
    train = list(rows_of("t", write(photo(1), tmp_path / "a.png")))
    held_out = [rows_of("e", write(COPIES["darker"](photo(1)), tmp_path / "b.png"))]
    assert [pair.train.row for pair in compare_looks(train, held_out, 5, 0).pairs] == ["t/0"]


def test_nothing_is_compared_where_nothing_is_held_out_or_asked(tmp_path):
    rows = rows_of("t", write(photo(1), tmp_path / "a.png"))
    assert compare_looks(rows, [], None, 0) is None and compare_looks(rows, [rows], 0, 0) is None
    assert show_pairs(None) == []
