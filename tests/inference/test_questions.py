"""Rows of a file of questions as conversations; whole files are answered in test_answer_file.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from support.conversations import make_processor
from support.films import animation, film, frame_of
from vlm_sft.base.errors import UserError
from vlm_sft.inference.questions import QuestionRow, conversation, read_questions
from vlm_sft.reading.locations import FileRow
from vlm_sft.rows.videos import Sampling


def ask(values: dict, folder=None) -> QuestionRow:
    return QuestionRow(values.get("id", 1), FileRow("q.jsonl, line 1", folder, values))


def parts(question: QuestionRow, images: str | None = None) -> list[str]:
    """The parts of the last message: texts, and None for images."""
    return [part.get("text") for part in conversation(question, images)["messages"][-1]["content"]]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"question": "这是什么？"}, ["这是什么？"]),
        ({"question": " what? ", "image": 0}, [None, "what?"]),
        ({"question": "what?", "images": [0, 1], "image": None}, [None, None, "what?"]),
        ({"question": "is <image> like <image>?", "images": [0, 1]}, ["is ", None, " like ", None, "?"]),
        ({"question": 3, "image": ""}, ["3"]),
        ({"messages": [{"role": "user", "content": "什么颜色？"}], "image": 0}, [None, "什么颜色？"]),
    ],
)
def test_images_stand_where_they_are_marked_else_in_front(values, wanted, photos):
    for key in ("image", "images"):
        if isinstance(values.get(key), int):
            values = {**values, key: photos[values[key]]}
        elif isinstance(values.get(key), list):
            values = {**values, key: [photos[number] for number in values[key]]}
    folder = str(Path(photos[0]).parent)
    assert parts(ask(values), folder) == wanted
    images = conversation(ask(values), folder)["images"]
    assert len(images) == wanted.count(None) and all(image.mode == "RGB" for image in images)


def test_the_rows_own_answer_and_error_keep_their_values_under_other_names():
    kept = ask({"answer": "猫", "reference": 1, "error": None, "id": "a"}).kept()
    assert kept == {"id": "a", "_reference": "猫", "reference": 1, "row_error": None} and next(iter(kept)) == "id"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, 'line 1: "question" is missing, and so are messages: write a question'),
        ({"question": " "}, '"question" is empty'),
        ({"question": ["a"]}, '"question" is not text'),
        ({"question": "<image>"}, "1 image mark .* but 0 images"),
        ({"question": "a", "image": "https://x.org/a.png"}, "is a URL and no URL is fetched"),
        ({"question": "a", "image": 3}, "neither a path nor bytes"),
    ],
)
def test_bad_rows_are_named(values, says):
    with pytest.raises(UserError, match=says):
        conversation(ask(values), None)


def test_rows_without_an_id_have_their_number(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "a"}\n{"id": "b", "question": "b"}\n{"id": null, "question": "c"}\n')
    assert [question.id for question in read_questions(str(path))] == [1, "b", 3]


def test_questions_carry_boxes_of_the_file_whatever_size_is_asked_for(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    image = {"path": "a.png", "resized_width": 20, "resized_height": 40}
    values = {"images": [image], "objects": {"ref": ["猫"], "bbox": [[20, 10, 120, 60]]}}
    for asked in (
        {"question": "Is <bbox> <ref-object>?"},
        {"messages": [{"role": "user", "content": "<image>Is <bbox> <ref-object>?"}]},
    ):
        row = conversation(ask({**values, **asked}, tmp_path), None)
        _, box, space, ref, _ = (part for part in row["messages"][0]["content"] if part["type"] != "image")
        assert (box["box"], box["scale"], ref["text"], space["text"]) == ([0.1, 0.1, 0.6, 0.6], "unit", "猫", " ")
        assert row["images"][0].size == (20, 40)


def test_boxes_typed_in_a_question_are_read_where_the_command_says_what_they_count(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    typed = {"image": "a.png", "question": "What is [20, 10, 120, 60]?"}
    assert conversation(ask(typed, tmp_path), None, boxes="pixels")["messages"][0]["content"][2]["box"][0] == 0.1
    assert conversation(ask(typed, tmp_path), None)["messages"][0]["content"][1]["text"] == typed["question"]
    with pytest.raises(UserError, match="outside of its picture of 200 x 100 pixels"):
        conversation(ask({**typed, "question": "<bbox>", "bbox": [1, 2, 201, 5]}, tmp_path), None, boxes="pixels")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"video": "a.mp4", "question": "谁？"}, "0|3.9|谁？"),
        ({"videos": ["a.mp4"], "question": "谁在<video>里？"}, "谁在|0|3.9|里？"),
        ({"video": "a.mp4", "image": "b.gif", "question": "?"}, "|0|3.9|?"),
        ({"video": "a.mp4", "messages": [{"role": "user", "content": "谁？"}]}, "0|3.9|谁？"),
    ],
)
def test_videos_are_shown_as_the_bundle_says(tmp_path, values, text):
    film(tmp_path / "a.mp4")
    animation(tmp_path / "b.gif", frames=2)
    processor = make_processor("vicuna_v1")
    processor.video = Sampling(frames=2, time="{time}")
    found = conversation(ask(values, tmp_path), None, processor=processor)
    said = "|".join(part["text"] for part in found["messages"][-1]["content"] if part.get("text"))
    assert said == text.replace("0|", "0.0|").lstrip("|")
    assert [frame_of(image) for image in found["images"]][-2:] == [0, 39]
    assert len(found["images"]) == sum(part["type"] == "image" for part in found["messages"][-1]["content"])
    processor.one_image = True
    with pytest.raises(UserError, match="images, and this model was made for one"):
        conversation(ask(values, tmp_path), None, processor=processor)
    assert len(conversation(ask({**values}, tmp_path), None)["images"]) >= 8  # without a bundle: as ever
