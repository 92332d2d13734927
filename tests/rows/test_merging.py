"""Rows on the same pictures: which are merged, in which order, and what is taken apart again."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.conversations import PROCESSORS, SAID, make_row, turn
from vlm_sft.base.errors import RowError
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.rows.merging import apart, fill, groups_of, ids_of, merge_key, merged
from vlm_sft.rows.messages import packed, unpacked

PHOTOS = [f"/p/{k}.png" for k in range(9)]


def system(text):
    return [{"role": "system", "content": [{"type": "text", "text": text}]}]


def question(*parts, answer="好"):
    content = [{"type": "image", "text": None} if part is None else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


@pytest.mark.parametrize(
    ("one", "other", "turns", "alone"),
    [
        (question(None, "\nwhat?"), question(None, "\n这是什么？"), True, True),
        (question(None, "a") + turn("more", "b"), question(None, "c"), True, True),
        (system("s") + question(None, "a"), system("s") + question(None, "b"), True, True),
        (system("s") + question(None, "a"), system("t") + question(None, "b"), False, False),
        (system("s") + question(None, "a"), question(None, "b"), False, False),
        (question("see", None, "a"), question("see", None, "b"), False, True),
        (question("a", None), question("b", None), False, False),
        (question(None), question(None, answer="坏"), False, True),
        (question(None, " \n"), question(None, "\n"), False, True),
        (question(None, "a"), question(None, None, "a"), False, False),
        (question("a"), question("b"), False, False),
        (question(None, "a") + question(None, "b"), question(None, "a") + question(None, "b"), False, False),
    ],
)
def test_rows_are_merged_where_all_before_the_question_is_the_same(one, other, turns, alone):
    rows = [make_row(one, PHOTOS, 1), make_row(other, PHOTOS, 2)]
    for independent, wanted in ((False, turns), (True, alone)):
        keys = [merge_key(row, independent) for row in rows]
        assert (keys[0] is not None and keys[0] == keys[1]) == wanted, independent


def test_a_picture_is_its_path_or_its_bytes_with_its_size_and_the_language_counts():
    row = make_row(turn("a", "b", 1), PHOTOS)
    key = merge_key(row, False)
    assert key == merge_key(make_row(turn("c", "d", 1), PHOTOS, 7), False)
    assert key != merge_key(make_row(turn("a", "b", 1), PHOTOS[1:]), False)
    assert key != merge_key(row, False, "zh") and key != merge_key(row, True)
    embedded = [
        {**row, "images": [{"path": name, "bytes": data}]} for name, data in (("a", b"1"), ("b", b"1"), ("a", b"2"))
    ]
    first, same, other = (merge_key(each, False) for each in embedded)
    assert first == same and first not in (other, key)
    assert key != merge_key({**row, "images": [{**row["images"][0], "resized_width": 28}]}, False)
    thinks = make_row(turn("a", "b", 1), PHOTOS)
    thinks["messages"][1]["reasoning_content"] = "hm"
    assert merge_key(thinks, False) is None and merge_key(thinks, True) is not None


def test_a_conversation_has_the_picture_once_and_the_system_message_and_tools_once():
    rows = [make_row(system("s") + question(None, f"\n{k}?"), PHOTOS, k) for k in range(5)]
    rows[1]["messages"] += turn("and", "c")
    for row in rows:
        row["messages"][1]["tools"] = "[]"
    whole = merged(rows, False)
    assert whole["images"] == rows[0]["images"] and ids_of(whole) == [f"s/{k}" for k in range(5)]
    assert whole["id"] == "s/0, s/1, s/2 and 2 more"
    assert [m["role"] for m in whole["messages"]] == ["system", *["user", "assistant"] * 6]
    parts = [part for message in whole["messages"] for part in message["content"]]
    assert sum(part["type"] == "image" for part in parts) == 1
    said = [m["content"][-1]["text"] for m in whole["messages"] if m["role"] == "user"]
    assert said == ["\n0?", "1?", "and", "2?", "3?", "4?"], "the break that parted a question from the picture is gone"
    assert sum("tools" in m for m in whole["messages"]) == 1
    assert apart(whole) == [whole] and ids_of(rows[0]) == ["s/0"] and apart(rows[0]) == [rows[0]]


@st.composite
def sources(draw):
    """Rows on few pictures, some of which cannot be merged."""
    kinds = st.sampled_from(["plain", "system", "two turns", "text", "late picture", "two pictures"])
    rows = []
    for number in range(draw(st.integers(1, 12))):
        kind, said = draw(kinds), draw(SAID)
        own = PHOTOS[draw(st.integers(0, 2)) :]
        messages = question(None, said)
        if kind == "system":
            messages = system("Be brief. 请简短。") + messages
        elif kind == "two turns":
            messages += turn(draw(SAID), draw(SAID))
        elif kind == "text":
            messages = question(said)
        elif kind == "late picture":
            messages += question(None, said)
        elif kind == "two pictures":
            messages = question(None, None, said)
        rows.append(make_row(messages, own, number))
    return rows


@given(rows=sources(), seed=st.integers(0, 2**40), independent=st.booleans())
def test_every_row_is_in_once_in_an_order_of_the_seed_and_what_is_stored_is_taken_apart_again(rows, seed, independent):
    keys = [merge_key(row, independent) for row in rows]
    groups = groups_of(keys, seed)
    assert groups == groups_of(keys, seed)
    assert sorted(number for group in groups for number in group) == list(range(len(rows)))
    for group in groups:
        assert len({keys[number] for number in group}) == 1 and (keys[group[0]] is not None or len(group) == 1)
        if len(group) > 1:
            own = [rows[number] for number in group]
            whole = merged(own, independent)
            columns = {"messages", "images", "source", "id"}
            plain = [{"role": m["role"], "content": m["content"]} for m in whole["messages"]]
            stored = unpacked({**{k: whole[k] for k in columns}, "messages": plain, "extras": packed(whole)})
            assert ids_of(stored) == [row["id"] for row in own]
            assert apart(stored) == (own if independent else [stored])


def test_the_order_on_a_picture_is_drawn():
    keys = [b"a"] * 20
    orders = [groups_of(keys, seed)[0] for seed in range(3)]
    assert orders[0] != orders[1] != orders[2] and list(range(20)) not in orders


@given(
    own=st.lists(st.integers(1, 30), min_size=1, max_size=30),
    front=st.integers(0, 20),
    room=st.integers(50, 90),
    extra=st.integers(0, 3),
)
def test_rows_fill_conversations_up_to_the_room(own, front, room, extra):
    lengths, fronts = np.array(own) + front, np.full(len(own), front)
    group = random.Random(0).sample(range(len(own)), len(own))
    filled = fill(group, lengths, fronts, room, extra)
    assert sorted(number for each in filled for number in each) == list(range(len(own)))
    for each in filled:
        assert front + sum(own[n] for n in each) + extra * (len(each) - 1) <= room
        assert each == sorted(each, key=group.index), "in the order that was drawn"
    assert fill(group, lengths, fronts, None) == [group]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(PROCESSORS)))
def test_what_is_learned_is_what_separate_rows_learn(data, name):
    """The mask, in every template: of independent rows token by token, of a conversation as text."""
    answers = st.sampled_from(["猫", "two dogs", "USER: hi", " a  b", "7"])
    rows = [
        make_row(question(None, "\n" + data.draw(SAID), answer=data.draw(answers)), PHOTOS, k)
        for k in range(data.draw(st.integers(2, 4)))
    ]
    collator = MultimodalCollator(PROCESSORS[name])
    alone = [collator.sample(row, with_images=False).chat for row in rows]
    if any(chat.labels[chat.places.index(0, 2)] != -100 for chat in alone):  # a caption right behind its picture
        with pytest.raises(RowError, match="an answer follows it at once"):
            collator.sample(merged(rows, True), with_images=False)
        return
    shared = collator.sample(merged(rows, True), with_images=False).chat
    assert sum(shared.places) == sum(alone[0].places) and shared.num_images == 1
    prefix, *rest = shared.lengths
    start = prefix
    for chat, length in zip(alone, rest, strict=True):
        assert shared.input_ids[:prefix] + shared.input_ids[start : start + length] == chat.input_ids
        assert shared.labels[:prefix] + shared.labels[start : start + length] == chat.labels
        start += length
    assert shared.heads == [0] * len(shared.lengths) and start == len(shared.input_ids)
    learned = [label for label in shared.labels if label != -100]
    assert learned == [label for chat in alone for label in chat.labels if label != -100]
