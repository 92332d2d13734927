"""Images as they come: decoded right, or one sentence that names the file and the row."""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_sft.base.errors import RowError, UserError
from vlm_sft.reading.images import ENOUGH, TOLERANCE, load_image, needed_side


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def scene() -> Image.Image:
    """Red at the left, blue at the right: wide, so that a lost rotation shows."""
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    return image


def refused(image, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        load_image(image, where="captions/17", **kwargs)
    message = str(error.value)
    assert message.startswith("captions/17: ")
    assert "\n" not in message
    assert message.endswith(".")
    return message


# ------------------------------------------------------------------------------------------------------ decoded right


def test_every_way_to_give_an_image(tmp_path):
    path = tmp_path / "猫.png"
    path.write_bytes(encode(scene()))
    data = path.read_bytes()
    ways = [path, str(path), data, {"path": str(path), "bytes": None}, {"path": None, "bytes": data}, Image.open(path)]
    for way in [*ways, {"path": "gone.png", "bytes": data}, {"bytes": data}, bytearray(data)]:
        image = load_image(way)
        assert image.mode == "RGB"
        assert image.size == (40, 20)
        assert image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = scene()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL transposes that turn an upright picture into the stored one
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    image = load_image(encode(stored, "JPEG", exif=exif, quality=95))
    assert image.size == (40, 20)
    assert np.abs(np.asarray(image, dtype=int)[:, :18] - [255, 0, 0]).max() < 12
    assert not image.getexif()


def test_a_broken_exif_block_does_not_cost_the_image():
    good = encode(scene(), "JPEG")
    exif = b"Exif\0\0II*\0\xff\xff\xff\xff garbage"
    data = good[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + good[2:]
    assert load_image(data).size == (40, 20)


def test_transparent_pixels_lie_over_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    rgb = load_image(encode(image))
    assert [rgb.getpixel((x, 0)) for x in range(3)] == [(255, 255, 255), (127, 127, 127), (255, 0, 0)]
    assert load_image(encode(Image.new("LA", (4, 4), (0, 0)))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_a_transparent_colour(kind):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 0, 128, 255] + [0] * 762)
    image.putpixel((0, 0), 0)
    rgb = load_image(encode(image, kind, transparency=0))
    assert (rgb.getpixel((0, 0)), rgb.getpixel((1, 1))) == ((255, 255, 255), (0, 128, 255))


def test_greyscale_and_two_levels():
    assert load_image(encode(Image.new("L", (3, 3), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert load_image(encode(Image.new("1", (3, 3), 1))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    grey = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    image = load_image(encode(Image.fromarray(grey), kind))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 128.0, 255.0], [0, 128, 255]), ([np.nan, np.inf, -3.0], [0, 0, 0])],
)
def test_float_images(values, expected):
    image = load_image(encode(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF"))
    assert [image.getpixel((x, 0))[0] for x in range(3)] == expected


def test_cmyk():
    image = load_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(np.asarray(image, dtype=int)[0, 0] - [255, 0, 0]).max() < 12


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(load_image(data), dtype=int)[4, 4] - [255, 0, 0]).max() < 12


def test_a_wrong_ending_does_not_matter(tmp_path):
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encode(scene()))
    assert load_image(path).size == (40, 20)


def test_files_are_closed_and_nothing_is_carried_along(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(scene(), icc_profile=b"x" * 100))
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        image = load_image(path)
    assert len(os.listdir("/proc/self/fd")) == before
    assert image.info == {}
    assert type(image) is Image.Image


def test_the_callers_image_is_not_touched():
    given_image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    load_image(given_image).putpixel((0, 0), (1, 2, 3))
    assert given_image.mode == "RGBA"
    rgb = scene()
    load_image(rgb).putpixel((0, 0), (1, 2, 3))
    assert rgb.getpixel((0, 0)) == (255, 0, 0)


# ---------------------------------------------------------------------------------------------------- decoded smaller


def photo(width: int, height: int) -> Image.Image:
    """Smooth shapes, fine structure and noise, as a camera gives them."""
    rng = np.random.default_rng(width + height)
    layers = []
    for size, share in ((40, 0.75), (3, 0.25)):
        small = rng.integers(0, 255, (height // size + 2, width // size + 2, 3), dtype=np.uint8)
        layers.append(np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)) * share)
    pixels = sum(layers) + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def resized(image: Image.Image, side: int) -> np.ndarray:
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), dtype=float)


@pytest.mark.parametrize(
    ("size", "side", "decoded"),
    [
        ((1600, 1200), 224, (800, 600)),
        ((1600, 1200), 64, (200, 150)),
        ((1200, 1600), 100, (300, 400)),
        ((897, 1000), 224, (449, 500)),
        ((895, 1000), 224, (895, 1000)),
        ((3000, 300), 100, (3000, 300)),
        ((40, 20), 224, (40, 20)),
    ],
)
def test_a_large_jpeg_is_decoded_smaller_within_the_tolerance(size, side, decoded):
    data = encode(photo(*size), "JPEG", quality=90)
    reduced = load_image(data, side=side)
    assert reduced.size == decoded
    assert decoded == size or min(decoded) >= ENOUGH * side
    difference = np.abs(resized(reduced, side) - resized(load_image(data), side)).mean()
    assert (difference > 0) == (decoded != size)
    assert difference <= TOLERANCE


