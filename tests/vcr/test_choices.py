"""Rows of VCR: what they ask, in words and in numbers of things, and where their boxes are."""

from __future__ import annotations

import json

import pytest

from support.shrink import vcr_row
from vlm_sft.base.errors import RowError, row_error
from vlm_sft.rows.formats import examples_of
from vlm_sft.vcr.choices import boxes_beside, choices_of, in_words

ROW = vcr_row(0, "0.png", "une visiteuse 是客人")


def ways(row, tasks=("q2a", "qa2r")):
    return list(choices_of(row, tasks, lambda what, mend: row_error("row 1", what, mend, "wrong type")))


def test_a_row_asks_for_an_answer_and_for_a_reason():
    answers, reasons = ways(ROW)
    assert answers["before"] == [["What", "is", [0], "?"]] and answers["right"] == 3
    assert reasons["before"] == [["What", "is", [0], "?"], ["une visiteuse 是客人"]]
    assert answers["names"] == ["Casey", "dog"] and answers["said"][1:3] == ["dog and Casey", "No, Casey and dog."]
    assert answers["boxes"] == [[0, 0, 0.5, 0.5], [0.25, 1 / 3, 39 / 40, 29 / 30]]


def test_a_source_has_both_or_one_of_them():
    both = list(examples_of(ROW, "vcr", where="row 1"))
    assert [example.messages[0]["choices"]["task"] for example in both] == ["q2a", "qa2r"]
    assert all(example.id == "val-0" and example.images == ["0.png"] for example in both)
    text = both[1].messages[0]["content"][-1]["text"]
    assert text.startswith("What is Casey?\nune visiteuse 是客人\nA. a cat\n") and text.endswith(
        "D. Casey is une visiteuse 是客人"
    )
    (alone,) = examples_of(ROW, "vcr_qa2r", where="row 1")
    assert alone.messages == both[1].messages


def test_keys_that_say_where_a_row_comes_from_are_no_surprise():
    unused = []
    row = {**ROW, "metadata_fn": "0.json", "answer_orig": "x", "match_fold": "val-0", "interesting_scores": [-1, 0]}
    list(examples_of(row, "vcr", where="row 1", unused=unused.append))
    assert unused == [set()]


def test_more_persons_than_names_begin_again():
    (asked,) = ways({**ROW, "objects": ["person"] * 17, "boxes": None}, ("q2a",))
    assert asked["names"][15] == "Casey" and len(set(asked["names"])) == 15


def test_odd_characters_of_the_words_are_left_out():
    assert in_words(["It", "'s", "\ue000red", "!"], []) == "It's red!"


@pytest.mark.parametrize(("changes", "says"), [
    ({"question": "Why?"}, '"question" is text'), ({"question": ["Why", [2]]}, r"question\[1\].*none of the 2 objects"),
    ({"question": []}, '"question" is empty'),
    ({"objects": None}, '"objects" is missing'),
    ({"objects": [{"name": "dog"}]}, "no text"), ({"answer_choices": [["a"]]}, "1 entries, not four"),
    ({"answer_label": None}, "answer_label.*0 to 3"), ({"answer_label": 4}, "0 to 3"),
    ({"answer_label": True}, "0 to 3"), ({"rationale_choices": None}, '"rationale_choices" is missing'),
    ({"question": [[]]}, "no word"),
    ({"boxes": [[0, 0, 1]]}, "0 boxes of four numbers for 2 objects"), ({"width": None}, "no number"),
    ({"boxes": [[0, 0, 1, 1]] * 2, "height": 0}, "not above 0"),
    ({"boxes": [[0, 0, 1, float("nan")]] * 2}, "no number"),
])  # fmt: skip
def test_what_is_wrong_with_a_row_is_one_sentence(changes, says):
    with pytest.raises(RowError, match=says) as raised:
        ways({**ROW, **changes})
    assert "\n" not in str(raised.value) and str(raised.value).startswith("row 1: ")


def test_boxes_lie_beside_the_picture(tmp_path):
    (asked, _) = ways({**ROW, "boxes": None})
    held = {"boxes": ROW["boxes"], "width": 40, "height": 30, "names": ["person", "dog"], "segms": []}
    (tmp_path / "1@0.json").write_text(json.dumps(held))
    assert boxes_beside(str(tmp_path / "1@0.jpg"), asked, "row 1") == ways(ROW)[0]["boxes"]


@pytest.mark.parametrize(("text", "says"), [
    (None, "cannot be read"), ("[", "cannot be read"), ("[]", "no number"),
    ('{"boxes": [], "width": 4, "height": 3}', "0 boxes"),
    ('{"boxes": "all", "width": 4, "height": 3}', "0 boxes"),
])  # fmt: skip
def test_boxes_that_are_not_there_are_one_sentence(tmp_path, text, says):
    (asked, _) = ways({**ROW, "boxes": None})
    if text is not None:
        (tmp_path / "1.json").write_text(text)
    with pytest.raises(RowError, match=says) as raised:
        boxes_beside(str(tmp_path / "1.jpg"), asked, "row 1")
    assert "\n" not in str(raised.value)
    with pytest.raises(RowError, match="its picture is no file"):
        boxes_beside(None, asked, "row 1")
