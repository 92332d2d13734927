"""A raw row with checked access, and how its errors read."""

from __future__ import annotations

import pickle

import pytest

from vlm_sft.base.errors import RowError
from vlm_sft.rows.raw_row import RowView


def view(values: dict, **columns: str) -> RowView:
    return RowView(values, "f.jsonl, line 3", columns)


def test_columns_are_renamed_before_anything_is_asked():
    row = view({"zh": "猫", "caption": "cat"}, caption="zh")
    assert row.need("caption") == "猫"
    assert row.get("zh") is not None
    assert view({"caption": "cat"}, caption="zh").get("caption") is None, "the mapped column alone counts"


def test_an_error_says_row_key_mend_and_reason():
    with pytest.raises(RowError) as raised:
        view({"captoin": "x"}).need("caption", "text")
    error = raised.value
    assert str(error) == (
        'f.jsonl, line 3: the key "caption" is missing (the row has "captoin"): '
        "map it with `columns: {caption: captoin}` (a command's --column caption=captoin) or rename it."
    )
    assert (error.where, error.reason) == ("f.jsonl, line 3", "key missing")
    again = pickle.loads(pickle.dumps(error))  # it crosses from a worker process
    assert (str(again), again.where, again.reason) == (str(error), error.where, error.reason)


def test_text_and_images():
    row = view({"images": ["a", None]})
    assert row.text(3, "answer") == "3"
    with pytest.raises(RowError, match='the text "answer" is true or false: write text'):
        row.text(True, "answer")
    with pytest.raises(RowError, match="half a character") as raised:
        row.text("\ud83d", "answer")
    assert raised.value.reason == "not text"
    with pytest.raises(RowError, match='"images" has an empty entry'):
        row.images("images")
    assert view({"image": ""}).images("image", "images") == []
    assert view({"image": b"x"}).images("image", "images") == [b"x"]
