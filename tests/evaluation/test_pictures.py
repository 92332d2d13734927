"""Pictures of a benchmark: kept once, encoded once, and the same answers as where each question brings its own."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from support.benchmark_files import png
from support.tiny_families import ALL, processor_of, tiny
from support.tiny_families import rows as family_rows
from vlm_sft.base.errors import RowError
from vlm_sft.evaluation import pictures
from vlm_sft.evaluation.pictures import EncodedOnce, Pictures
from vlm_sft.families.build_family import model_class
from vlm_sft.inference.generation import answer
from vlm_sft.inference.likelihood import likelihoods
from vlm_sft.stack.build_stack import build_stack


def test_tables_pictures_are_kept_once_outside_the_memory(monkeypatch):
    monkeypatch.setattr(pictures, "IN_MEMORY", 100)
    kept = Pictures()
    first, again, other = (kept.keep({"path": "a.png", "bytes": png(n)}) for n in (0, 0, 1))
    assert first["place"] == again["place"] != other["place"]
    assert kept.whole(first) == {"path": "a.png", "bytes": png(0)} and kept.whole(other)["bytes"] == png(1)
    file = {"path": "/b.png", "bytes": None}
    assert kept.whole(kept.keep(dict(file))) == file


def rows_of(*numbers):
    content = [{"type": "image"}, {"type": "text", "text": "这是什么？ what?"}]
    messages = [{"role": "user", "content": content}]
    pictures = [{"path": None, "bytes": png(number)} for number in numbers]
    return [{"messages": messages, "id": str(n), "images": [one]} for n, one in enumerate(pictures)]


@pytest.mark.parametrize("resampler", ["blip2", None])
def test_answers_are_those_of_pictures_encoded_each_time(bundle_recipe, resampler):
    tower = "blip2" if resampler else "clip"
    stack = build_stack(bundle_recipe(tower, resampler, projector={"type": "linear"}, chat_template="ziya"))
    model, processor, rows = stack.model.eval(), stack.processor, rows_of(0, 1, 0, 2, 1)
    wanted = answer(model, processor, rows, max_new_tokens=5)
    with EncodedOnce(model, processor) as shared:
        assert answer(model, processor, shared.stand_ins(rows), max_new_tokens=5) == wanted
        assert answer(model, processor, shared.stand_ins(rows[:2]), max_new_tokens=5) == wanted[:2]
        assert shared.encoded == 3
    assert answer(model, processor, rows, max_new_tokens=5) == wanted  # as before
    # An untrained model may say the same of all; how likely it finds it tells which picture it saw.
    said = [{**row, "messages": [*row["messages"], {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]}
            for row in rows]  # fmt: skip
    logs = [one.log for one in likelihoods(model, processor, said)]
    with EncodedOnce(model, processor) as shared:
        again = [one.log for one in likelihoods(model, processor, shared.stand_ins(said))]
    assert again == pytest.approx(logs, abs=1e-5)
    assert logs[0] == pytest.approx(logs[2], abs=1e-5) and abs(logs[0] - logs[1]) > 1e-4


@pytest.mark.parametrize("name", ALL)
def test_existing_models_encode_each_picture_once(name):
    """The same answers and likelihoods as where each question brings its picture, of any size."""
    config = AutoConfig.from_pretrained(tiny(name))
    model, processor = model_class(config).from_pretrained(tiny(name)).eval(), processor_of(name)
    model.blank = processor.image_inputs([Image.new("RGB", (64, 64))])
    first, second, text = family_rows((40, 30), (300, 60), None)
    said = [{**second, "id": "again"}, first, second, {**first, "id": "twice"}]
    said = [*said, text] if name != "kosmos-2" else said
    asked = [{**row, "messages": row["messages"][:1]} for row in said]
    wanted = answer(model, processor, asked, max_new_tokens=3)
    logs = [one.log for one in likelihoods(model, processor, said)]
    with EncodedOnce(model, processor) as shared:
        shown = shared.stand_ins(asked)
        assert answer(model, processor, shown[:2], max_new_tokens=3) == wanted[:2]
        assert answer(model, processor, shown[1:], max_new_tokens=3) == wanted[1:]
        again = [one.log for one in likelihoods(model, processor, shared.stand_ins(said))]
        assert shared.encoded == 2
    assert again == pytest.approx(logs, abs=1e-4) and abs(logs[0] - logs[1]) > 1e-4
    assert answer(model, processor, asked, max_new_tokens=3) == wanted  # as before


def test_no_more_is_kept_than_may_be(bundle_recipe, monkeypatch):
    stack = build_stack(bundle_recipe(chat_template="ziya"))
    monkeypatch.setattr(pictures, "MOST_BYTES", 1)
    with EncodedOnce(stack.model.eval(), stack.processor) as shared:
        shared.stand_ins(rows_of(0, 1))
        shared.stand_ins(rows_of(2))
        assert shared.encoded == 3 and len(shared._kept) == 1
        shared.stand_ins(rows_of(0))
        assert shared.encoded == 4


def test_a_picture_that_cannot_be_encoded_is_named(bundle_recipe, monkeypatch):
    stack = build_stack(bundle_recipe(chat_template="ziya"))
    with EncodedOnce(stack.model.eval(), stack.processor) as shared:
        real = type(stack.processor).encode_images

        def refuse(self, images):
            if images[0].getpixel((0, 0)) == (53, 97, 31):  # the second picture
                raise ZeroDivisionError("no side")
            return real(self, images)

        monkeypatch.setattr(type(stack.processor), "encode_images", refuse)
        with pytest.raises(
            RowError, match=r"row 1: an image of 32 x 24 pixels is refused by the model's image processor"
        ):
            shared.stand_ins(rows_of(0, 1))
    assert torch.is_inference_mode_enabled() is False
