"""Messages of parts, as many places as images, and the rules that hold for every conversation."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings

from support.conversations import conversations
from support.template_texts import CHINESE, ENGLISH, IMAGE, assistant, text, user
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.rows.messages import (
    answer_message,
    answers_of,
    check_marks,
    image_part,
    normalise_messages,
    row_key,
    split_marks,
    spoken,
    text_part,
)
from vlm_sft.rows.raw_row import RowView


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


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "the conversation has no user message; give it at least one."),
        ([{"role": "system", "content": "x"}], "the conversation has no user message; give it at least one."),
        ("hello", "messages must be a list of messages with role and content, not str."),
        ([{"role": "user"}], "message 0 must have the keys role and content."),
        ([{"role": "human", "content": "hi"}], "message 0 has role 'human'; roles are system, user and assistant."),
        ([assistant("hi")], 'message 0 has role "assistant" where "user" must come;'),
        ([user("a"), user("b")], 'message 1 has role "user" where "assistant" must come;'),
        ([user("a"), {"role": "system", "content": "x"}], 'message 1 has role "system" where "assistant" must come;'),
        ([user("a"), assistant(" \n")], "message 1 is an empty answer; drop the turn or give the answer some text."),
        ([user("a"), {"role": "assistant", "content": []}], "message 1 is an empty answer;"),
        ([user("")], "message 0 (user) is empty; give it some text or an image."),
        ([user("a"), {"role": "assistant", "content": [IMAGE]}], "message 1 (assistant) holds an image;"),
        ([{"role": "system", "content": [IMAGE]}, user("a")], "message 0 (system) holds an image;"),
        ([{"role": "user", "content": None}], "message 0 (user): content must be a string or a list of parts,"),
        ([{"role": "user", "content": [{"type": "video"}]}], "message 0 (user), part 0 must be"),
        ([{"role": "user", "content": ["hi"]}], "message 0 (user), part 0 must be"),
        ([{"role": "user", "content": [IMAGE, {"type": "text", "text": None}]}], "part 1 is of type text but its text"),
    ],
)
def test_a_broken_rule_names_the_message(messages, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        normalise_messages(messages)
    assert expected in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(conversations())
def test_normalising_keeps_what_was_said(messages):
    once = normalise_messages(messages)
    assert normalise_messages(once) == once
    for message, before in zip(once, messages, strict=True):
        kept = [part for part in before["content"] if part["type"] == "image" or part["text"]]
        assert message == {"role": before["role"], "content": kept}


@pytest.mark.parametrize("messages", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_the_callers_messages_are_left_alone(messages):
    before = json.dumps(messages)
    normalise_messages(messages)[0]["content"].clear()
    assert json.dumps(messages) == before


def test_rows_as_arrow_returns_them_are_understood():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "hi"}]
    assert normalise_messages([{"role": "user", "content": parts}])[0]["content"] == [IMAGE, text("hi")]
