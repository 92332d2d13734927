"""Messages of parts, and as many places as images."""

from __future__ import annotations

import pytest

from vlm_sft.base.errors import RowError
from vlm_sft.data.messages import answer_of, check_marks, image_part, split_marks, text_part
from vlm_sft.reading.raw_row import RowView


def test_text_is_cut_at_every_mark():
    assert split_marks("a<image>\nb<image>") == [text_part("a"), image_part(), text_part("\nb"), image_part()]
    assert split_marks("") == []
    assert answer_of("<image>")["content"] == [text_part("<image>")]


def test_marks_and_images_are_counted():
    row = RowView({}, "f.json, row 1", {})
    check_marks(row, 2, 2)
    with pytest.raises(RowError, match=r"f.json, row 1: 1 image mark .* but 2 images: give every mark") as raised:
        check_marks(row, 1, 2)
    assert raised.value.reason == "marks differ"
