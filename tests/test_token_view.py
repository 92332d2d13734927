"""Tokens for people: nothing is lost, nothing is made up, roles are those who speak."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from test_collator import make_row, turn
from test_processor import PROCESSORS, TOKENS, conversations

from vlm_sft.assets import list_templates
from vlm_sft.collator import MultimodalCollator
from vlm_sft.token_view import pieces_of


def view(name, messages, photos):
    row = make_row(messages, photos)
    collator = MultimodalCollator(PROCESSORS[name])
    sample = collator.encode(row, with_images=False)
    return sample, pieces_of(sample, row["messages"], collator.processor)


def said(pieces, role):
    return "".join(piece.text for piece in pieces if piece.role == role)


def test_roles_loss_and_places(photos):
    messages = turn("What is this?", "a cat", images=2) + turn("这是什么？", "一只猫")
    sample, pieces = view("ziya", messages, photos)
    assert said(pieces, "user") == "What is this?这是什么？" and said(pieces, "assistant") == "a cat一只猫"
    assert [len(piece.ids) for piece in pieces if piece.role == "image"] == [2 * TOKENS]
    assert "".join(piece.text for piece in pieces if piece.learned) == "a cat</s>一只猫</s>"
    assert {piece.role for piece in pieces if piece.learned} == {"assistant", "template"}
    assert [piece.position for piece in pieces] == [sum(len(p.ids) for p in pieces[:i]) for i in range(len(pieces))]
    assert len(sample.chat.input_ids) == sum(len(piece.ids) for piece in pieces)


def test_bytes_of_a_character_are_one_piece(photos):
    _, pieces = view("plain", turn("", "猫鑫", images=1), photos)
    (whole,) = [piece for piece in pieces if piece.text == "鑫"]
    assert len(whole.ids) == 3 and whole.learned


def test_a_system_text_has_a_role_of_its_own(photos):
    system = {"role": "system", "content": [{"type": "text", "text": "Be short."}]}
    _, pieces = view("vicuna_v1", [system, *turn("hello", "hi")], photos)
    assert said(pieces, "system") == "Be short." and said(pieces, "user") == "hello"


@pytest.mark.parametrize("name", list_templates())
@settings(max_examples=10, deadline=None)
@given(messages=conversations())
def test_every_token_is_there_once(name, messages):
    processor = PROCESSORS[name]
    chat = processor.encode_chat(messages)
    pieces = pieces_of(SimpleNamespace(chat=chat), messages, processor)
    assert [i for piece in pieces for i in piece.ids] == chat.input_ids
    learned = [piece.learned for piece in pieces for _ in piece.ids]
    assert learned == [label != -100 for label in chat.labels]
