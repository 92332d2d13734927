"""Ids, masks and pixels of existing VLMs: equal to what the model's own processor makes of the same conversation."""

from __future__ import annotations

import random

import pytest
import torch
from PIL import Image

from support.tiny_families import ALL, CHECKED, EVERY, processor_of, rows
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.base.names import IGNORED
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.families.processor import FamilyProcessor, expand
from vlm_sft.templates.render import RenderedChat

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
        "gemma3": "<end_of_turn>", "idefics3": "<end_of_utterance>", "smolvlm": "<end_of_utterance>",
        "aya_vision": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "gemma4": "<turn|>", "exaone4_5": "<|endofturn|>",
        "idefics2": "<end_of_utterance>", "hunyuan_vl": "<｜hy_Assistant｜>", "ernie4_5_vl_moe": "<|end_of_sentence|>",
        "mllama": "<|eot_id|>", **dict.fromkeys(("granite4_vision", "granite_docling"), "<|end_of_text|>"),
        **dict.fromkeys(("vipllava", "llava_next_video", "video_llava", "paddleocr_vl", "deepseek_ocr2"),
                        "</s>"),
        "mistral3": "</s>", "pixtral": "</s>", "llama4": "<|eot|>", "perception_lm": "<|eot_id|>",
        "gemma3n": "<end_of_turn>", "cohere2_vision": "<|END_OF_TURN_TOKEN|>",
        **dict.fromkeys(("glm4v", "glm46v"), "<|user|>"),
        **dict.fromkeys(("deepseek_vl", "deepseek_vl_hybrid", "janus"), "<｜end▁of▁sentence｜>")}  # fmt: skip


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
    elif name == "idefics2":  # frames an image by itself
        text = text.replace("<fake_token_around_image>", "").replace("<image> ", "<image>")
        options = {"add_special_tokens": False}
    else:  # as its `apply_chat_template` does: a template that writes BOS gets no second one
        bos = processor.tokenizer.bos_token
        options = {"add_special_tokens": not (bos and text.startswith(bos))}
    return dict(processor.native(images=[image], text=[text], return_tensors="pt", **options))


@pytest.mark.parametrize("name", ALL)
def test_ids_and_pixels_are_those_of_the_models_own_processor(name):
    processor = processor_of(name)
    for size in SIZES:
        image = picture(size)
        given = native_batch(name, processor, TURN, image)
        ours = {**processor.batch([processor.encode_chat(TURN, sizes=[size])]), **processor.image_inputs([image])}
        given.pop("cross_attention_mask", None)  # made by the model, see `test_mllama`
        given.pop("token_type_ids", None) if "token_type_ids" not in ours else None  # of the tokenizer, for nobody
        assert set(given) <= set(ours)
        assert all(torch.equal(ours[key], torch.as_tensor(tensor).to(ours[key])) for key, tensor in given.items())


@pytest.mark.parametrize("name", ALL)
def test_the_loss_is_on_the_answers_and_their_ends_alone(name):
    processor = processor_of(name)
    messages = [*TURN, user("Why?"), assistant("那是 3")]
    chat = processor.encode_chat(messages, sizes=SIZES[:1])
    learned = [i for i, label in zip(chat.input_ids, chat.labels, strict=True) if label != IGNORED]
    end = ENDS.get(name, "<|im_end|>")
    assert processor.tokenizer.decode(learned).replace(" ", "").replace("\n", "") == f"ared3{end}那是3{end}"
    assert len(chat.places) == len(chat.input_ids) and sum(chat.places) == processor.count_image_tokens(SIZES[0])
    assert all(label == IGNORED for place, label in zip(chat.places, chat.labels, strict=True) if place)
    assert processor.end_of_answer.strip() == end


@pytest.mark.parametrize("name", EVERY)
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


