"""Tokens for people: nothing is lost, nothing is made up, roles are those who speak."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings

from support.conversations import PROCESSORS, TOKENS, conversations, make_row, turn
from vlm_sft.base.assets import list_templates
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.batch.token_view import token_groups


def view(name, messages, photos):
    row = make_row(messages, photos)
    collator = MultimodalCollator(PROCESSORS[name])
    sample = collator.encode(row, with_images=False)
    return sample, token_groups(sample, row["messages"], collator.processor)


def said(groups, role):
    return "".join(group.text for group in groups if group.role == role)


def test_roles_loss_and_places(photos):
    messages = turn("What is this?", "a cat", images=2) + turn("这是什么？", "一只猫")
    sample, groups = view("ziya", messages, photos)
    assert said(groups, "user") == "What is this?这是什么？" and said(groups, "assistant") == "a cat一只猫"
    assert [len(group.ids) for group in groups if group.role == "image"] == [2 * TOKENS]
    assert "".join(group.text for group in groups if group.learned) == "a cat</s>一只猫</s>"
    assert {group.role for group in groups if group.learned} == {"assistant", "template"}
    assert [group.position for group in groups] == [sum(len(p.ids) for p in groups[:i]) for i in range(len(groups))]
    assert len(sample.chat.input_ids) == sum(len(group.ids) for group in groups)


def test_bytes_of_a_character_are_one_piece(photos):
    _, groups = view("plain", turn("", "猫鑫", images=1), photos)
    (whole,) = [group for group in groups if group.text == "鑫"]
    assert len(whole.ids) == 3 and whole.learned


def test_a_system_text_has_a_role_of_its_own(photos):
    system = {"role": "system", "content": [{"type": "text", "text": "Be short."}]}
    _, groups = view("vicuna_v1", [system, *turn("hello", "hi")], photos)
    assert said(groups, "system") == "Be short." and said(groups, "user") == "hello"


@pytest.mark.parametrize("name", list_templates())
@settings(max_examples=10, deadline=None)
@given(messages=conversations())
def test_every_token_is_there_once(name, messages):
    processor = PROCESSORS[name]
    chat = processor.encode_chat(messages)
    groups = token_groups(SimpleNamespace(chat=chat), messages, processor)
    assert [i for group in groups for i in group.ids] == chat.input_ids
    learned = [group.learned for group in groups for _ in group.ids]
    assert learned == [label != -100 for label in chat.labels]
