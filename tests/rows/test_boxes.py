"""Boxes of rows: which keys and texts they are read from, what their numbers count, and what is refused by name."""

from __future__ import annotations

import json
from itertools import islice

import pytest

from support.source_files import write
from vlm_sft.base.errors import RowError
from vlm_sft.data.dataset import load_source
from vlm_sft.data.streaming import stream_mixture
from vlm_sft.recipe.sections import Source
from vlm_sft.rows.boxes import has_typed_boxes
from vlm_sft.rows.formats import examples_of
from vlm_sft.rows.messages import answers_of, box_part, normalise_messages, packed, row_key, unpacked

WHERE = "f.jsonl, line 3"


def row(answer: str, question: str = "<image>在哪？", images: int = 1, **keys) -> dict:
    marks = "<image>" * (images - question.count("<image>")) + question
    turns = [{"role": "user", "content": marks}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": [f"{i}.png" for i in range(images)], **keys}


def answer_of(values: dict, boxes: str | None = None, format_name: str = "messages") -> list[dict]:
    """The parts of a row's last message."""
    (example,) = examples_of(values, format_name, where=WHERE, boxes=boxes)
    return example.messages[-1]["content"]


def numbers(values: dict, boxes: str | None = None) -> list[tuple]:
    return [(p["box"], p["scale"], p["image"]) for p in answer_of(values, boxes) if p["type"] == "box"]


def refused(values: dict, boxes: str | None = None) -> str:
    with pytest.raises(RowError) as error:
        answer_of(values, boxes)
    assert str(error.value).startswith(f"{WHERE}: ") and str(error.value).endswith(".")
    return str(error.value)


def test_objects_of_ms_swift_fill_their_marks():
    objects = {"ref": ["a dog", "一只猫"], "bbox": [[1, 2, 3.5, 4], [5, 6, 7, 8]], "bbox_type": "real", "image_id": [1]}
    parts = answer_of(row("<ref-object><bbox>和<ref-object><bbox>。", images=2, objects=objects))
    assert [part["text"] for part in parts] == ["a dog", None, "和", "一只猫", None, "。"]
    assert [part["type"] for part in parts] == ["ref", "box", "text", "ref", "box", "text"]
    assert [(p["box"], p["scale"], p["image"]) for p in parts if "box" in p] == [
        ([1, 2, 3.5, 4], "pixels", 1),
        ([5, 6, 7, 8], "pixels", 0),
    ]


@pytest.mark.parametrize(
    ("objects", "found"),
    [
        ({"bbox": [[0.1, 0.2, 0.5, 0.6]], "bbox_type": "norm1"}, ([0.1, 0.2, 0.5, 0.6], "unit", 0)),
        ({"bbox": [[1, 2, 5, 600]], "bbox_type": "norm1000"}, ([1, 2, 5, 600], "thousand", 0)),
        ({"bbox": [1, 2, 5, 6]}, ([1, 2, 5, 6], "pixels", 0)),
        ({"bbox": [[15, 26]], "ref": [], "image_id": None}, ([15, 26], "pixels", 0)),
        ({"bbox": [[1, 2, 5, 6]], "image_id": 1}, ([1, 2, 5, 6], "pixels", 1)),
        ('{"bbox": [[1, 2, 5, 6]]}', ([1, 2, 5, 6], "pixels", 0)),
        ([{"bbox": [1, 2, 5, 6], "bbox_type": "real", "image": 1}], ([1, 2, 5, 6], "pixels", 1)),
    ],
)
def test_objects_say_what_their_numbers_count(objects, found):
    assert numbers(row("<bbox>", images=2, objects=objects)) == [found]


def test_the_row_goes_before_the_source():
    given = {"bbox": [[0.1, 0.2, 0.5, 0.6]], "bbox_type": "norm1"}
    assert numbers(row("<bbox>", objects=given), "pixels") == [([0.1, 0.2, 0.5, 0.6], "unit", 0)]
    assert numbers(row("<bbox>", objects={"bbox": [[1, 2, 5, 6]]}), "thousand") == [([1, 2, 5, 6], "thousand", 0)]


@pytest.mark.parametrize("format_name", ["vqa", "caption", "llava", "cauldron"])
def test_every_format_has_boxes(format_name):
    turns = (("human", "<image>"), ("gpt", "<bbox>"))
    rows = {
        "vqa": {"image": "a", "question": "Where?", "answer": "<bbox>"},
        "caption": {"image": "a", "caption": "<bbox>"},
        "llava": {"image": "a", "conversations": [{"from": role, "value": v} for role, v in turns]},
        "cauldron": {"images": ["a"], "texts": [{"user": "where?", "assistant": "<bbox>"}]},
    }  # fmt: skip
    (part,) = answer_of({**rows[format_name], "bbox": [1, 2, 5, 6]}, "pixels", format_name)
    assert part == box_part([1, 2, 5, 6], "pixels", 0, "bbox")
    assert answer_of({**rows[format_name], "objects": {"bbox": [[1, 2, 5, 6]]}}, None, format_name)[0]["box"][0] == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<|box_start|>(1,2),(3,4)<|box_end|>", [[1, 2, 3, 4]]),
        ("<|box_start|> (1, 2), (3, 4) <|box_end|><|box_start|>(5,6)<|box_end|>", [[1, 2, 3, 4], [5, 6]]),
        ("<ref>猫</ref><box>(1,2),(3,4)</box>", [[1, 2, 3, 4]]),
        ("<box>[1, 2, 3, 4]</box><|box_start|>[5,6,7,8]<|box_end|>", [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ("[.5, 1., 3e0, 4] but [1, 2, 3] and [1, 2, 3, 4, 5] and [a, 2, 3, 4]", [[0.5, 1.0, 3.0, 4]]),
        ("<ref>a</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>", [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"point_2d": [5, 6]}]', [[1, 2, 3, 4], [5, 6]]),
        ("猫[1.0,2,3,4.5;5,6,7,8] and [9, 10, 11, 12]", [[1.0, 2, 3, 4.5], [5, 6, 7, 8], [9, 10, 11, 12]]),
    ],
)
def test_boxes_typed_in_text_are_read_where_the_source_says_what_they_count(text, found):
    for scale in ("pixels", "thousand"):
        assert numbers(row(text), scale) == [(box, scale, 0) for box in found]
    for scale in (None, "as_written"):
        assert answer_of(row(text), scale) == [{"type": "text", "text": text}]


def test_location_tokens_say_themselves_what_they_count():
    (found,) = numbers(row("<loc0256><loc0128><loc0512><loc1023> cat"), "pixels")
    assert found == ([128 / 1024, 0.25, 1023 / 1024, 0.5], "unit", 0)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("<loc0256><loc0128><loc0512><loc1023> 猫", True), ("<box>(1,2),(3,4)</box>", True),
        ('{"bbox_2d": [1, 2, 3, 4]}', True), ("<|box_start|>", True), ("[1, 2, 3, 4]", False), ("<loc0001>", False),
    ],
)  # fmt: skip
def test_typed_boxes_are_known_where_they_can_be_nothing_else(text, boxes):
    assert has_typed_boxes(text) is boxes