# Options of the models' own processors: how many tokens an image becomes changes, not always as their arithmetic says.
PIXELS = [{"min_pixels": 256, "max_pixels": 4096}, {"max_pixels": 40_000}, {"do_resize": False}]
TILES = [{"do_image_splitting": False}, {"size": {"longest_edge": 84}}]
OPTIONS = {
    "qwen2_5_vl": PIXELS, "qwen3_vl": PIXELS, "idefics3": TILES, "smolvlm": TILES,
    "internvl": [{"max_patches": 6}, {"min_patches": 2, "max_patches": 3}, {"crop_to_patches": False}],
    "llava_next": [{"image_grid_pinpoints": [[28, 56], [84, 28]]}],
    "gemma3": [{"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8}],
}  # fmt: skip
DRAWN = random.Random(0)
MANY = [(1, 1), (28, 28), (29, 28), (28, 57), (84, 56), (1, 100), (600, 3), (96, 64)]
MANY += [(DRAWN.randint(1, most), DRAWN.randint(1, most)) for most in (60, 300, 1200) for _ in range(20)]


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in CHECKED for options in ({}, *OPTIONS.get(name, []))], ids=str
)
def test_what_stands_for_an_image_is_what_the_models_own_processor_writes(name, options):
    processor = processor_of(name, **options)
    for size in MANY[:: 1 if processor.reads_sizes else 9]:
        if name in ("kosmos-2", "idefics2"):  # their own write it where they read the text, and look at no size
            wanted = processor.expansion((1, 1))
        else:
            try:
                wanted = processor._read([Image.new("RGB", size)])[1][0]
            except (ValueError, RuntimeError):
                with pytest.raises(RowError):
                    processor.expansion(size)
                continue
        assert processor.expansion(size) == wanted, size


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "smolvlm", "llava_next"])
def test_no_picture_is_made_where_the_models_own_classes_can_count(name, monkeypatch):
    processor = processor_of(name)
    monkeypatch.setattr(Image, "new", None)
    monkeypatch.setattr(processor.native, "_process_images", None)
    assert processor.count_image_tokens((123, 77)) > 0


def test_an_option_that_the_arithmetic_does_not_know_is_seen_and_pictures_are_asked():
    class Padded(type(processor_of("llava_next").native)):
        def replace_image_token(self, *given, **options):
            return super().replace_image_token(*given, **options) + self.image_token

    plain = processor_of("llava_next")
    plain.native.__class__ = Padded
    own = FamilyProcessor(
        plain.image_processor, plain.tokenizer, plain.chat_template, plain.native, plain.family, plain.image_token_id
    )
    assert own.count_image_tokens((40, 30)) == plain.count_image_tokens((40, 30)) + 1


def test_sizes_are_remembered_but_not_for_ever():
    processor = processor_of("qwen2_5_vl")
    first = processor.expansion((8, 8))
    for width in range(1, 400):
        processor.expansion((width + 8, 16))
    assert len(processor._expansions) <= 256 and processor.expansion((8, 8)) == first


def test_an_image_that_the_models_own_processor_refuses_is_a_row_that_is_named():
    with pytest.raises(RowError, match=r"an image of 2,000 x 2 pixels is refused by .*aspect ratio.* 200.*: cut it or"):
        processor_of("qwen3_vl").expansion((2000, 2))
    collator = MultimodalCollator(processor_of("qwen3_vl"))
    with pytest.raises(RowError, match="row 0: an image of 2,000 x 2 pixels") as error:
        collator(rows((2000, 2)))
    assert error.value.reason == "image too large"


@pytest.mark.parametrize(("name", "grown"), [("llava", (28, 84_000)), ("qwen2_5_vl", (1, 3000)), ("gemma3", (1, 3000))])
def test_it_says_what_it_needs_of_a_picture(name, grown):
    processor = processor_of(name)
    assert processor.needed_side is None, "its own processor may need every pixel"
    assert processor.grown_size((1, 3000)) == grown


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


@pytest.mark.parametrize("name", [name for name in CHECKED if name not in ("gemma3", "mllama")])
def test_an_image_of_an_existing_model_is_as_many_tokens_as_the_limit_says(name, monkeypatch):
    monkeypatch.setenv("VLM_SFT_LIMITS", "image_tokens=1")
    with pytest.raises(UserError, match=r"an image becomes [\d,]+ tokens, but `limits\.image_tokens` is 1; let the"):
        processor_of(name)


@pytest.mark.parametrize("name", ["paddleocr_vl", "ernie4_5_vl_moe", "hunyuan_vl", "video_llama_3"])
def test_published_bounds_that_are_numbers_of_pixels_are_taken(name):
    processor = processor_of(name, size={"shortest_edge": 12_544, "longest_edge": 4_842_768})
    assert processor.count_image_tokens((641, 480)) > processor_of(name).count_image_tokens((641, 480))


def test_the_published_bounds_of_glm_are_numbers_of_pixels_and_boxes_lie_on_the_whole_picture():
    processor = processor_of("glm4v", size={"shortest_edge": 12_544, "longest_edge": 9_633_792})
    assert processor.seen((641, 480)).size == (641, 480)
    with pytest.raises(UserError, match=r"longest_edge: 99,000,000; no model has more than"):
        processor_of("glm4v", size={"shortest_edge": 12_544, "longest_edge": 99_000_000})
