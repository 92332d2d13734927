"""What a file is by its first bytes: a kind of image, or what stands in the place of one; and PNG files whose texts or
colour profile are too long for Pillow, without them, which no pixel needs.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import IO, NamedTuple

from ..base.limits import READERS


class ImageKind(NamedTuple):
    """A kind of image: how a file of it begins, what it is called, and the ending of its files."""

    magic: bytes
    name: str
    ending: str


KINDS = (
    ImageKind(b"\xff\xd8\xff", "JPEG", "jpg"),
    ImageKind(b"\x89PNG", "PNG", "png"),
    ImageKind(b"GIF8", "GIF", "gif"),
    ImageKind(b"RIFF", "WebP", "webp"),
    ImageKind(b"BM", "BMP", "bmp"),
    ImageKind(b"II*\0", "TIFF", "tif"),
    ImageKind(b"MM\0*", "TIFF", "tif"),
    ImageKind(b"\0\0\0\x0cjP  ", "JPEG2000", "jp2"),
    ImageKind(b"\xff\x4f\xff\x51", "JPEG2000", "j2k"),
    ImageKind(b"\0\0\1\0", "ICO", "ico"),
)

PICTURES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .dib .tif .tiff .ppm .pgm .jp2 .j2k .avif .ico .mpo".split()
)
"""Endings of files that are taken for pictures where nothing else says what they are."""
UNREAD_PICTURES = dict.fromkeys((".heic", ".heif", ".cr2", ".nef", ".arw", ".dng"), "JPEG") | {".svg": "PNG"}
"""Endings of pictures that are not read → what to convert them to."""

_NOT_IMAGES = {
    b"<!doctype html": "HTML: a web page was saved in its place",
    b"<html": "HTML: a web page was saved in its place",
    b"<svg": "SVG, a drawing: convert it to PNG",
    b"<?xml": "XML or SVG: convert a drawing to PNG",
    b"{": "JSON: perhaps a server's error message",
    b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
    b"%pdf": "PDF: convert its pages to PNG",
    b"%!ps": "PostScript: convert it to PNG",
    b"pk\x03\x04": "a zip archive: unpack it",
    b"\x1f\x8b": "a gzip archive: unpack it",
}


def kind_of(head: bytes) -> ImageKind | None:
    """The kind of an image by its first bytes; None for what is no image, or of a kind that is rarely met."""
    return next((kind for kind in KINDS if head.startswith(kind.magic)), None)


def ending_of(data: bytes) -> str:
    """The ending of a file name for an encoded picture, by its first bytes; readers look at the bytes, not at it."""
    kind = kind_of(data)
    return "png" if kind is None else kind.ending


def describe_unreadable(head: bytes) -> str:
    """The rest of a sentence on a file that cannot be opened as an image, by its first bytes, some dozens of them."""
    if (kind := kind_of(head)) is not None:
        return f"starts like a {kind.name} but is truncated or damaged: download it again or remove the row"
    if head[4:8] == b"ftyp":
        mend = "convert it to JPEG or PNG, or name a video under `video`"
        return f"is not an image that can be read (it looks like HEIC or a video): {mend}"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    looks = next((name for magic, name in _NOT_IMAGES.items() if text.startswith(magic)), None)
    if looks is None and not head.strip(b"\0"):
        looks = "only zero bytes, as after a broken download: download it again"
    if looks is None and all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        looks = "text: download the image again or remove the row"
    if looks is None:
        return "is not an image in a format that can be read: convert it to JPEG or PNG"
    return f"is not an image (it looks like {looks})"


SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # what Pillow unpacks and holds, up to limits that stay as they are
# Texts that may say how a picture is turned; they are kept where they are as short as such a text is.
ROTATION, LONGEST_ROTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"), 1 << 16
LONGEST_KEYWORD = 80


def without_texts(stream: IO[bytes], max_pixels: int) -> Iterator[io.BytesIO]:
    """Copies of a PNG without its texts and its colour profile; EXIF, palette and transparency stay.

    Texts are passed over, neither read nor unpacked, so a copy is never larger than the pixels may be.

    Args:
        stream: The file.
        max_pixels: Of how many pixels it is at most.

    Yields:
        A copy with the texts that may say how it is turned, if there are any, and one without any text; nothing of a
        file that is no PNG or has no text.
    """
    kept, left_out = _copied(stream, ROTATION, max_pixels)
    if kept is not None and left_out:
        yield kept
    if kept is not None:
        bare, left_out_now = _copied(stream, (), max_pixels)
        if bare is not None and left_out_now > left_out:
            yield bare


def may_be_turned(stream: IO[bytes]) -> bool:
    """Whether a PNG has anything that could say how it is turned, also behind its pixels, which are passed over."""
    place = stream.seek(0, os.SEEK_CUR)
    stream.seek(len(SIGNATURE))
    found = False
    while not found and len(head := stream.read(8)) == 8:
        found = head[4:] == b"eXIf" or (head[4:] in TEXTS and head[4:] != b"iCCP")
        stream.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    stream.seek(place)
    return found


def _copied(stream: IO[bytes], keep: tuple[bytes, ...], max_pixels: int) -> tuple[io.BytesIO | None, int]:
    """The copy, None where it would be too large or is no PNG, and how many texts were left out."""
    copy, left_out = io.BytesIO(), 0
    stream.seek(0)
    copy.write(stream.read(len(SIGNATURE)))
    if copy.getvalue() != SIGNATURE:
        return None, 0
    while len(head := stream.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        start = stream.tell()
        if kind in TEXTS:
            short = length <= LONGEST_ROTATION and stream.read(LONGEST_KEYWORD).startswith(keep)
            stream.seek(start)
            if not short:
                left_out += 1
                stream.seek(start + length + 4)
                continue
        if (
            copy.tell() + length > READERS.picture_text + 8 * max_pixels
        ):  # 8 bytes: four channels of 16 bits, not packed
            return None, left_out
        copy.write(head + stream.read(length + 4))
        if kind == b"IEND":
            break
    copy.seek(0)
    return copy, left_out
