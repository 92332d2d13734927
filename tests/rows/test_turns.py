"""One message in the ways that people write it: who speaks, what is said, what is learned, which picture it shows."""

from __future__ import annotations

import json

import pytest

from vlm_sft.base.errors import RowError
from vlm_sft.rows.formats import examples_of
from vlm_sft.rows.raw_row import RowView
from vlm_sft.rows.turns import SWITCHES, raw_turns, read_turn, tools_in

WHERE = "f.jsonl, line 3"


def view(values: dict) -> RowView:
    return RowView(values, WHERE, {})


def refused(message: dict) -> str:
    with pytest.raises(RowError) as error:
        read_turn(view({}), message, "messages[1]")
    assert str(error.value).startswith(f"{WHERE}: ") and "messages[1]" in str(error.value)
    return str(error.value)


def answer(**keys) -> dict:
    return {"role": "assistant", "content": "是", **keys}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("off", [False, 0, 0.0])
def test_a_switch_takes_an_answer_out_of_the_loss_or_leaves_it_in(name, off):
    said = {
        on: read_turn(view({}), answer(**{name: value}), "messages[1]").more for on, value in ((False, off), (True, 1))
    }
    learned, out = (True, False) if SWITCHES[name] else (False, True)
    assert said[learned] == {} and said[out] == {"loss": False}
    assert read_turn(view({}), answer(**{name: None}), "messages[1]").more == {}


def test_switches_that_cannot_be_meant():
    assert "messages[1].weight is 0.5, which is not a switch: write true, false, 1 or 0" in refused(answer(weight=0.5))
    assert "messages[1].loss is no, which is not a switch" in refused(answer(loss="no"))
    assert "messages[1] has loss and mask, which do not agree: keep one of them" in refused(
        answer(loss=True, mask=True)
    )
    asked = {"role": "user", "content": "问", "train": True}
    assert "messages[1].train asks for the user's text to be learned: only answers are" in refused(asked)
    assert read_turn(view({}), {**asked, "train": False}, "messages[1]").more == {}


def test_thoughts_are_of_answers_and_text():
    assert read_turn(view({}), answer(reasoning_content="想"), "m").more == {"reasoning_content": "想"}
    assert "reasoning_content is not of an assistant" in refused(
        {"role": "user", "content": "a", "reasoning_content": "b"}
    )
    assert 'the text "messages[1].reasoning_content" is a list' in refused(answer(reasoning_content=["a"]))


