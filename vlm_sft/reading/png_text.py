"""PNG files whose texts or colour profile are too long for Pillow: the same file without them, which no pixel needs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # what Pillow unpacks and holds, up to limits that stay as they are
# Texts that may say how a picture is turned; they are kept where they are as short as such a text is.
ROTATION, LONGEST_ROTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"), 1 << 16
LONGEST_KEYWORD = 80
ROOM = 1 << 20  # bytes for all that is neither a pixel nor a text


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
        if copy.tell() + length > ROOM + 8 * max_pixels:  # 8 bytes: four channels of 16 bits, not packed
            return None, left_out
        copy.write(head + stream.read(length + 4))
        if kind == b"IEND":
            break
    copy.seek(0)
    return copy, left_out
