"""The keys of other people's rows: each is used, refused in a sentence with its mend, or counted; none is lost."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.source_files import write
from vlm_sft.base.errors import RowError
from vlm_sft.data.dataset import load_source, read_source
from vlm_sft.data.streaming import stream_mixture
from vlm_sft.recipe.sections import Source
from vlm_sft.rows.formats import FORMATS, examples_of
from vlm_sft.rows.keys import KEYS, ROLES
from vlm_sft.rows.messages import unpacked

WHERE = "f.jsonl, line 3"
CHAT = {"messages": [{"role": "user", "content": "图中有什么？"}, {"role": "assistant", "content": "A cat."}]}


def read(row: dict, format_name: str = "messages"):
    """(conversations as plain values, keys that were counted)."""
    counted: set[str] = set()
    found = list(examples_of(row, format_name, where=WHERE, unused=counted.update))
    return [(example.messages, example.images) for example in found], counted


def refused(row: dict, format_name: str = "messages") -> str:
    with pytest.raises(RowError) as error:
        read(row, format_name)
    assert str(error.value).startswith(f"{WHERE}: ") and str(error.value).endswith(".")
    return str(error.value)


def with_message(**keys) -> dict:
    question, answer = CHAT["messages"]
    return {"messages": [question, {**answer, **keys}]}


REFUSED = [key for key, known in KEYS["row"].items() if known.mend and key not in ("history", "tools", "mask")]


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.parametrize("format_name", ["messages", "caption"])
def test_what_a_row_would_lose_is_refused_by_row_key_and_mend(key, format_name):
    row = CHAT if format_name == "messages" else {"image": "a.png", "caption": "猫"}
    sentence = refused({**row, key: False if KEYS["row"][key].of is bool else "x"}, format_name)
    assert f'"{key}" ({KEYS["row"][key].means}) is not used here: {KEYS["row"][key].mend}.' in sentence
    for nothing in (None, "", [], {}):
        assert read({**row, key: nothing}, format_name) == read(row, format_name)


@pytest.mark.parametrize(
    ("key", "value"), [("name", "小明"), ("refusal", "No."), ("tool_call_id", "7"), ("images", ["a"])]
)
def test_what_a_message_would_lose_is_refused(key, value):
    assert f'"messages[1].{key}" ({KEYS["message"][key].means}) is not used here' in refused(
        with_message(**{key: value})
    )
    assert "messages[1] calls tools" in refused(with_message(tool_calls=[{}]))
    assert "messages[1] calls tools" in refused(with_message(function_call={"name": "f"}))


def test_what_a_part_would_lose_is_refused():
    for part, key in (
        ({"type": "image", "file_id": "f1"}, "file_id"),
        ({"type": "text", "text": "a", "video": "b"}, "video"),
    ):
        row = {"messages": [{"role": "user", "content": [part]}, CHAT["messages"][1]]}
        assert f'"messages[0].content[0].{key}"' in refused(row)


def test_unknown_keys_are_counted_by_name_without_places():
    row = with_message(model="gpt-4", score=0)
    row["messages"][0] = {"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]}
    assert read({**row, "url": "http://a", "prompt_id": "7", "empty": []})[1] == {
        *("messages[].model", "messages[].score", "messages[].content[].cache", "url", "prompt_id"),
    }
    row = {"images": ["a"], "texts": [{"user": "q", "assistant": "a", "source": "FigureQA"}]}
    assert read(row, "cauldron")[1] == {"texts[].source"}
    row = {"image": "a", "question": "q", "answers": [{"answer": "a", "answer_id": 1}], "split": "训练"}
    assert read(row, "vqa")[1] == {"answers[].answer_id", "split"}
    row = {"image": {"path": "a", "width": 3}, "caption": "猫"}
    assert read(row, "caption")[1] == {"images[].width"}


def test_columns_and_what_every_format_reads_are_not_counted():
    row = {"id": "1", "language": "zh", "pic": "a", "text": "猫", "system": "You see."}
    counted: set[str] = set()
    list(examples_of(row, "caption", where=WHERE, columns={"image": "pic"}, unused=counted.update))
    assert counted == set()


def test_they_are_counted_in_the_rows_of_a_source_and_in_kept_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_sft.data.row_cache.FEWEST", 2)
    rows = [{**CHAT, "model": "gpt-4"}, {**CHAT, "model": None, "topic": "猫"}, {**CHAT, "model": "x"}]
    source = Source(path=write(tmp_path / "a.jsonl", rows), format="messages")
    for _ in range(2):  # read, and then kept
        found: dict[str, int] = {}
        read_source(source, unused=found.update)
        assert found == {"model": 2, "topic": 1}


def test_what_rows_say_beyond_the_features_is_in_a_column_of_those_that_say_it(tmp_path):
    plain = Source(path=write(tmp_path / "plain.jsonl", [CHAT]), format="messages")
    assert load_source(plain).column_names == ["messages", "images", "source", "id"]
    row = {**with_message(loss=False), "images": [{"path": "a.png", "max_pixels": 100}], "tools": [{"name": "放大"}]}
    row["messages"] += [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "ok", "loss": True}]
    row["messages"][0] = {"role": "user", "content": "q"}
    source = Source(path=write(tmp_path / "more.jsonl", [CHAT, row]), format="messages")
    rows = load_source(source)
    assert rows.column_names == ["messages", "images", "source", "id", "extras"] and rows[0]["extras"] is None
    streamed = list(zip(range(2), stream_mixture([source], buffer=1), strict=False))[1][1]
    for found in (unpacked(rows[1]), unpacked(streamed)):
        assert [message.get("loss") for message in found["messages"]] == [None, False, None, None]
        assert found["messages"][0]["tools"] == [{"name": "放大"}]
        assert found["images"] == [{"path": str(tmp_path / "a.png"), "bytes": None, "max_pixels": 100}]
        assert "extras" not in found
    assert unpacked(CHAT) == CHAT


# ---------------------------------------------------------------------------------------------------------- property

VALUES = st.sampled_from(["x", "猫", 1, 0, True, False, ["a.png"], [["q", "a"]], [{"name": "f"}], {"path": "a.png"}])
UNKNOWN = st.sampled_from(["model", "score", "来源", "topic", "width", "x"])


def some_of(kind: str) -> st.SearchStrategy[dict]:
    return st.dictionaries(st.sampled_from(list(KEYS[kind])) | UNKNOWN, VALUES, max_size=4)


BASES = {
    "messages": CHAT,
    "llava": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "caption": {"image": "a.png", "caption": "猫"},
    "vqa": {"image": "a.png", "question": "q", "answer": "a"},
    "cauldron": {"images": ["a.png"], "texts": [{"user": "q", "assistant": "a"}]},
}
# What says by its value what is so without it.
DEFAULTS = {"loss", "train", "training", "weight", "loss_scale", "loss_mask", "mask", "language", "detail", "id"}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(BASES)), st.data())
def test_every_key_is_used_refused_or_counted(format_name, data):
    row = json.loads(json.dumps(BASES[format_name]))
    place, added = "", {}
    if format_name in ("messages", "llava") and data.draw(st.booleans()):
        turns = next(name for name in ("messages", "conversations") if name in row)
        added = {key: value for key, value in data.draw(some_of("message")).items() if key not in row[turns][1]}
        row[turns][1] |= added
        place = f"{turns}[]."
    elif format_name == "messages" and data.draw(st.booleans()):
        part = {"type": "image", "image": "a.png"}
        added = {key: value for key, value in data.draw(some_of("part")).items() if key not in part}
        row["messages"][0]["content"] = [{**part, **added}]
        place = "messages[].content[]."
    else:
        added = {key: value for key, value in data.draw(some_of("row")).items() if key not in row}
        row |= added
    try:
        found, counted = read(row, format_name)
    except RowError as error:
        if not any(key in str(error) for key in [*added, "image", "video"]):
            raise
        return
    for key, value in added.items():
        if f"{place}{key}" in counted or key in DEFAULTS or value in ("", []):
            continue
        less = json.loads(json.dumps(row))
        target = less
        if place.startswith(("messages[].content", "messages[]", "conversations[]")):
            target = less.get("messages", less.get("conversations"))["content" not in place]
            target = target["content"][0] if "content" in place else target
        del target[key]
        try:
            changed = read(less, format_name)[0] != found
        except RowError:
            changed = True
        assert changed or key in ("system_prompt", "system"), (key, value)


def test_formats_and_roles_are_of_the_three():
    assert set(ROLES.values()) == {"user", "assistant", "system"}
    assert {"messages", "llava", "caption", "vqa", "cauldron"} <= set(FORMATS)
