"""Text to ids: the mask is the answers, whatever is said, wherever the images stand, however the tokenizer merges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from support.conversations import PROCESSORS, TOKENS, conversations, make_processor
from support.tiny_pieces import make_tokenizer
from vlm_sft.base.errors import UserError
from vlm_sft.batch.encoding import EncodedChat
from vlm_sft.batch.pictures import pad_to_square
from vlm_sft.batch.processor import VLMProcessor
from vlm_sft.templates.render import render


@settings(max_examples=150, deadline=None)
@given(messages=conversations(), name=st.sampled_from(sorted(PROCESSORS)))
def test_the_supervised_ids_are_the_answers_and_nothing_else(messages, name):
    processor = PROCESSORS[name]
    rendered, chat = processor.render(messages), processor.encode_chat(messages)
    assert len(chat.input_ids) == len(chat.labels)
    assert all(label in (-100, token) for token, label in zip(chat.input_ids, chat.labels, strict=True))
    learned = [label for label in chat.labels if label != -100]
    assert not {processor.image_token_id, processor.tokenizer.pad_token_id} & set(learned)
    wanted = "".join(rendered.text[a:b] for a, b in rendered.spans)
    got = processor.tokenizer.decode(learned, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert got == wanted


@settings(max_examples=100, deadline=None)
@given(messages=conversations(), name=st.sampled_from(sorted(PROCESSORS)))
def test_every_image_becomes_its_tokens_and_moves_no_label(messages, name):
    processor = PROCESSORS[name]
    rendered, chat = processor.render(messages), processor.encode_chat(messages)
    assert chat.num_images == len(rendered.image_spans)
    assert chat.input_ids.count(processor.image_token_id) == TOKENS * chat.num_images
    processor.num_image_tokens = 7
    longer = processor.encode_chat(messages)
    processor.num_image_tokens = TOKENS
    strip = [(i, n) for i, n in zip(chat.input_ids, chat.labels, strict=True) if i != processor.image_token_id]
    same = [(i, n) for i, n in zip(longer.input_ids, longer.labels, strict=True) if i != processor.image_token_id]
    assert strip == same


@settings(max_examples=100, deadline=None)
@given(messages=conversations(), name=st.sampled_from(sorted(PROCESSORS)))
def test_the_prompt_of_inference_is_a_prefix_of_training(messages, name):
    processor = PROCESSORS[name]
    prompt = processor.encode_chat(messages[:-1], add_generation_prompt=True)
    whole = processor.encode_chat(messages)
    assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    first_new = len(prompt.input_ids)
    assert whole.labels[first_new] != -100
    assert whole.labels[:first_new].count(-100) + sum(n != -100 for n in whole.labels[:first_new]) == first_new


def test_bos_comes_once_and_where_the_template_wants_it():
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many?"}]},
        {"role": "assistant", "content": "two"},
    ]
    ids = make_processor("vicuna_v1").encode_chat(messages).input_ids
    assert ids[0] == 1 and ids.count(1) == 1
    processor = make_processor("blip2_vqa")  # [queries][BOS]text
    ids = processor.encode_chat(messages).input_ids
    assert ids[: TOKENS + 1] == [processor.image_token_id] * TOKENS + [1] and ids.count(1) == 1
    plain = make_tokenizer()
    plain.backend_tokenizer.post_processor = None
    from tokenizers.processors import ByteLevel

    plain.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    assert 1 not in make_processor("vicuna_v1", plain).encode_chat(messages).input_ids


def test_batches_are_padded_on_the_side_that_is_asked_for():
    processor = make_processor()
    rows = [EncodedChat([5, 6, 7], [-100, 6, 7], 0), EncodedChat([8], [-100], 0)]
    pad = processor.tokenizer.pad_token_id
    right, left = processor.batch(rows), processor.batch(rows, side="left", multiple_of=4)
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, pad, pad]]
    assert right["labels"].tolist()[1] == [-100] * 3 and right["attention_mask"].tolist()[1] == [1, 0, 0]
    assert left["input_ids"].tolist() == [[pad, 5, 6, 7], [pad, pad, pad, 8]]


def test_squares_are_padded_with_the_mean_colour():
    square = pad_to_square(Image.new("RGB", (4, 2), (255, 0, 0)), [0.5, 0.5, 0.5])
    assert square.size == (4, 4)
    assert square.getpixel((0, 0)) == (127, 127, 127) and square.getpixel((0, 1)) == (255, 0, 0)
    processor = make_processor(pad_to_square=True)
    assert processor.encode_images([Image.new("RGB", (40, 20))]).shape == (1, 3, 28, 28)
    assert processor.encode_images([]) is None


def test_it_says_what_it_needs_of_a_picture():
    processor = make_processor(pad_to_square=True)
    assert processor.needed_side == 28 and processor.grown_size((3, 3000)) == (3000, 3000)


def test_it_is_a_processor_like_others(tmp_path):
    processor = make_processor("ziya", system="你好")
    inputs = processor(text="<image>这是什么？", images=Image.new("RGB", (30, 30)), return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == TOKENS
    assert inputs["pixel_values"].shape == (1, 3, 28, 28)
    processor.save_pretrained(tmp_path)
    again = VLMProcessor.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "一只猫"}]
    assert again.encode_chat(messages) == processor.encode_chat(messages)
    assert (again.system, again.num_image_tokens, again.chat_template) == ("你好", TOKENS, processor.chat_template)
    assert torch.equal(again.encode_images([Image.new("RGB", (9, 9), "red")]),
                       processor.encode_images([Image.new("RGB", (9, 9), "red")]))  # fmt: skip


def test_errors_say_what_to_do():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match=r"slow one.*tokenizer.json"):
        VLMProcessor(None, Slow())
    processor = make_processor()
    processor.chat_template = None
    with pytest.raises(UserError, match="set chat_template in the recipe"):
        processor.encode_chat([{"role": "user", "content": "x"}])


def test_renders_are_those_of_render_chat():
    messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a dog"}]
    processor = make_processor("plain")
    assert processor.render(messages) == render(messages, "plain", bos_token="<s>", eos_token="</s>")