@pytest.mark.parametrize(
    ("values", "boxes", "sentence"),
    [
        (row("<bbox>", objects={"bbox": [[5, 2, 5, 6]]}), None, '"objects.bbox[0]" is [5, 2, 5, 6], which has no w'),
        (row("<bbox>", objects={"bbox": [[5, 8, 9, 6]]}), None, "(x2 <= x1 or y2 <= y1)"),
        (row("<bbox>", objects={"bbox": [[-3, 2, 5, 6]]}), None, '"objects.bbox[0]" is [-3, 2, 5, 6], outside'),
        (row("<bbox>", objects={"bbox": [[1, 2, 5, 6]], "bbox_type": "norm1"}), None, "(unit: 0 to 1)"),
        (row("<bbox>", objects={"bbox": [[1, 2, 5, 1006]]}), "thousand", "(thousand: 0 to 1000)"),
        (row("<bbox>", objects={"bbox": [[1, 2, 5, 6]], "bbox_type": "xywh"}), None, '"objects.bbox_type" is "xywh"'),
        (row("<bbox>", objects={"bbox": [[0.1, 0.2, 0.5, 0.6]]}), None, 'no number of "objects.bbox" is above 1'),
        (row("<bbox>", objects={"bbox": [[1, 2, 5, 6, 7, 8]]}), None, "has 6 numbers, as a polygon has: write the box"),
        (row("<bbox>", objects={"bbox": [[]]}), None, "has 0 numbers: write [x1, y1, x2, y2]"),
        (row("<bbox>", objects={"bbox": [[1, 2, 5]]}), None, "has 3 numbers: write [x1, y1, x2, y2]"),
        (row("<bbox>", objects={"bbox": [[1, 2, "5", 6]]}), None, "write numbers"),
        (row("<bbox>", objects={"bbox": [[1, 2, float("nan"), 6]]}), None, "write numbers"),
        (row("<bbox>", objects={"bbox": [[True, 2, 5, 6]]}), None, "write numbers"),
        (row("<bbox>", objects={"bbox": "1 2 3 4"}), None, '"objects.bbox" is no list of boxes'),
        (row("<bbox>", objects={"bbox": [[1, 2, 5, 6]], "image_id": [1]}), None, "a box on image 1 (from 0), and"),
        (row("<bbox>", objects={"bbox": [[1, 2, 5, 6]], "image_id": ["0"]}), None, "count the images from 0"),
        (row("<bbox>", images=0, question="?", objects={"bbox": [[1, 2, 5, 6]]}), None, "the row has none"),
        (row("<bbox>和<bbox>", objects={"bbox": [[1, 2, 5, 6]]}), None, "have <bbox> 2 times, but the row has 1 boxes"),
        (row("here", objects={"bbox": [[1, 2, 5, 6]]}), None, "have <bbox> 0 times, but the row has 1 boxes"),
        (row("<ref-object><bbox>", objects={"bbox": [[1, 2, 5, 6]]}), None, "but the row has 0 words for them (ref)"),
        (row("<bbox>", objects="{"), None, '"objects" is text and no JSON'),
        (row("<bbox>", objects=7), None, '"objects" is a number'),
        (row("<bbox>"), None, "the messages have <bbox> or <ref-object>, but the row has no boxes"),
        (row("<bbox>", bbox=[1, 2, 5, 6]), None, 'nothing says what the numbers of "bbox" count: set the'),
        (row("<bbox>", bbox=[1, 2, 5, 6]), "as_written", 'nothing says what the numbers of "bbox" count'),
        (row("<bbox>", images=2, bbox=[1, 2, 5, 6]), "pixels", "the row has 2 images, and nothing says which"),
        (row("[1, 2, 5, 6]", images=2), "pixels", '"messages[1], box 1 of its text" is a box, the row has 2 images'),
        (row("a [5, 2, 1, 6] b"), "pixels", '"messages[1], box 1 of its text" is [5, 2, 1, 6], which has no width'),
        (row("<box>(1,2,3</box>"), "pixels", 'messages[1] has "<box>" and no box that is known there'),
        (row("<|quad_start|>(1,2),(3,4),(5,6),(7,8)<|quad_end|>"), "pixels", 'has "<|quad_start|>" and no box'),
    ],
)  # fmt: skip
def test_what_cannot_be_a_box_is_refused_by_row_key_and_mend(values, boxes, sentence):
    assert sentence in refused(values, boxes)


