"""What the rows of a file mean, by the names of their columns and what stands in them."""

from __future__ import annotations

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.start.guess import guess, published_kind


@pytest.mark.parametrize(
    ("row", "form", "columns"),
    [
        ({"image": "a.png", "caption": "a cat"}, "caption", {}),
        ({"图片": "a.png", "描述": "一只猫"}, "caption", {"image": "图片", "caption": "描述"}),
        ({"Image Path": "a.png", "what I see": "a cat on a mat", "id": 3}, "caption",
         {"image": "Image Path", "caption": "what I see"}),
        ({"filename": "a", "title": "a cat"}, "caption", {"image": "filename", "caption": "title"}),
        ({"image": {"bytes": b"\x89PNG", "path": None}, "text": "a cat"}, "caption", {}),
        ({"photo": "a.jpg", "问题": "几只？", "答案": "两只"}, "vqa",
         {"image": "photo", "question": "问题", "answer": "答案"}),
        ({"image": "a.png", "question": "how many?", "answers": ["2", "2"]}, "vqa", {}),
        ({"image": "a.png", "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]},
         "llava", {}),
        ({"images": ["a.png"], "messages": [{"role": "user", "content": "<image>?"},
                                            {"role": "assistant", "content": "a"}]}, "messages", {}),
        ({"query": "hello", "response": "hi"}, "messages", {}),
        ({"images": ["a.png"], "texts": [{"user": "?", "assistant": "a"}]}, "cauldron", {}),
    ],
)  # fmt: skip
def test_rows_are_known_by_names_and_contents(row, form, columns):
    found = guess([row] * 3)
    assert (found.format, dict(found.columns), found.labels) == (form, columns, False)


def test_short_texts_that_come_again_are_classes():
    rows = [{"image": f"{n}.png", "label": ("cat", "dog")[n % 2]} for n in range(12)]
    found = guess(rows)
    assert (found.format, dict(found.columns), found.labels) == ("caption", {"caption": "label"}, True)
    assert not guess([{**row, "label": f"the {row['image']} of a cat"} for row in rows]).labels


@pytest.mark.parametrize(
    "rows", [[], [{"name": "tool", "version": 3}], [{"image": "a.png"}], [{"image": "a.png", "x": "1", "y": "2"}]]
)
def test_what_means_nothing_is_not_guessed(rows):
    assert guess(rows) is None


def test_published_documents():
    assert published_kind({"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}) == "coco"
    assert published_kind({"annotations": [{"image_id": 1, "caption": "a"}]}) == "cc_sbu_align"
    assert published_kind({"questions": [{"question_id": 1, "image_id": 1, "question": "?"}]}) == "vqav2"
    assert published_kind({"annotations": [{"question_id": 1, "answers": []}]}) == "answers"
    assert published_kind({"7": {"question": "?", "imageId": "1", "answer": "a"}}) == "gqa"
    assert published_kind([{"image": "a"}]) is None
    with pytest.raises(UserError, match="boxes and masks of COCO"):
        published_kind({"images": [], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]})
