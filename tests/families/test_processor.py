"""Ids, masks and pixels of existing VLMs: equal to what the model's own processor makes of the same conversation."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from support.tiny_families import TINY, processor_of
from vlm_sft.base.errors import UserError
from vlm_sft.base.names import IGNORED
from vlm_sft.families.processor import expand
from vlm_sft.templates.render import RenderedChat

FAMILIES = list(TINY)
SIZES = [(40, 30), (300, 60)]


def picture(size: tuple[int, int]) -> Image.Image:
    return Image.effect_noise(size, 90).convert("RGB")


def user(*parts: str) -> dict:
    content = [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


TURN = [user("<image>", "What is this?"), assistant("a red 3")]
# What each writes after an answer inside the loss.
ENDS = {"llava": "</s>", "llava_next": "</s>", "kosmos-2": "</s>", "paligemma": "<eos>", "fuyu": "|ENDOFTEXT|",
        "gemma3": "<end_of_turn>", "idefics3": "<end_of_utterance>", "smolvlm": "<end_of_utterance>"}  # fmt: skip


def native_batch(name: str, processor, messages: list[dict], image: Image.Image) -> dict:
    """What the model's own processor alone makes of a rendered conversation."""
    text, options = processor.render(messages).text, {}
    if name == "fuyu":  # its own call cannot read images without torchvision: its text is put together by hand
        text = text.replace("|SPEAKER|", processor.expansion(image.size))
        return dict(processor.tokenizer(text, add_special_tokens=False, return_tensors="pt"))
    if name == "paligemma":  # puts <bos> and the newline in by itself, and the answer behind
        text, answer = text.replace("<bos>", "").removesuffix("<eos>").split("\n")
        options = {"suffix": answer}
    elif name == "kosmos-2":  # puts <s> and the image at the head by itself
        text = text.replace("<s><image> ", "")
    else:  # as its `apply_chat_template` does: a template that writes BOS gets no second one
        bos = processor.tokenizer.bos_token
        options = {"add_special_tokens": not (bos and text.startswith(bos))}
    return dict(processor.native(images=[image], text=[text], return_tensors="pt", **options))


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_pixels_are_those_of_the_models_own_processor(name):
    processor = processor_of(name)
    for size in SIZES:
        image = picture(size)
        given = native_batch(name, processor, TURN, image)
        ours = {**processor.batch([processor.encode_chat(TURN, sizes=[size])]), **processor.image_inputs([image])}
        given.pop("token_type_ids", None) if "token_type_ids" not in ours else None  # of the tokenizer, for nobody
        assert set(given) <= set(ours)
        assert all(torch.equal(ours[key], torch.as_tensor(tensor)) for key, tensor in given.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_on_the_answers_and_their_ends_alone(name):
    processor = processor_of(name)
    messages = [*TURN, user("Why?"), assistant("那是 3")]
    chat = processor.encode_chat(messages, sizes=SIZES[:1])
    learned = [i for i, label in zip(chat.input_ids, chat.labels, strict=True) if label != IGNORED]
    end = ENDS.get(name, "<|im_end|>")
    assert processor.tokenizer.decode(learned).replace(" ", "") == f"ared3{end}那是3{end}"
    assert len(chat.places) == len(chat.input_ids) and sum(chat.places) == processor.count_image_tokens(SIZES[0])
    assert all(label == IGNORED for place, label in zip(chat.places, chat.labels, strict=True) if place)
    assert processor.end_of_answer.strip() == end


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_of_inference_is_the_beginning_of_training(name):
    processor = processor_of(name)
    whole = processor.encode_chat(TURN, sizes=SIZES)
    prompt = processor.encode_chat(TURN[:1], add_generation_prompt=True, sizes=SIZES)
    assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert whole.labels[len(prompt.input_ids)] != IGNORED and set(prompt.labels) == {IGNORED}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "fuyu"])
def test_a_typed_placeholder_is_text(name):
    processor = processor_of(name)
    typed = processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)
    chat = processor.encode_chat([user("<image>", f"what is {typed}?"), assistant(f"a {typed}")], sizes=SIZES)
    assert chat.input_ids.count(processor.image_token_id) == sum(chat.places) == processor.count_image_tokens(SIZES[0])


def test_several_images_keep_their_own_sizes():
    processor = processor_of("qwen2_5_vl")
    messages = [user("<image>", "and", "<image>", "?"), assistant("yes")]
    chat = processor.encode_chat(messages, sizes=SIZES)
    counts = [processor.count_image_tokens(size) for size in SIZES]
    assert sum(chat.places) == sum(counts) and counts[0] != counts[1]
    swapped = processor.encode_chat(messages, sizes=SIZES[::-1])
    assert swapped.places != chat.places and sum(swapped.places) == sum(chat.places)
    with pytest.raises(UserError, match="has places for 2 images, but the sizes of 1 are given"):
        processor.encode_chat(messages, sizes=SIZES[:1])


def test_expansion_moves_the_spans_along():
    chat = RenderedChat("a<i>b<i>cde", [(4, 5), (9, 11)], [(1, 4), (5, 8)])
    moved = expand(chat, ["XXXX", ""])
    assert moved.text == "aXXXXbcde"
    assert [moved.text[a:b] for a, b in moved.spans] == ["b", "de"]
    assert [moved.text[a:b] for a, b in moved.image_spans] == ["XXXX", ""]


def test_paligemma_reads_its_prompt_both_ways_and_what_follows_one_way():
    processor = processor_of("paligemma")
    chat = processor.encode_chat([*TURN, user("Why?"), assistant("so")])
    column = processor.batch([chat], multiple_of=8)["token_type_ids"][0].tolist()
    first = next(i for i, label in enumerate(chat.labels) if label != IGNORED)
    assert column[: len(chat.labels)] == [0] * first + [1] * (len(chat.labels) - first)
    assert processor.batch([chat], side="left", multiple_of=8)["token_type_ids"].shape[1] % 8 == 0


@pytest.mark.parametrize("name", ["smolvlm", "qwen3_vl"])
def test_what_is_saved_gives_the_same_ids(name, tmp_path):
    processor = processor_of(name)
    processor.save_pretrained(tmp_path)
    again = processor_of(name, tmp_path)
    assert again.encode_chat(TURN, sizes=SIZES) == processor.encode_chat(TURN, sizes=SIZES)
    assert (tmp_path / "chat_template.jinja").read_text() == processor.chat_template
