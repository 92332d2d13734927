"""Boxes in a batch: moved with the picture as the model's own processor moves it, and written as real tokens."""

from __future__ import annotations

import io
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from transformers import BlipImageProcessorPil, CLIPImageProcessorPil, ConvNextImageProcessorPil

from support.conversations import make_processor
from support.tiny_families import processor_of
from support.tiny_pieces import make_tokenizer
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.base.names import IGNORED
from vlm_sft.batch.box_text import Seen, seen_through, write_boxes
from vlm_sft.batch.collator import MultimodalCollator
from vlm_sft.batch.processor import VLMProcessor
from vlm_sft.rows.messages import box_part
from vlm_sft.templates.notations import NOTATIONS
from vlm_sft.templates.template import load_template


def picture(size: tuple[int, int], **options) -> dict:
    stream = io.BytesIO()
    Image.new("RGB", size, "white").save(stream, "PNG")
    return {"path": None, "bytes": stream.getvalue(), **options}


def row(*parts: dict, question: str = "猫在哪？", size: tuple[int, int] = (200, 100), **options) -> dict:
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return {"messages": [asked, {"role": "assistant", "content": list(parts)}], "images": [picture(size, **options)],
            "source": "s", "id": "s/1"}  # fmt: skip


def box(*numbers: float, scale: str = "pixels", image: int = 0) -> dict:
    return box_part(numbers, scale, image, "objects.bbox[0]")


CAT = {"type": "ref", "text": "猫"}


def said(processor: VLMProcessor, given: dict) -> str:
    """What is learned of a row: the same ids whether its pictures are decoded or only measured."""
    collator = MultimodalCollator(processor)
    chat = collator.encode(given).chat
    assert chat.input_ids == collator.encode(given, with_images=False).chat.input_ids
    return processor.tokenizer.decode([token for token in chat.labels if token != IGNORED]).strip()


def clip(size: int = 28, crop: tuple[int, int] | None = None, **options) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size=dict(zip(("height", "width"), crop or (size, size), strict=True)),
        **options,
    )


def stack(image_processor, **options) -> VLMProcessor:
    return VLMProcessor(image_processor, make_tokenizer(), load_template("vicuna_v1"), 3, **options)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("size", [(200, 100), (33, 97), (640, 31), (8, 8), (1000, 999)])
def test_qwen_boxes_are_in_the_grid_that_its_own_processor_gives(family, size):
    processor = processor_of(family)
    wanted = [0.11, 0.07, 0.83, 0.91]
    written = said(processor, row(CAT, box(*wanted, scale="unit"), size=size))
    numbers = json.loads(written.split("<|im_end|>")[0])["bbox_2d"]
    (_, high, wide), patch = processor.image_inputs([Image.new("RGB", size)])["image_grid_thw"][0].tolist(), 4
    assert processor.image_processor.patch_size == patch
    steps = (wide * patch, high * patch) if family == "qwen2_5_vl" else (1000, 1000)
    for i, number in enumerate(numbers):
        assert abs(number - wanted[i] * steps[i % 2]) <= 0.5


def test_qwen_boxes_follow_the_bounds_of_the_processor_and_of_the_row():
    size, wanted = (400, 200), [0.25, 0.25, 0.75, 0.75]
    fewer = processor_of("qwen2_5_vl", min_pixels=64, max_pixels=256)
    for processor, options in ((fewer, {}), (processor_of("qwen2_5_vl"), {"resized_width": 40, "resized_height": 32})):
        given = row(box(*wanted, scale="unit"), size=size, **options)
        numbers = json.loads(said(processor, given).split("<|im_end|>")[0])
        image = MultimodalCollator(processor).encode(given).images[0]
        high, wide = (4 * n for n in processor.image_inputs([image])["image_grid_thw"][0].tolist()[1:])
        assert numbers == [round(n * (wide, high)[i % 2]) for i, n in enumerate(wanted)]
    pixels = row(box(100, 50, 300, 150), size=size, resized_width=40, resized_height=32)  # of the file, not of 40 x 32
    assert said(processor_of("qwen2_5_vl"), pixels) == said(processor_of("qwen2_5_vl"), given)


