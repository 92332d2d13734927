"""KOSMOS-2's frame: two tokens around places at ids of their own."""

from __future__ import annotations

from PIL import Image

from support.tiny_families import processor_of


def test_an_image_is_a_frame_around_latent_queries():
    processor = processor_of("kosmos-2")
    question = [{"type": "image"}, {"type": "text", "text": "这是什么？"}]
    chat = processor.encode_chat([{"role": "user", "content": question}, {"role": "assistant", "content": "一只猫"}])
    first, last = chat.places.index(1), len(chat.places) - chat.places[::-1].index(1)
    queries = processor.native.num_image_tokens
    assert last - first == sum(chat.places) == queries
    frame = [chat.input_ids[first - 1], chat.input_ids[last]]
    assert processor.tokenizer.convert_ids_to_tokens(frame) == [processor.native.boi_token, processor.native.eoi_token]
    unknown = processor.tokenizer.unk_token_id
    assert chat.input_ids[first:last] == list(range(unknown + 1, unknown + 1 + queries))
    assert processor.ids_per_image == chat.input_ids.count(processor.image_token_id) == 1


def test_text_alone_has_no_image_inputs():
    processor = processor_of("kosmos-2")
    assert processor.image_inputs([]) == {}
    assert processor.image_inputs([Image.new("RGB", (40, 30))] * 2)["pixel_values"].shape[0] == 2
