"""Pictures of every shape and kind before every processor: a right batch, or one row refused and the others trained on.

No weights: image processors of all families and of the towers that stacks are composed of.
"""

from __future__ import annotations

import functools
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from transformers import (
    BitImageProcessorPil,
    BlipImageProcessorPil,
    BridgeTowerImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from support.conversations import make_processor
from support.tiny_families import EVERY, processor_of, rows
from support.tiny_pieces import make_tokenizer
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.batch.collator import REJECTED, MultimodalCollator
from vlm_sft.batch.pictures import (
    PictureError,
    Pictures,
    check_pictures,
    image_inputs,
    is_odd,
    load_picture,
    picture_size,
    read_pictures,
    why,
)
from vlm_sft.batch.processor import VLMProcessor
from vlm_sft.templates.template import load_template

SQUARE, EDGE = {"height": 28, "width": 28}, {"shortest_edge": 28}
TOWERS = {
    "clip": CLIPImageProcessorPil(size=EDGE, crop_size=SQUARE),
    "siglip": SiglipImageProcessorPil(size=SQUARE),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE),
    "blip2": BlipImageProcessorPil(size=SQUARE),
    "vit": ViTImageProcessorPil(size=SQUARE),
    "convnext": ConvNextImageProcessorPil(size=EDGE, crop_pct=0.875),
    "bridgetower": BridgeTowerImageProcessorPil(size=EDGE, crop_size=EDGE, size_divisor=4),
}
NAMES = [*EVERY, *TOWERS, "clip padded", "siglip padded"]
SHAPES = [(1, 1), (2, 3), (1, 1000), (1000, 1), (3, 2000), (2000, 3), (28, 6000), (4000, 1), (1, 199), (57, 2)]
REFUSING = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm46v", "fuyu",
            "bridgetower"}  # fmt: skip
# They give colours between those of picture and margin, where these meet.
BLENDING = {"clip padded", "siglip padded", "deepseek_vl_hybrid"}
COLOUR = (255, 128, 10)


@functools.cache
def made(name: str) -> VLMProcessor:
    if name in EVERY:
        return processor_of(name)
    tower, _, padded = name.partition(" ")
    template = load_template("vicuna_v1")
    return VLMProcessor(TOWERS[tower], make_tokenizer(), template, 3, pad_to_square=bool(padded))


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def row_of(data: bytes, name: str = "odd") -> dict:
    (row,) = rows((40, 30))
    return {**row, "id": name, "images": [{"path": f"{name}.png", "bytes": data}]}


def same(batch: dict, other: dict) -> bool:
    return batch.keys() == other.keys() and all(torch.equal(batch[name], other[name]) for name in other)


def colours(name: str, pixels: torch.Tensor) -> set[tuple[float, ...]]:
    """The colours that the model is shown, however its patches lie."""
    pixels = pixels.float()
    if name == "fuyu":
        pixels = pixels.reshape(-1, 3)
    elif name.startswith(("qwen", "glm")):
        pixels = pixels.view(len(pixels), 3, -1).transpose(1, 2).reshape(-1, 3)
    else:
        pixels = pixels.movedim(-3, -1).reshape(-1, 3)
    return {tuple(round(value, 1) for value in colour) for colour in pixels.unique(dim=0).tolist()}


@pytest.mark.parametrize("name", NAMES)
def test_every_shape_is_shown_as_it_is_or_refused_by_row_and_the_others_go_on(name):
    collator, good = MultimodalCollator(made(name)), rows((40, 30), (30, 40))
    tolerant = MultimodalCollator(made(name))
    tolerant.drop_rejected = True
    plain = collator(good)
    own, margin = (
        colours(name, made(name).image_inputs([Image.new("RGB", (40, 40), colour)], [""])["pixel_values"])
        for colour in (COLOUR, (0, 0, 0))
    )
    shown = own | margin | {(0.0, 0.0, 0.0)}
    refused = 0
    for shape in SHAPES:
        if "padded" in name and max(shape) > 1000:  # a square of so many pixels takes seconds
            continue
        odd = row_of(file_of(Image.new("RGB", shape, COLOUR)))
        left = tolerant([good[0], odd, good[1]])
        if lost := left.pop(REJECTED, []):
            refused += 1
            ((source, row, reason, sentence),) = lost
            assert (source, row) == ("x", "odd") and reason in ("image refused", "image too large")
            assert re.match(r"row odd: the image odd\.png (of|has) [\d,]+ x [\d,]+ pixels.*remove the row\.$", sentence)
            assert same(left, plain), shape
            with pytest.raises(RowError, match=re.escape(sentence)):
                collator([odd])
            continue
        batch = collator([odd])
        seen = colours(name, batch["pixel_values"])
        assert seen <= shown or name in BLENDING, (shape, seen)
        assert seen & own or "padded" in name, "a line of one pixel may be lost in a square of thousands"
        assert len(left["input_ids"]) == 3
    assert bool(refused) == (name in REFUSING)


