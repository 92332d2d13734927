"""Rows to batches: labels, truncation by whole turns, and the sentences on rows that cannot be trained on."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil

from support.conversations import SAID, TOKENS, make_processor, make_row, turn
from support.paths import ROOT
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.batch.collator import REJECTED, MultimodalCollator, load_collator_class
from vlm_sft.reading.images import load_image


@pytest.fixture(scope="module")
def processor():
    return make_processor("vicuna_v1")


def test_a_batch_of_mixed_rows(processor, photos):
    rows = [
        make_row(turn("这是什么？", "一只猫", images=2), photos),
        make_row(turn("hello", "hi"), photos, 1),
        make_row(turn("a", "b", images=1) + turn("c", "d"), photos, 2),
    ]
    batch = MultimodalCollator(processor, pad_to_multiple_of=8)(rows)
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[1] % 8 == 0
    counts = (batch["input_ids"] == processor.image_token_id).sum(1)
    assert counts.tolist() == [2 * TOKENS, 0, TOKENS]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    learned = processor.tokenizer.decode(batch["labels"][2][batch["labels"][2] != -100])
    assert learned == " b</s> d</s>"


def test_a_text_only_batch_has_no_images(processor, photos):
    assert "pixel_values" not in MultimodalCollator(processor)([make_row(turn("hello", "hi"), photos)])


def test_images_come_in_reading_order(processor, photos):
    row = make_row(turn("a", "b", images=1) + turn("c", "d", images=1), photos)
    batch = MultimodalCollator(processor)([row])
    alone = [MultimodalCollator(processor)([{**row, "messages": row["messages"][:2], "images": [image]}])
             for image in row["images"]]  # fmt: skip
    assert torch.equal(batch["pixel_values"], torch.cat([b["pixel_values"] for b in alone]))


SHARED = make_processor("vicuna_v1")


@settings(max_examples=120, deadline=None)
@given(
    turns=st.lists(st.tuples(SAID, SAID, st.integers(0, 2)), min_size=1, max_size=4),
    max_length=st.integers(20, 300),
)
def test_truncation_keeps_whole_turns_and_whole_images(turns, max_length):
    messages = [m for question, answer, images in turns for m in turn(question, answer, images)]
    images = [{"path": "unread.png", "bytes": None}] * sum(count for _, _, count in turns)
    row = {"messages": messages, "images": images, "source": "s", "id": "s/7"}
    collator = MultimodalCollator(SHARED, max_length=max_length)
    first = SHARED.encode_chat(messages[:2])
    if len(first.input_ids) > max_length:
        with pytest.raises(UserError, match=f"{len(first.input_ids)} tokens"):
            collator.encode(row, with_images=False)
        return
    sample = collator.encode(row, with_images=False)
    kept = len(turns) - sample.turns_lost
    assert kept >= 1
    assert len(sample.chat.input_ids) <= max_length
    assert sample.chat == SHARED.encode_chat(messages[: 2 * kept]), "what is kept is what it would be alone"
    assert sample.chat.num_images == sum(count for _, _, count in turns[:kept])
    assert SHARED.image_token_id not in [n for n in sample.chat.labels if n != -100]
    if kept < len(turns):
        assert len(SHARED.encode_chat(messages[: 2 * kept + 2]).input_ids) > max_length, (
            "no turn is dropped for nothing"
        )


def test_images_of_dropped_turns_are_dropped(processor, photos):
    row = make_row(turn("a", "b", images=1) + turn("word " * 40, "d", images=2), photos)
    limit = len(processor.encode_chat(row["messages"][:2]).input_ids) + 5
    sample = MultimodalCollator(processor, max_length=limit).encode(row)
    assert len(sample.images) == 1 and sample.turns_lost == 1


def test_rows_that_cannot_be_trained_on_are_named(processor, photos, tmp_path):
    collator = MultimodalCollator(processor, max_length=200)
    row = make_row(turn("a", "b", images=1), photos)
    with pytest.raises(UserError, match=r"row s/0: its text has room for 1 images \(image marks\) but it comes with 0"):
        collator([{**row, "images": []}])
    with pytest.raises(UserError, match=r"row s/0: its first turn alone has \d+ tokens .*raise max_length"):
        collator([make_row(turn("word " * 160, "b"), photos)])
    with pytest.raises(UserError, match=r"row s/0: no token would be in the loss"):
        collator([make_row(turn("a", "b")[:1], photos)])
    with pytest.raises(UserError, match=r"row s/0: .*message 1.*"):
        collator([make_row(turn("a", "  "), photos)])
    (tmp_path / "empty.png").touch()
    with pytest.raises(UserError, match=r"row s/0: .*empty\.png"):
        collator([{**row, "images": [{"path": str(tmp_path / "empty.png"), "bytes": None}]}])


def test_an_image_is_decoded_once_for_a_batch_and_again_for_the_next(processor, photos, monkeypatch):
    opened = []

    def counted(image, **options):
        opened.append(image["path"] or image["bytes"])
        return load_image(image, **options)

    monkeypatch.setattr("vlm_sft.batch.collator.load_image", counted)
    data = Path(photos[0]).read_bytes()
    rows = [make_row(turn("a", "b", images=2), photos, i) for i in range(3)]
    rows += [{**make_row(turn("a", "b", images=1), photos), "images": [{"path": "same name", "bytes": data}]}] * 2
    collator = MultimodalCollator(processor)
    batch = collator(rows)
    assert opened == [photos[0], photos[1], "same name"]
    assert batch["pixel_values"].shape[0] == 8
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][6])
    collator(rows[:1])
    assert opened[3:] == photos[:2]


def test_a_large_jpeg_is_reduced_only_where_the_size_is_fixed(processor, tmp_path):
    Image.new("RGB", (400, 400), "red").save(tmp_path / "a.jpg")
    image = {"path": str(tmp_path / "a.jpg"), "bytes": None}
    assert MultimodalCollator(processor).decode(image, "").size == (100, 100), "28 pixels are needed"
    assert MultimodalCollator(processor, reduce=False).decode(image, "").size == (400, 400)


def test_a_rejected_row_is_named_by_its_batch(processor, photos):
    collator = MultimodalCollator(processor)
    collator.drop_rejected = True
    good, bad = make_row(turn("a", "b", images=1), photos), make_row(turn("a", "b", images=1), ["gone.png"], 7)
    batch = collator([good, bad, good])
    ((source, row, reason, sentence),) = batch.pop(REJECTED)
    assert (source, row, reason) == ("s", "s/7", "image missing") and sentence.startswith("row s/7: the image gone.png")
    alone = collator([good, good])
    assert batch.keys() == alone.keys() and all(torch.equal(batch[name], alone[name]) for name in batch)
    with pytest.raises(UserError, match=r"No row of a batch of 1 can be trained on; the last one: row s/7: the image"):
        collator([bad])


def test_each_rejected_row_has_a_reason(processor, photos):
    row = make_row(turn("a", "b", images=1), photos)
    for wrong, reason in (
        ({**row, "images": []}, "marks differ"),
        (make_row(turn("word " * 160, "b"), photos), "too long"),
        (make_row(turn("a", "b")[:1], photos), "no answer"),
        (make_row(turn("a", " "), photos), "bad conversation"),
    ):
        with pytest.raises(RowError) as error:
            MultimodalCollator(processor, max_length=200).encode(wrong)
        assert (error.value.where, error.value.reason) == ("row s/0", reason)


def test_a_subclass_may_change_each_step(processor, photos):
    class Loud(MultimodalCollator):
        def render(self, messages):
            return self.processor.render([*messages[:-1], {"role": "assistant", "content": "LOUD"}])

        def encode(self, row, with_images=True):
            sample = super().encode(row, with_images)
            sample.loss_weights = [0.5] * len(sample.chat.input_ids)
            sample.extra["source"] = row["source"]
            return sample

        def collate(self, samples):
            return {**super().collate(samples), "sources": [s.extra["source"] for s in samples]}

    batch = Loud(processor)([make_row(turn("a", "b"), photos), make_row(turn("aaaa bbbb", "b"), photos)])
    assert batch["sources"] == ["s", "s"]
    assert batch["loss_weights"].shape == batch["input_ids"].shape
    assert (batch["loss_weights"] == 0.5 * batch["attention_mask"]).all()
    assert "LOUD" in processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])


def test_a_users_class_is_found_by_name():
    assert load_collator_class("vlm_sft.batch.collator:MultimodalCollator") is MultimodalCollator
    for path, sentence in (
        ("no_such_module:X", "cannot be imported"),
        ("vlm_sft.batch.collator:Nothing", "has no 'Nothing'"),
        ("vlm_sft.batch.collator:Sample", "not a subclass"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_collator_class(path)


def test_the_benchmark_of_the_loader_measures_both_stacks(tmp_path):
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "data_loader.py"))
    (photo, *_) = photos = benchmark["write_photos"](tmp_path, 2)
    assert Image.open(photo).size == (640, 480)
    for stack, turns, steps in (("llava", 3, 5), ("blip2", 1, 5)):
        rows = [benchmark["make_row"](path, turns, 1) for path in photos]
        found = benchmark["measure"](rows, benchmark[stack](), 0)
        assert found["rows_per_second"] > 0 and len(found["shares"]) == steps
        assert 0.5 < sum(found["shares"].values()) <= 1.01


@pytest.mark.parametrize(("square", "size", "grown"), [(0, (1, 3000), "28 x 84,000"), (1, (3, 3000), "3,000 x 3,000")])
def test_an_image_so_thin_that_resizing_would_fill_the_memory_is_named(tmp_path, square, size, grown):
    processor = make_processor("vicuna_v1")
    processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.pad_to_square = square
    Image.new("RGB", size).save(tmp_path / "thin.png")
    row = make_row(turn("a", "b", images=1), [str(tmp_path / "thin.png")])
    with pytest.raises(
        RowError, match=rf"row s/0: the image .*thin.png has {size[0]} x 3,000 .* {grown}, more than the 1,000,000"
    ):
        MultimodalCollator(processor, max_pixels=1_000_000)([row])
    assert MultimodalCollator(processor, max_pixels=100_000_000)([row])["pixel_values"].shape == (1, 3, 28, 28)
