"""Rows to batches: labels, truncation by whole turns, and the sentences on rows that cannot be trained on."""

from __future__ import annotations

import functools
import json
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
from support.tiny_families import CHECKED, encoded, processor_of
from support.tiny_pieces import TOKENIZERS, tokenizer_of
from vlm_sft.base.assets import list_templates
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.batch.collator import REJECTED, MultimodalCollator
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


@functools.cache
def processor_for(template, kind):
    return make_processor(template, tokenizer_of(kind))


def fitted_plainly(processor, messages, max_length, sizes=()):
    """Turns dropped from the end one by one, all rendered and tokenised anew; (ids, messages kept), or None."""
    kept = len(messages)
    while True:
        chat = processor.encode_chat(messages[:kept], sizes=sizes)
        if len(chat.input_ids) <= max_length:
            return chat, kept
        kept = max((n for n in range(1, kept) if messages[n - 1]["role"] == "assistant"), default=0)
        if not kept:
            return None


@st.composite
def long_conversations(draw):
    messages = [{"role": "system", "content": [{"type": "text", "text": draw(SAID)}]}] * draw(st.integers(0, 1))
    for _ in range(draw(st.integers(1, 9))):
        messages += turn(draw(SAID), draw(SAID), draw(st.sampled_from([0, 0, 1, 2])))
    return messages[: len(messages) - draw(st.integers(0, 1))]  # a last question may have no answer


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(
    messages=long_conversations().filter(lambda messages: messages[-1]["role"] == "assistant" or len(messages) > 2),
    template=st.sampled_from(list_templates()),
    max_length=st.integers(1, 400),
    system=st.none() | SAID,
)
def test_the_turns_that_stay_are_those_that_dropping_one_by_one_leaves(kind, messages, template, max_length, system):
    processor = processor_for(template, kind)
    processor.system = system
    marks = sum(part["type"] == "image" for message in messages for part in message["content"])
    row = {"messages": messages, "images": [{"path": "unread.png"}] * marks, "source": "s", "id": "s/7"}
    wanted = fitted_plainly(processor, messages, max_length)
    collator = MultimodalCollator(processor, max_length=max_length)
    if wanted is None:
        first = next(n for n, message in enumerate(messages, 1) if message["role"] == "assistant" or n == len(messages))
        tokens = len(processor.encode_chat(messages[:first]).input_ids)
        with pytest.raises(RowError, match=f"its first turn alone has {tokens} tokens") as error:
            collator.encode(row, with_images=False)
        assert error.value.reason == "too long"
        return
    if not any(label != -100 for label in wanted[0].labels):
        with pytest.raises(RowError, match="no token would be in the loss"):
            collator.encode(row, with_images=False)
        return
    sample = collator.encode(row, with_images=False)
    assert (sample.chat, sample.turns_lost) == (wanted[0], (len(messages) - wanted[1] + 1) // 2)


@pytest.mark.parametrize("name", CHECKED)
@settings(max_examples=15, deadline=None)
@given(messages=long_conversations(), max_length=st.integers(20, 600))
def test_an_existing_models_turns_stay_likewise(name, messages, max_length):
    messages = [m for m in messages if m["role"] != "system"]
    messages = messages[: len(messages) // 2 * 2] or turn("a", "b")
    processor, picture = processor_of(name), encoded((90, 40))
    marks = sum(part["type"] == "image" for message in messages for part in message["content"])
    row = {"messages": messages, "images": [{"path": None, "bytes": picture}] * marks, "source": "s", "id": "s/7"}
    wanted = fitted_plainly(processor, messages, max_length, [(90, 40)] * marks)
    collator = MultimodalCollator(processor, max_length=max_length)
    if wanted is None:
        with pytest.raises(RowError, match="its first turn alone"):
            collator.encode(row, with_images=False)
    else:
        sample = collator.encode(row, with_images=False)
        assert (sample.chat, sample.turns_lost) == (wanted[0], (len(messages) - wanted[1]) // 2)


THINKING = """{%- for m in messages -%}
{%- if m['role'] == 'user' -%}
{%- for p in m['content'] -%}{{ image_token if p['type'] == 'image' else p['text'] }}{%- endfor -%}
{%- else -%}
{%- generation -%}{{ m['content'][0]['text'] if loop.last else '…' }}{{ eos_token }}{%- endgeneration -%}
{%- endif -%}{%- endfor -%}
"""


@settings(max_examples=15, deadline=None)
@given(answers=st.lists(st.integers(1, 60), min_size=1, max_size=8), max_length=st.integers(5, 120))
def test_a_template_that_shortens_earlier_turns_loses_no_turn_for_nothing(answers, max_length):
    processor = processor_for(THINKING, "bytes")
    messages = [message for length in answers for message in turn("想", "x" * length)]
    wanted = fitted_plainly(processor, messages, max_length)
    collator = MultimodalCollator(processor, max_length=max_length)
    row = {"messages": messages, "images": [], "source": "s", "id": "s/7"}
    if wanted is None:
        with pytest.raises(RowError, match="its first turn alone"):
            collator.encode(row, with_images=False)
    else:
        assert collator.encode(row, with_images=False).chat == wanted[0]


def test_a_long_conversation_is_tokenised_three_times_at_most(monkeypatch):
    processor = processor_for("ziya", "bytes")
    messages = [message for number in range(40) for message in turn(f"这是第几个？{number}", f"第{number}个")]
    row = {"messages": messages, "images": [], "source": "s", "id": "s/7"}
    limit = len(processor.encode_chat(messages[:14]).input_ids) + 3
    encode, encoded_chats = processor.encode_rendered, []
    monkeypatch.setattr(processor, "encode_rendered", lambda *a: encoded_chats.append(a) or encode(*a))
    assert MultimodalCollator(processor, max_length=limit).encode(row).turns_lost == 33
    assert len(encoded_chats) == 3


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

    monkeypatch.setattr("vlm_sft.batch.pictures.load_image", counted)
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


# ---------------------------------------------------------------------------------- what rows say beyond their features


def with_extras(row, **said):
    """The row as a dataset gives it: what it says beyond the features is in a column of its own."""
    return {**row, "extras": json.dumps({"messages": {}, "images": {}, **said})}


@pytest.mark.parametrize("template", ["vicuna_v1", "qwen2_5_vl", "ziya", "minigpt4"])
def test_an_answer_that_is_not_learned_has_the_same_tokens_and_no_label(template, photos):
    collator = MultimodalCollator(make_processor(template))
    row = make_row(turn("这是什么？", "一只猫。", images=1) + turn("hello", "hi there") + turn("a", "b"), photos)
    whole, less = collator([row]), collator([with_extras(row, messages={"3": {"loss": False}})])
    assert torch.equal(whole["input_ids"], less["input_ids"])
    only = [collator([with_extras(row, messages={str(k): {"loss": False} for k in (1, 3, 5) if k != answer})])
            for answer in (1, 3, 5)]  # fmt: skip
    learned = [batch["labels"] != -100 for batch in (*only, less, whole)]
    assert torch.equal(learned[0] | learned[2], learned[3]) and torch.equal(learned[3] | learned[1], learned[4])
    assert not (learned[0] & learned[1]).any() and all(mask.any() for mask in learned)
    assert (less["labels"][learned[3]] == less["input_ids"][learned[3]]).all()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_a_family_leaves_an_answer_out_as_well(name, photos):
    collator = MultimodalCollator(processor_of(name))
    row = make_row(turn("这是什么？", "一只猫。", images=1) + turn("hello", "hi there"), photos)
    whole, less = collator([row]), collator([with_extras(row, messages={"1": {"loss": False}})])
    assert torch.equal(whole["input_ids"], less["input_ids"])
    kept = less["labels"] != -100
    assert kept.any() and kept.sum() < (whole["labels"] != -100).sum()
    assert torch.equal(whole["labels"][kept], less["labels"][kept])


def test_a_row_in_which_nothing_is_learned_is_the_known_error(processor, photos):
    row = make_row(turn("a", "b") + turn("c", "d"), photos)
    silent = with_extras(row, messages={"1": {"loss": False}, "3": {"loss": False}})
    with pytest.raises(RowError, match="row s/0: no token would be in the loss") as error:
        MultimodalCollator(processor)([silent])
    assert error.value.reason == "no answer"


def test_a_long_row_is_cut_as_if_all_were_learned(processor, photos):
    row = make_row(turn("a", "b " * 20) + turn("c", "d " * 20) + turn("e", "f " * 20), photos)
    collator = MultimodalCollator(processor, max_length=230)
    whole, less = collator.encode(row), collator.encode(with_extras(row, messages={"1": {"loss": False}}))
    assert whole.turns_lost == less.turns_lost > 0 and whole.chat.input_ids == less.chat.input_ids


def test_sizes_change_the_tokens_of_a_family_that_reads_them(photos):
    row = make_row(turn("这是什么？", "一只猫。", images=1), photos)
    collator = MultimodalCollator(processor_of("qwen2_5_vl"))
    sizes = [
        collator.encode(each)
        for each in (row, with_extras(row, images={"0": {"resized_width": 280, "resized_height": 56}}))
    ]
    assert sizes[1].images[0].size == (280, 56) != sizes[0].images[0].size
    assert len(sizes[1].chat.input_ids) != len(sizes[0].chat.input_ids)
    batch = collator([with_extras(row, images={"0": {"resized_width": 280, "resized_height": 56}})])
    places = sum(sizes[1].chat.places)
    assert int(batch["image_grid_thw"].prod()) == 4 * places


def test_one_picture_in_two_sizes_is_two_pictures(processor, photos):
    collator, image = MultimodalCollator(processor, reduce=False), {"path": photos[0], "bytes": None}
    collator._decoded = {}
    whole, small = collator.decode(image, "row 1"), collator.decode({**image, "max_pixels": 4}, "row 1")
    assert whole.width * whole.height > 4 >= small.width * small.height
    assert collator.decode(image, "row 1") is whole


def test_a_collator_of_someone_gets_the_switches_at_the_messages(processor, photos):
    class Own(MultimodalCollator):
        def encode(self, row, with_images=True):
            seen.append([message.get("loss") for message in row["messages"]])
            return super().encode(row, with_images)

    seen: list = []
    row = make_row(turn("a", "b") + turn("c", "d"), photos)
    Own(processor)([with_extras(row, messages={"1": {"loss": False}}), row])
    assert seen == [[None, False, None, None], [None] * 4]
