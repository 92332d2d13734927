"""Messages of parts, and as many places as images."""

from __future__ import annotations

import pytest

from vlm_sft.base.errors import RowError
from vlm_sft.data.messages import (
    answer_message,
    answers_of,
    check_marks,
    image_part,
    row_key,
    split_marks,
    spoken,
    text_part,
)
from vlm_sft.reading.raw_row import RowView


def test_text_is_cut_at_every_mark():
    assert split_marks("a<image>\nb<image>") == [text_part("a"), image_part(), text_part("\nb"), image_part()]
    assert split_marks("") == []
    assert answer_message("<image>")["content"] == [text_part("<image>")]


def test_marks_and_images_are_counted():
    row = RowView({}, "f.json, row 1", {})
    check_marks(row, 2, 2)
    with pytest.raises(RowError, match=r"f.json, row 1: 1 image mark .* but 2 images: give every mark") as raised:
        check_marks(row, 1, 2)
    assert raised.value.reason == "marks differ"


def test_rows_are_alike_in_what_they_say_and_show():
    row = {"id": "a/1", "source": "a", "images": [{"path": "猫.png", "bytes": None}, {"path": None, "bytes": b"png"}],
           "messages": [{"role": "user", "content": [image_part(), text_part("这是"), text_part("什么？")]},
                        answer_message("一只猫")]}  # fmt: skip
    assert spoken(row) == [("user", "这是什么？"), ("assistant", "一只猫")] and answers_of(row) == ["一只猫"]
    assert row_key(row) == row_key({**row, "id": "b/2", "source": "b"})
    others = [{**row, "images": row["images"][::-1]}, {**row, "messages": row["messages"][:1]}]
    assert len({row_key(each) for each in (row, *others)}) == 3