def test_a_column_that_no_text_speaks_of_is_counted():
    counted: set[str] = set()
    values = row("a cat", bbox=[1, 2, 3, 4], objects={"bbox": [], "area": 7})
    list(examples_of(values, "messages", where=WHERE, unused=counted.update))
    assert counted >= {"bbox"}


def test_numbers_in_a_row_without_pictures_are_text():
    values = row("[5, 2, 1, 6]", images=0, question="list?")
    assert answer_of(values, "pixels") == [{"type": "text", "text": "[5, 2, 1, 6]"}]


def test_marks_in_a_row_without_pictures_are_text():
    assert answer_of(row("write <bbox>", images=0, question="ms-swift?")) == [{"type": "text", "text": "write <bbox>"}]


def test_boxes_travel_through_the_dataset_and_a_stream(tmp_path):
    rows = [
        row("a"),
        row("<bbox>。", question="<image><ref-object>?", objects={"ref": ["猫"], "bbox": [[1, 2, 5, 6.5]]}),
    ]
    source = Source(path=str(write(tmp_path / "r.jsonl", "\n".join(map(json.dumps, rows)))), format="messages")
    stream = stream_mixture([source], seed=0, buffer=1, shards=1)  # without an end
    for found in (list(load_source(source)), list(islice(stream, 2))):
        back = unpacked(found[1])
        assert back["messages"][1]["content"][0] == box_part([1, 2, 5, 6.5], "pixels", 0, "objects.bbox[0]")
        assert back["messages"][0]["content"][1] == {"type": "ref", "text": "猫"}
        assert answers_of(back) == ["[1, 2, 5, 6.5]。"] and found[0]["extras"] is None
        moved = json.loads(json.dumps(back))
        moved["messages"][1]["content"][0]["box"][0] = 2
        assert row_key(moved) != row_key(back)


def test_an_explicit_part_is_read_back_as_it_is():
    parts = [{"type": "ref", "text": "猫"}, box_part([0.1, 0.2, 0.3, 0.4], "unit", 0, "messages[1].content[1].box")]
    values = row("x")
    values["messages"][1]["content"] = parts
    assert answer_of(values) == parts
    for wrong in ({"scale": "metres"}, {"box": 7}, {"image": "0"}, {"image": 3}, {"box": [3, 2, 1, 4]}):
        values["messages"][1]["content"] = [{**parts[1], **wrong}]
        assert "messages[1].content[0]" in refused(values)


def test_a_conversation_of_a_box_alone_is_an_answer():
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": [box_part([1, 2], "pixels", 0, "k")]},
    ]
    assert normalise_messages(messages)[1]["content"] == [box_part([1, 2], "pixels", 0, "k")]
    assert packed({"messages": normalise_messages(messages), "images": []})
