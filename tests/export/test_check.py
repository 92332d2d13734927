"""What an export is compared by: a picture, a prompt as a user of transformers makes it, tokens, pixels and logits."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from support.tiny_families import tiny
from vlm_sft.export.check import (
    CONVERSATION,
    PICTURE,
    PROBE,
    QUESTION,
    compare,
    inputs_of,
    is_prompt,
    noise_picture,
    read_processor,
)

TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
)


def test_the_picture_is_the_same_every_time_and_neither_square_nor_plain():
    picture = noise_picture()
    assert picture.size == (84, 60) and picture.tobytes() == noise_picture().tobytes()
    assert len(picture.getcolors(84 * 60)) > 1000


def test_a_conversation_that_ends_with_the_user_is_a_prompt():
    assert is_prompt(QUESTION[:1]) and is_prompt(QUESTION[:3]) and not is_prompt(QUESTION)


@pytest.fixture
def probe(tmp_path):
    """An export that is what its bundle is, and the probe of that bundle."""
    export = shutil.copytree(tiny("llava"), tmp_path / "export")
    (export / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    folder = tmp_path / "probe"
    folder.mkdir()
    noise_picture().save(folder / PICTURE)
    (folder / CONVERSATION).write_text(json.dumps(QUESTION, ensure_ascii=False), encoding="utf-8")
    text, inputs = inputs_of(read_processor(export), QUESTION, [noise_picture()])
    assert text.startswith("<image>What is this? 这是什么？") and inputs["input_ids"].shape[1] > 20
    model = AutoModelForImageTextToText.from_pretrained(export).eval()
    with torch.no_grad():
        save_file({**inputs, "logits": model(**inputs).logits}, folder / PROBE)
    return export, folder


def test_what_is_the_same_differs_by_nothing(probe):
    found = compare(*probe)
    assert found["ids"] and found["chats"] and found["pixels"] == found["logits"]["max_difference"] == 0.0
    assert found["logits"]["scale"] > 0 and found["positions"] == load_file(probe[1] / PROBE)["input_ids"].shape[1]


@pytest.mark.parametrize(("name", "key"), [("logits", "max_difference"), ("pixel_values", "pixels")])
def test_one_number_that_is_another_is_found(probe, name, key):
    state = load_file(probe[1] / PROBE)
    state[name].view(-1)[-1] += 0.5
    save_file(state, probe[1] / PROBE)
    found = compare(*probe)
    assert {**found, **found["logits"]}[key] == pytest.approx(0.5, abs=1e-6)


def test_rows_that_the_vocabulary_grew_by_are_not_compared(probe):
    state = load_file(probe[1] / PROBE)
    state["logits"] = state["logits"][..., :-3].contiguous()
    save_file(state, probe[1] / PROBE)
    assert compare(*probe)["logits"]["max_difference"] == 0.0


def test_other_tokens_end_the_comparison(probe):
    (probe[0] / "chat_template.jinja").write_text(TEMPLATE + "!", encoding="utf-8")
    found = compare(*probe)
    assert not found["ids"] and found["text"].endswith("!") and "logits" not in found
