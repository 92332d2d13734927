"""What a file is by its first bytes, and the sentence for what is no image."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import pytest
from PIL import Image, PngImagePlugin

from vlm_sft.base.errors import RowError
from vlm_sft.reading.image_kinds import KINDS, describe_unreadable, ending_of, kind_of, without_texts
from vlm_sft.reading.images import image_size, load_image


@pytest.mark.parametrize("name", sorted({kind.name for kind in KINDS}))
def test_what_pil_writes_is_known_by_its_first_bytes(name):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, name)
    assert kind_of(file.getvalue()).name == name
    assert f".{ending_of(file.getvalue())}" in Image.registered_extensions()


def test_what_is_no_image_has_no_kind_but_an_ending():
    assert kind_of(b"<html>") is None and ending_of(b"<html>") == "png"


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        (b"\xff\xd8\xff\xe0", "starts like a JPEG but is truncated or damaged"),
        (b"\xef\xbb\xbf <!DOCTYPE html>", "looks like HTML: a web page was saved in its place"),
        (b"\0\0\0\x18ftypheic", "looks like HEIC or a video"),
        (b"\0" * 64, "looks like only zero bytes, as after a broken download"),
        ("没有图片".encode(), "looks like text: download the image again"),
        (b"\x01\x02\x03", "is not an image in a format that can be read"),
    ],
)
def test_the_sentence_says_what_it_looks_like(head, sentence):
    assert sentence in describe_unreadable(head)


# -- PNG files that say more than Pillow takes -------------------------------------------------------------------------

LONG = zlib.compress("一只猫 a cat ".encode() * 200_000)
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


# As image generators, editors and scanners write them.
CHUNKS = {
    "zTXt": chunk(b"zTXt", b"prompt\0\0" + LONG),
    "iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG),
    "iCCP": chunk(b"iCCP", b"ICC Profile\0\0" + LONG),
    "tEXt": chunk(b"tEXt", b"parameters\0" + b"x" * (3 << 20)),
    "many": b"".join(chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 1_000_000)) for _ in range(3)),
}


def scene(mode: str = "RGB") -> Image.Image:
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    return image.convert(mode, palette=Image.Palette.ADAPTIVE)


def png(image: Image.Image, before: bytes = b"", after: bytes = b"", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    data = stream.getvalue()
    return data[:33] + before + data[33:-12] + after + data[-12:]  # behind the header, and before the end


@pytest.mark.parametrize("kind", CHUNKS)
@pytest.mark.parametrize("place", ["before", "after"])
def test_long_texts_and_profiles_do_not_cost_the_image(kind, place, monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2 << 20)  # it is 64 MiB, which take seconds to read
    data = png(scene(), **{place: CHUNKS[kind]})
    with pytest.raises(ValueError, match=r"too large|Too much memory"):
        Image.open(io.BytesIO(data)).load()
    image = load_image({"path": "猫.png", "bytes": data}, where="row s/1")
    assert (image.size, image.getpixel((0, 0)), image.getpixel((39, 0))) == ((40, 20), (255, 0, 0), (0, 0, 255))
    assert image_size(data) == (40, 20)


def test_pillows_own_limits_are_not_loosened():
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    load_image(png(scene(), CHUNKS["zTXt"]))
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def test_its_rotation_and_what_is_transparent_stay():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(png(scene(), CHUNKS["zTXt"], exif=exif)).size == (20, 40)
    turned = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
    assert load_image(png(scene(), turned + CHUNKS["iCCP"])).size == (20, 40), "as an editor writes it"
    too_long = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG)
    assert load_image(png(scene(), too_long)).size == (40, 20)
    palette = scene("P")
    clear = load_image(png(palette, CHUNKS["iCCP"], transparency=palette.getpixel((0, 0))))
    assert (clear.getpixel((0, 0)), clear.getpixel((39, 0))) == ((255, 255, 255), (0, 0, 255))


def test_texts_are_passed_over_and_never_held():
    data = png(scene(), CHUNKS["tEXt"])
    tracemalloc.start()
    copies = [len(copy.getvalue()) for copy in without_texts(io.BytesIO(data), 10_000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert copies == [len(data) - len(CHUNKS["tEXt"])] and peak < 1 << 20


def test_there_is_no_copy_of_what_has_no_text_is_no_png_or_has_more_than_its_pixels_need():
    hoard = png(scene(), CHUNKS["zTXt"] + chunk(b"prVt", bytes(2 << 20)))
    for data in (png(scene()), b"", b"\x89PNG", b"\xff\xd8\xff" + bytes(50), hoard):
        assert list(without_texts(io.BytesIO(data), 10_000)) == []


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_one_is_refused_still(share):
    data = png(Image.effect_noise((64, 64), 90), CHUNKS["zTXt"])
    with pytest.raises(RowError, match=r"row s/1: the embedded image is truncated or damaged .*: download it again"):
        load_image(data[: int(len(data) * share)], where="row s/1")


@pytest.mark.parametrize("behind", [False, True])
def test_the_size_of_a_png_is_that_of_the_upright_picture_and_no_pixel_is_read_for_it(behind, tmp_path, monkeypatch):
    """EXIF may stand behind the pixels; without any, a large picture costs no more than a small one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = io.BytesIO(), io.BytesIO()
    Image.effect_noise((300, 200), 90).save(plain, "PNG")
    data = plain.getvalue()
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    cut = data.index(b"IEND") - 4 if behind else data.index(b"IDAT") - 4
    turned.write(data[:cut] + chunk + data[cut:])
    assert image_size(turned.getvalue()) == load_image(turned.getvalue()).size == (200, 300)
    (tmp_path / "图.png").write_bytes(data)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("the pixels were read"))
    assert image_size(data) == image_size(tmp_path / "图.png") == (300, 200)