def scene(mode: str = "RGB") -> Image.Image:
    """Red at the left, blue at the right."""
    image = Image.new("RGB", (48, 24), "red")
    image.paste("blue", (24, 0, 48, 24))
    return image.convert(mode)


def _clear() -> Image.Image:
    image = scene("RGBA")
    image.paste((0, 255, 0, 0), (0, 0, 24, 24))  # lies over white
    return image


def _palette() -> bytes:
    image = scene().quantize(4)
    return file_of(image, transparency=image.getpixel((0, 0)))


def _lab(image: Image.Image) -> Image.Image:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return file_of(scene().transpose(Image.Transpose.ROTATE_90), exif=exif)


def _grey(left: int, right: int) -> Image.Image:
    image = Image.new("L", (48, 24), left)
    image.paste(right, (24, 0, 48, 24))
    return image


WHITE_BLUE = Image.new("RGB", (48, 24), "white")
WHITE_BLUE.paste("blue", (24, 0, 48, 24))
MILD = Image.new("RGB", (48, 24), (200, 90, 40))
MILD.paste((60, 80, 170), (24, 0, 48, 24))
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (48, 24), "green")]}
SIXTEEN = np.repeat(np.repeat(np.array([[20_000, 65_535]], dtype=np.uint16), 24, axis=0), 24, axis=1)
# What people have → the same picture as plain RGB.
KINDS = {
    "16 bits": (file_of(Image.fromarray(SIXTEEN)), _grey(78, 255)),
    "palette with a clear colour": (_palette(), WHITE_BLUE),
    "alpha": (file_of(_clear()), WHITE_BLUE),
    "grey with alpha": (file_of(_grey(0, 255).convert("LA")), _grey(0, 255)),
    "CMYK": (file_of(scene("CMYK"), "TIFF"), scene("CMYK")),
    "Lab": (file_of(_lab(MILD), "TIFF"), MILD),
    "GIF": (file_of(scene(), "GIF", **FRAMES), scene()),
    "WebP": (file_of(scene(), "WEBP", lossless=True, **FRAMES), scene()),
    "APNG": (file_of(scene(), "PNG", **FRAMES), scene()),
    "MPO": (file_of(scene(), "MPO", quality=100, subsampling=0, **FRAMES), scene()),
    "turned": (_turned(), scene()),
    "two levels": (file_of(_grey(0, 255).convert("1")), _grey(0, 255)),
}
BROKEN = {"truncated": file_of(Image.effect_noise((64, 64), 90))[:900], "empty": b"", "text": "不是图片".encode()}


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_is_the_picture_that_it_shows(name):
    collator = MultimodalCollator(made(name))
    for kind, (data, picture) in KINDS.items():
        batch, plain = collator([row_of(data)]), collator([row_of(file_of(picture.convert("RGB")))])
        close = 0.1 if kind in ("Lab", "MPO") else 1e-6  # of values that reach from -2 to 2; these two round
        for key in [key for key in batch if key.endswith("pixel_values")]:  # DeepSeek's hybrid has two sizes of each
            assert torch.allclose(batch.pop(key).float(), plain.pop(key).float(), atol=close), (kind, key)
        assert "pixel_values" not in batch and same(batch, plain), kind


@pytest.mark.parametrize("name", ["qwen3_vl", "fuyu", "gemma3", "clip padded"])
def test_a_broken_file_is_a_rejected_row_beside_good_ones(name):
    collator, good = MultimodalCollator(made(name)), rows((40, 30), (30, 40))
    collator.drop_rejected = True
    plain = collator(good)
    for kind, data in BROKEN.items():
        batch = collator([good[0], row_of(data), good[1]])
        ((_, row, _, sentence),) = batch.pop(REJECTED)
        assert row == "odd" and sentence.startswith("row odd: the embedded image odd.png ") and "\n" not in sentence, (
            kind
        )
        assert same(batch, plain), kind


# What image processors and the libraries below them raise.
ERRORS = [AssertionError(), IndexError("list index out of range"), RuntimeError("output size is too small"),
          TypeError("not a number"), ZeroDivisionError("division by zero"), MemoryError()]  # fmt: skip


class Choosy(VLMProcessor):
    """Refuses pictures that begin with a red pixel, with an error of any kind."""

    error: Exception = ValueError("no red")

    def encode_images(self, images):
        if any(image.getpixel((0, 0)) == (255, 0, 0) for image in images):
            raise self.error
        return super().encode_images(images)