def seen_of(image_processor, size, square=False):
    """Where a dark half of a picture ends in what an image processor makes of it, in each direction."""
    found = []
    for axis in (0, 1):
        image = Image.new("RGB", size, "white")
        middle = [size[0] // 2, size[1]] if axis == 0 else [size[0], size[1] // 2]
        ImageDraw.Draw(image).rectangle([0, 0, middle[0] - 1, middle[1] - 1], fill="black")
        pixels = stack(image_processor, pad_to_square=square).encode_images([image])[0][0]
        line = pixels[pixels.shape[0] // 2] if axis == 0 else pixels[:, pixels.shape[1] // 2]
        dark = line < line.min() + (line.max() - line.min()) / 4  # the ground of a square is grey
        found.append(int(dark.nonzero()[-1]) + 1 if dark.any() else 0)
    return found


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("size", [(300, 200), (120, 300), (64, 64)])
def test_a_tower_that_pads_or_crops_moves_the_boxes_with_the_picture(size, square):
    for image_processor in (
        BlipImageProcessorPil(size={"height": 224, "width": 336}),
        clip(224),
        clip(256, (224, 224)),
    ):
        seen = seen_through(image_processor, size, square)
        half = seen.place([0.0, 0.0, 0.5, 0.5])
        edges = [half[2] * seen.size[0], half[3] * seen.size[1]]
        for edge, dark in zip(edges, seen_of(image_processor, size, square), strict=True):
            assert abs(edge - dark) <= 2.0


def test_expand2square_and_a_crop_in_numbers():
    padded = make_processor(pad_to_square=True)
    assert said(padded, row(box(20, 10, 120, 60))).startswith("[0.100,0.300,0.600,0.550]")
    assert said(stack(clip()), row(box(50, 0, 100, 100))).startswith("[0.000,0.000,0.500,1.000]")
    assert said(stack(clip()), row(box(0, 0, 100, 100))).startswith("[0.000,0.000,0.500,1.000]")  # cut at the border


def test_a_box_that_the_crop_loses_is_the_rows_error():
    with pytest.raises(RowError, match=r'row s/1: "objects.bbox\[0\]" lies where the model does not see') as error:
        MultimodalCollator(stack(clip())).encode(row(box(0, 0, 40, 100)))
    assert error.value.reason == "box not seen"
    with pytest.raises(RowError, match="lies where the model does not see"):
        MultimodalCollator(stack(clip())).encode(row(box(10, 50)))


SIDES = st.integers(20, 900)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(SIDES, SIDES),
    found=st.tuples(*[st.floats(0, 0.5)] * 2, *[st.floats(0.501, 1)] * 2),
    square=st.booleans(),
    crop=st.sampled_from([None, (224, 224), (200, 240)]),
)
def test_what_is_seen_of_a_box_is_moved_back_to_it(size, found, square, crop):
    seen = seen_through(clip(224, crop), size, square)
    placed = seen.place(found)
    assert placed is not None and all(0 <= number <= 1 for number in placed)  # the centre is always seen
    starts, ends = (seen.left, seen.top), (seen.right, seen.bottom)
    back = [(n * seen.size[i % 2] - starts[i % 2]) / (ends[i % 2] - starts[i % 2]) for i, n in enumerate(placed)]
    for i, number in enumerate(found):
        low, high = (
            -starts[i % 2] / (ends[i % 2] - starts[i % 2]),
            (seen.size[i % 2] - starts[i % 2]) / (ends[i % 2] - starts[i % 2]),
        )
        assert back[i] == pytest.approx(min(max(number, low), high), abs=1e-9)


def test_an_image_processor_that_does_something_else_is_refused():
    with pytest.raises(UserError, match="Boxes cannot be moved with the pictures of the image processor ConvNext"):
        stack(ConvNextImageProcessorPil(size={"shortest_edge": 112}, crop_pct=0.5)).notation  # noqa: B018
    for fine in (clip(224), BlipImageProcessorPil(size={"height": 28, "width": 28})):
        for square in (False, True):
            assert stack(fine, pad_to_square=square).notation is NOTATIONS["shikra"]


@pytest.mark.parametrize(
    ("family", "pattern"), [("paligemma", r"<loc\d{4}>"), ("kosmos-2", r"</?object>|<patch_index_\d{4}>|</?phrase>")]
)
def test_locations_are_real_tokens_where_they_are_written_and_text_where_they_are_asked(family, pattern):
    processor = processor_of(family)
    typed = "<loc0005>" if family == "paligemma" else "<patch_index_0001>"
    given = row(CAT, box(20, 10, 120, 60), question=f"what is {typed}?")
    chat = MultimodalCollator(processor).encode(given).chat
    tokens = processor.tokenizer.convert_ids_to_tokens(chat.input_ids)
    learned = processor.tokenizer.convert_ids_to_tokens([t for t in chat.labels if t != IGNORED])
    written = [token for token in learned if re.fullmatch(pattern, token)]
    assert len(written) == (4 if family == "paligemma" else 6)
    assert typed not in tokens[: tokens.index(written[0])]
    assert typed in processor.tokenizer.decode(chat.input_ids)
    given["messages"][0]["content"][1:] = [{"type": "text", "text": "what is "}, box(20, 10, 120, 60)]
    given["messages"][1]["content"] = [{"type": "text", "text": "cat"}]
    asked = processor.tokenizer.convert_ids_to_tokens(MultimodalCollator(processor).encode(given).chat.input_ids)
    assert len([token for token in asked if re.fullmatch(pattern, token)]) >= 4  # boxes of questions are tokens too


def test_control_tokens_in_the_words_of_a_box_stay_text():
    processor = processor_of("paligemma")
    end = processor.tokenizer.eos_token
    chat = MultimodalCollator(processor).encode(row({"type": "ref", "text": f"猫{end}"}, box(20, 10, 120, 60))).chat
    assert chat.labels.count(processor.tokenizer.eos_token_id) == 1
    assert f"猫{end}{end}" in processor.tokenizer.decode(chat.input_ids)


def test_a_notation_whose_tokens_are_not_there_is_refused():
    with pytest.raises(
        UserError, match="box_notation paligemma writes tokens like <loc0000>, which the tokenizer does"
    ):
        MultimodalCollator(make_processor(box_notation="paligemma")).encode(row(box(1, 2, 3, 4)))
    with pytest.raises(RowError, match="is a point, for which the notation paligemma has no way of writing"):
        MultimodalCollator(processor_of("paligemma")).encode(row(box(1, 2)))


def test_a_box_outside_its_picture_and_one_without_a_picture():
    for wrong, sentence in (
        (box(1, 2, 300, 4), "outside of its picture of 200 x 100"),
        (box(1, 2, 3, 4, image=1), "has 1"),
    ):
        with pytest.raises(RowError, match=sentence) as error:
            MultimodalCollator(make_processor()).encode(row(wrong))
        assert str(error.value).startswith('row s/1: "objects.bbox[0]" is')


def test_a_picture_that_cannot_be_read_is_named_once():
    given = {**row(box(1, 2, 3, 4)), "images": [{"path": "/nowhere/a.png", "bytes": None}]}
    with pytest.raises(RowError) as error:
        MultimodalCollator(make_processor()).encode(given)
    assert str(error.value).count("row s/1") == 1 and "a.png was not found" in str(error.value)
    with pytest.raises(RowError, match="row s/1: an image of 1 x 900 pixels is refused") as error:
        MultimodalCollator(processor_of("qwen2_5_vl")).encode(row(box(0, 1, 1, 4), size=(1, 900)))
    assert str(error.value).count("row s/1") == 1


def test_boxes_are_of_the_upright_picture():
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: 100 wide and 200 high once it is turned
    Image.new("RGB", (200, 100)).save(stream, "JPEG", exif=exif)
    given = {**row(box(10, 20, 90, 180)), "images": [{"path": None, "bytes": stream.getvalue()}]}
    assert said(make_processor(), given).startswith("[0.100,0.100,0.900,0.900]")


def test_a_row_without_boxes_is_handed_on_as_it_is():
    messages = row({"type": "text", "text": "a"})["messages"]
    assert write_boxes(make_processor(), messages, [], "row 1") is messages
    assert Seen.whole((10, 20)).place([0.25, 0.5]) == [0.25, 0.5]


def test_a_saved_processor_writes_as_before(tmp_path):
    processor = make_processor(box_notation="qwen_vl")
    before = said(processor, row(CAT, box(20, 10, 120, 60)))
    assert before.startswith("<ref>猫</ref><box>(100,100),(600,600)</box>")
    processor.save_pretrained(tmp_path)
    assert said(VLMProcessor.from_pretrained(tmp_path), row(CAT, box(20, 10, 120, 60))) == before


def test_a_family_of_which_every_picture_has_the_same_tokens_still_has_its_own_place_for_boxes():
    size, wanted = (400, 200), [0.25, 0.25, 0.75, 0.75]
    processor = processor_of("qwen2_5_vl", min_pixels=64, max_pixels=64)  # as many tokens for each of them
    (_, high, wide) = processor.image_inputs([Image.new("RGB", size)])["image_grid_thw"][0].tolist()
    numbers = json.loads(said(processor, row(box(*wanted, scale="unit"), size=size)).split("<|im_end|>")[0])
    assert numbers == [round(n * 4 * (wide, high)[i % 2]) for i, n in enumerate(wanted)]
    whole = processor_of("smolvlm", do_image_splitting=False)
    assert said(whole, row(box(20, 10, 120, 60))).startswith("[0.100,0.100,0.600,0.600]")