def test_a_smaller_decode_keeps_rotation_cmyk_and_grey():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = load_image(encode(photo(800, 400), "JPEG", exif=exif), side=50)
    assert turned.size == (100, 200)
    assert load_image(encode(Image.new("CMYK", (400, 400), (0, 255, 255, 0)), "JPEG"), side=50).size == (100, 100)
    assert load_image(encode(Image.new("L", (400, 400), 77), "JPEG"), side=50).getpixel((0, 0)) == (77, 77, 77)


def test_what_is_no_jpeg_is_decoded_whole_and_a_truncated_one_is_refused_still():
    assert load_image(encode(photo(400, 400)), side=50).size == (400, 400)
    data = encode(photo(800, 800), "JPEG")
    assert "truncated or damaged" in refused(data[: len(data) // 2], side=50)
    assert "more than the 1,000 allowed" in refused(data, side=50, max_pixels=1000)


def test_how_many_pixels_an_image_processor_needs():
    def processor(resize=True, **size):
        return type("Processor", (), {"size": size, "do_resize": resize})()

    assert needed_side(processor(height=224, width=336)) == 336
    assert needed_side(processor(shortest_edge=224)) == 224
    assert needed_side(processor(shortest_edge=3136, longest_edge=12845056)) is None, "it depends on the image"
    assert needed_side(processor(resize=False, height=224, width=224)) is None
    assert needed_side(object()) is None


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("gone.png", "image missing"),
        ("https://example.com/1.png", "image is a URL"),
        (b"", "image empty"),
        (b"\xff\xd8\xff\xe0 no more", "image damaged"),
        (b"<html>", "not an image"),
        (encode(Image.new("L", (300, 300))), "image too large"),
    ],
)
def test_each_refusal_has_a_reason_to_count_by(data, reason):
    with pytest.raises(RowError) as error:
        load_image(data, where="row s/1", max_pixels=80_000)
    assert (error.value.reason, error.value.where) == (reason, "row s/1")


def test_missing_names_the_file_and_the_folder(tmp_path):
    (tmp_path / "cat.png").write_bytes(encode(scene()))
    message = refused(tmp_path / "cat.jpg")
    assert f"the image cat.jpg was not found in the folder {tmp_path} (but cat.png is there)" in message
    assert f"because the folder {tmp_path}/照片 does not exist" in refused(tmp_path / "照片" / "1.png")
    assert "does not exist" in refused(tmp_path / "cat.png" / "1.png")


def test_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a folder" in refused(tmp_path)
    assert "is a named pipe" in refused(tmp_path / "pipe")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert "cannot be opened" in refused(tmp_path / "loop.png")
    assert "cannot be opened" in refused("x" * 5000)
    assert "cannot be opened" in refused("nul\0.png")


def test_no_permission(tmp_path, monkeypatch):
    def deny(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "a.png"
    path.write_bytes(encode(scene()))
    monkeypatch.setattr("os.open", deny)
    assert "may not be read by this user" in refused(path)


def test_urls_are_not_fetched():
    assert "no URL is fetched" in refused("https://example.com/cat.jpg")
    assert "no URL is fetched" in refused({"path": "http://example.com/猫.jpg", "bytes": None})


def test_zero_bytes(tmp_path):
    (tmp_path / "a.png").touch()
    assert "a.png is empty (0 bytes)" in refused(tmp_path / "a.png")
    assert "is empty (0 bytes)" in refused(b"")
    assert "the embedded image 猫.png is empty" in refused({"path": "猫.png", "bytes": b""})


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated(kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, kind)
    assert "truncated or damaged" in refused(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("data", "looks"),
    [
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "it looks like HTML"),
        ("\ufeff\n<html>没有找到</html>".encode(), "it looks like HTML"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b'{"error": "rate limit"}', "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (b"PK\x03\x04....", "zip"),
        ("这不是图片".encode(), "it looks like text"),
        (b"\0" * 500, "only zero bytes"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\x01\x02\x03\x04\x05", "is not an image in a format that can be read"),
    ],
)
def test_not_an_image(tmp_path, data, looks):
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    message = refused(path)
    assert looks in message
    assert "photo.jpg" in message
    assert "is not an image" in message


def test_size_is_bounded_before_decoding(monkeypatch):
    data = encode(Image.new("L", (300, 300)))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert "has 300 x 300 pixels, more than the 10,000 allowed" in refused(data, max_pixels=10_000)


def test_a_decompression_bomb_is_refused_by_its_header():
    header = encode(Image.new("1", (1, 1)), "PPM").replace(b"1 1", b"99999 99999", 1)
    assert "more than the 178,956,970 allowed" in refused(header)


def test_nothing_to_load():
    assert "neither a path nor bytes" in refused({"path": None, "bytes": None})
    assert "of type int" in refused(3)
    assert "of type list" in refused(["a.png"])


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"II*\0", b"BM"]),
)
def test_any_bytes_are_an_image_or_a_sentence(data, head):
    try:
        said = load_image(head + data, max_pixels=10**6).mode
    except UserError as error:
        said = str(error)
    assert "\n" not in said