@pytest.fixture
def choosy():
    processor = make_processor("vicuna_v1")
    processor.__class__ = Choosy
    return processor


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_it_raises_for_a_usual_shape_is_the_error_of_that_row(choosy, error):
    choosy.error = error
    red, good = row_of(file_of(Image.new("RGB", (40, 30), "red"))), rows((40, 30), (30, 40))
    collator = MultimodalCollator(choosy)
    says = str(error) or type(error).__name__
    sentence = (
        f"row odd: the image odd.png of 40 x 30 pixels is refused by the model's image processor ({says}): give it "
        "another shape or format, or remove the row."
    )
    with pytest.raises(PictureError) as caught:
        collator([good[0], red, good[1]])
    assert (str(caught.value), caught.value.where, caught.value.reason) == (sentence, "row odd", "image refused")
    collator.drop_rejected = True
    batch = collator([good[0], red, good[1]])
    assert batch.pop(REJECTED) == [("x", "odd", "image refused", sentence)] and same(batch, collator(good))
    with pytest.raises(UserError, match="No row of a batch of 1 can be trained on; the last one: row odd: the image"):
        collator([red])


def test_an_error_that_is_no_pictures_stays_what_it_is(choosy, monkeypatch):
    class Collator(MultimodalCollator):
        def collate(self, samples):
            raise KeyError("a mistake of mine")

    with pytest.raises(KeyError, match="a mistake of mine"):
        Collator(choosy)(rows((40, 30)))
    with pytest.raises(KeyError, match="a mistake of mine"):
        Collator(choosy)(rows(None))


def test_pictures_that_pass_alone_but_not_beside_others_are_found_by_what_is_made_of_them():
    class Whole(VLMProcessor):
        def encode_images(self, images):
            size = [(28, 28) if max(image.size) < 1000 else image.size[::-1] for image in images]
            return torch.stack([torch.zeros(3, *each) for each in size])

    processor = make_processor("vicuna_v1")
    processor.__class__ = Whole
    large = row_of(file_of(Image.new("L", (1200, 1000))))
    with pytest.raises(PictureError, match=r"row odd: .* \(it makes 1 x 3 x 1000 x 1200 of it, and 1 x 3 x 28 x 28 of"):
        MultimodalCollator(processor)([*rows((40, 30)), large])


def test_what_would_fill_the_memory_is_refused_before_it_is_made(monkeypatch):
    processor = made("clip")
    monkeypatch.setattr(type(processor.image_processor), "__call__", lambda *args, **options: pytest.fail("resized"))
    with pytest.raises(
        RowError, match=r"row a: .*1 x 9,000 pixels, of which the image processor would make 28 x 252,000"
    ):
        load_picture(processor, Image.new("RGB", (1, 9000)), where="row a", max_pixels=1_000_000)
    data = file_of(Image.new("L", (300, 300)))
    with pytest.raises(RowError, match="row a: the embedded image has 300 x 300 pixels, more than the 80,000 allowed"):
        picture_size(data, where="row a", max_pixels=80_000)
    assert picture_size(data) == (300, 300)


def test_pictures_that_somebody_gives_are_tried_at_once(choosy, tmp_path):
    paths = [str(tmp_path / name) for name in ("good.png", "红.png")]
    Image.new("RGB", (40, 30), "blue").save(paths[0])
    Image.new("RGB", (40, 30), "red").save(paths[1])
    assert [image.size for image in read_pictures(choosy, paths[:1], paths[:1])] == [(40, 30)]
    with pytest.raises(PictureError, match=r"^the image \S+红.png of 40 x 30 pixels .* \(no red\): .* or remove it\.$"):
        read_pictures(choosy, paths, paths)


def test_rows_of_a_batch_are_named(choosy):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    assert image_inputs(choosy, [Pictures([blue]), Pictures([])])["pixel_values"].shape == (1, 3, 28, 28)
    with pytest.raises(PictureError, match=r"^row b: the image x.png of 8 x 8"):
        image_inputs(choosy, [Pictures([blue], where="row a"), Pictures([blue, red], ["", ""], "row b", ["", "x.png"])])
    check_pictures(choosy, Pictures([]))


def test_a_side_that_is_rounded_to_nothing_is_said_as_that():
    for name in ("fuyu", "bridgetower"):
        with pytest.raises(
            RowError, match=r"5 x 5,000 pixels is refused .* \(resized, its short side has no pixel left\): "
        ):
            MultimodalCollator(made(name))([row_of(file_of(Image.new("L", (5, 5000))))])
    assert len(why(ValueError("x" * 3000))) == 200 and why(AssertionError()) == "AssertionError"


def test_what_is_odd():
    shapes = [(28, 28), (640, 480), (1, 1), (27, 100), (28, 300), (4000, 1)]
    assert [is_odd(Image.new("1", shape)) for shape in shapes] == [False, False, True, True, True, True]