@pytest.mark.parametrize("tools", [[{"name": "zoom"}], '[{"name": "zoom"}]'])
def test_tools_are_a_list_or_its_json(tools):
    assert tools_in(view({}), tools, '"tools"') == [{"name": "zoom"}]
    (example,) = examples_of({"prompt": "q", "completion": "a", "tools": tools}, "messages", where=WHERE)
    assert example.messages[0]["tools"] == [{"name": "zoom"}] and "tools" not in example.messages[1]
    for wrong in ("zoom", {"name": "zoom"}, ["zoom"]):
        with pytest.raises(RowError, match="write the list of tools"):
            tools_in(view({}), wrong, '"tools"')


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"query": "q", "response": "a", "history": [["早", "好"]]}, ["早", "好", "q", "a"]),
        ({"instruction": "i", "input": "猫", "output": "a"}, ["i\n猫", "a"]),
        ({"instruction": "i", "input": "", "output": "a"}, ["i", "a"]),
        ({"prompt": "p", "query": "q", "response": "a"}, ["q", "a"]),  # the pair that is whole
        ({"conversation": [{"human": "q", "assistant": "答"}]}, ["q", "答"]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["q", "a"]),
        ({"messages": [{"from": "USER", "value": "q"}, {"from": "model", "value": "a"}]}, ["q", "a"]),
    ],
)
def test_turns_are_found_under_the_names_that_formats_give_them(row, said):
    turns = raw_turns(view(row))
    assert [turn.content for turn in turns] == said
    assert [turn.role for turn in turns] == ["user", "assistant"] * (len(said) // 2)


def test_history_is_of_pairs_and_not_beside_a_list_of_turns():
    for wrong in ("早", [["a"]], [{"a": 1}]):
        with pytest.raises(RowError, match='"history" is no list of pairs'):
            raw_turns(view({"query": "q", "response": "a", "history": wrong}))
    with pytest.raises(RowError, match='"history" beside a list of its turns: write all turns into the list'):
        raw_turns(view({"messages": [], "history": [["a", "b"]]}))


def shown(row: dict, format_name: str = "messages") -> list:
    (example,) = examples_of(row, format_name, where=WHERE)
    return example.images


def part(**keys) -> dict:
    return {"messages": [{"role": "user", "content": [{"type": "image", **keys}]}, answer()]}


def test_a_picture_in_the_ways_that_parts_have_it():
    url = {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}
    assert shown({"messages": [{"role": "user", "content": [url]}, answer()]}) == [{"path": "a.png", "detail": "low"}]
    assert shown(part(image="a.png", max_pixels=9)) == [{"path": "a.png", "max_pixels": 9}]
    assert shown(part(image=b"png", max_pixels=9)) == [{"path": None, "bytes": b"png", "max_pixels": 9}]
    assert shown(part(bytes=b"png", path="a")) == [{"path": "a", "bytes": b"png"}]
    qwen = [{"image": "a.png"}, {"text": "<image>几只？"}]
    (example,) = examples_of({"messages": [{"role": "user", "content": qwen}, answer()]}, "messages", where=WHERE)
    assert example.images == ["a.png"] and example.messages[0]["content"][1]["text"] == "<image>几只？"
    encoded = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    assert shown(part(source=encoded)) == ["data:image/png;base64,iVBORw0KGgo="]
    assert shown(part(source={"type": "url", "url": "a.png"})) == ["a.png"]
    with pytest.raises(RowError, match=r"messages\[0\]\.content\[0\] has max_pixels but no picture of its own"):
        shown({**part(max_pixels=9), "images": ["a"]})


def test_parts_that_number_the_images_show_them_in_order():
    def of(*numbers):
        parts = [{"type": "image", "index": number, "text": None} for number in numbers]
        parts.append({"type": "text", "text": "哪只？", "index": None})
        return {"messages": [{"role": "user", "content": parts}, answer()], "images": ["a", "b"]}

    assert shown(of(0, 1)) == ["a", "b"]
    with pytest.raises(RowError, match=r"content\[0\] shows image 1 where 0 comes: write the row's images in"):
        shown(of(1, 0))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_what_is_thought_before_an_answer_under_each_of_its_names(name):
    turns = [{"role": "user", "content": "q"}, {**answer(), name: "想一想"}]
    (example,) = examples_of({"messages": turns}, "messages", where=WHERE)
    assert example.messages[1]["reasoning_content"] == "想一想"
    with pytest.raises(RowError, match=r"messages\[1\] has reasoning_content and thinking, which differ: keep one"):
        read_turn(view({}), {**answer(), "reasoning_content": "a", "thinking": "b"}, "messages[1]")


def test_an_answer_that_is_a_bad_one_is_no_answer_to_learn():
    for row in ({"prompt": "q", "completion": "坏"}, {"messages": [{"role": "user", "content": "q"}, answer()]}):
        with pytest.raises(RowError, match=r'"label" .* is not used here: keep the rows with good answers'):
            list(examples_of({**row, "label": False}, "messages", where=WHERE))
    left: set[str] = set()
    list(examples_of({"image": "a", "caption": "猫", "label": "cat"}, "caption", where=WHERE, unused=left.update))
    assert left == {"label"}


@pytest.mark.parametrize("format_name", ["caption", "llava", "cauldron"])
def test_an_entry_of_the_column_says_its_size_in_every_format(format_name):
    entry = {"path": "a.png", "bytes": None, "min_pixels": 4}
    rows = {
        "caption": {"image": entry, "caption": "猫"},
        "llava": {
            "image": entry,
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}],
        },
        "cauldron": {"images": [entry], "texts": [{"user": "q", "assistant": "a"}]},
    }
    assert shown(rows[format_name], format_name) == [{"path": "a.png", "min_pixels": 4}]


def test_a_mark_in_an_answer_is_a_picture_where_the_row_has_one_more():
    turns = [{"role": "user", "content": "<image>q"}, answer(content="<image>这里")]
    (text,) = examples_of({"messages": turns, "images": ["a"]}, "messages", where=WHERE)
    assert [len(message["content"]) for message in text.messages] == [2, 1]
    (both,) = examples_of({"messages": turns, "images": ["a", "b"]}, "messages", where=WHERE)
    assert [message["content"][0]["type"] for message in both.messages] == ["image", "image"]
    assert both.images == ["a", "b"]


def test_system_texts_of_row_and_conversation():
    row = {"messages": [{"role": "system", "content": "短"}, {"role": "user", "content": "q"}, answer()]}
    for same in ({"system": "短"}, {"system": "短", "system_prompt": "短"}, {"system": ""}):
        (example,) = examples_of({**row, **same}, "messages", where=WHERE)
        assert [message["role"] for message in example.messages] == ["system", "user", "assistant"]
    with pytest.raises(RowError, match="several system texts, and they differ: keep one of them"):
        list(examples_of({**row, "system": "长"}, "messages", where=WHERE))
    with pytest.raises(RowError, match='"mask" is "Assistant", and only the user'):
        list(examples_of({**row, "mask": "Assistant"}, "messages", where=WHERE))
    json.dumps(example.messages)
