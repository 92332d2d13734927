"""Small pictures inside a page, and the boxes on them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL = 288  # pixels of the longer side


class Drawn(NamedTuple):
    """A box on a picture, in its pixels: a point has no width. What it shows in words, and what the row says of it."""

    left: float
    top: float
    width: float
    height: float
    label: str
    title: str


@dataclass(frozen=True)
class Picture:
    """A small JPEG file, its size in pixels, and the boxes on it."""

    jpeg: bytes
    width: int
    height: int
    boxes: list[Drawn] = field(default_factory=list)

    @property
    def data_uri(self) -> str:
        """The file, to be put into a page."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode()}"


def thumbnail(image: Image.Image, boxes: Iterable[tuple[list[float], str, str]] = (), side: int = THUMBNAIL) -> Picture:
    """A small JPEG of an RGB image, `side` pixels at most, and where boxes in 0 to 1 of it lie on that."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((side, side))
    small.save(file, "JPEG", quality=75)
    drawn = []
    for box, label, title in boxes:
        left, top, *corner = (round(number * small.size[i % 2], 1) for i, number in enumerate(box))
        right, bottom = corner or (left, top)
        drawn.append(Drawn(left, top, round(right - left, 1), round(bottom - top, 1), label, title))
    return Picture(file.getvalue(), *small.size, drawn)
