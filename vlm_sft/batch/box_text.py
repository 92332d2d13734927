"""Boxes → text, in the notation that a model was trained with (`NOTATIONS`), moved and scaled with the picture.

What of a picture the model sees, and where on it, says the processor (`VLMProcessor.seen`): a box is moved along with
padding, resizing and cropping before it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor
from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
from transformers.image_utils import ChannelDimension

from ..base.errors import RowError, UserError, row_error
from ..reading.images import ImageLike, image_size
from ..rows.box import to_unit
from ..rows.messages import Message, Part, has_boxes
from ..templates.notations import joined, written_box, written_group

if TYPE_CHECKING:
    from .processor import VLMProcessor

PROBES = ((96, 64), (64, 160))  # (width, height) of the pictures that prove a `Seen`
WRONG_BY = 0.03  # share of a side by which a point of such a picture may miss its place


class Seen(NamedTuple):
    """Where a picture lies in what the model sees of it.

    Attributes:
        size: (width, height) in pixels of what it sees.
        left: Where the picture's left border is in it, in pixels; below 0 where it is cropped.
        top: Likewise.
        right: Where its right border is.
        bottom: Likewise.
    """

    size: tuple[float, float]
    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def whole(cls, size: tuple[float, float]) -> Seen:
        """All of the picture and nothing else, in pixels (width, height)."""
        return cls(size, 0, 0, *size)

    def place(self, box: Sequence[float]) -> list[float] | None:
        """A box or point in 0 to 1 of the picture → in 0 to 1 of what the model sees; None where it sees none of it."""
        starts, lengths = (self.left, self.top), (self.right - self.left, self.bottom - self.top)
        found = [(starts[i % 2] + lengths[i % 2] * n) / self.size[i % 2] for i, n in enumerate(box)]
        kept = [min(max(number, 0.0), 1.0) for number in found]
        if len(box) == 4:
            return kept if kept[2] > kept[0] and kept[3] > kept[1] else None
        return kept if kept == found else None


def write_boxes(
    processor: VLMProcessor,
    messages: Sequence[Message],
    images: Sequence[ImageLike],
    where: str,
    fetch: Callable[[str], str] | None = None,
) -> Sequence[Message]:
    """A conversation with its boxes as text; one without boxes as it is.

    Args:
        processor: Says the notation and what the model sees of a picture.
        messages: As rows have them.
        images: The row's images, in order; only those with boxes are looked at.
        where: The row in words.
        fetch: See `load_image`.

    Raises:
        RowError: A box lies outside of its picture, or of what the model sees of it, or cannot be written.
    """
    if not has_boxes(messages):
        return messages
    writer = _Writer(processor, images, where, fetch)
    return [
        message if isinstance(message["content"], str) else {**message, "content": writer.write(message["content"])}
        for message in messages
    ]


def in_units(messages: Sequence[Message], images: Sequence[ImageLike], where: str) -> list[Message]:
    """Messages with every box in 0 to 1 of its picture.

    Args:
        messages: As rows have them.
        images: The row's images, as they lie in their files.
        where: The row in words.

    Raises:
        RowError: A box lies outside of its picture.
    """

    def in_unit(part: Part) -> Part:
        if part["type"] != "box":
            return part
        return {**part, "box": to_unit(part, file_size(images[part["image"]], where), where), "scale": "unit"}

    return [{**message, "content": [in_unit(part) for part in message["content"]]} for message in messages]


def file_size(image: ImageLike, where: str, fetch: Callable[[str], str] | None = None) -> tuple[int, int]:
    """(width, height) of an image as it lies in its file, upright, whatever size its row asks for."""
    whole = {"path": image.get("path"), "bytes": image.get("bytes")} if isinstance(image, Mapping) else image
    return image_size(whole, where=where, fetch=fetch)


class _Writer:
    """Writes the boxes of one row."""

    def __init__(
        self, processor: VLMProcessor, images: Sequence[ImageLike], where: str, fetch: Callable[[str], str] | None
    ) -> None:
        self.processor, self.images, self.where, self.fetch = processor, images, where, fetch
        self.notation = processor.notation
        self.sizes: dict[int, tuple[tuple[int, int], Seen]] = {}

    def write(self, parts: Sequence[Part]) -> list[Part]:
        """Parts with text in place of boxes: text that follows text is one part, as if it had been typed."""
        found: list[Part] = []
        at = 0
        while at < len(parts):
            part = parts[at]
            ref = part["text"] if part["type"] == "ref" else None
            end = start = at + (ref is not None)
            while end < len(parts) and parts[end]["type"] == "box":
                end += 1
            if ref is None and end == start:
                found.append(part)
                at += 1
                continue
            boxes = parts[start:end]
            points = [len(box["box"]) == 2 for box in boxes]
            found += written_group(self.notation, ref, [self._box(box) for box in boxes], points)
            at = end
        return joined(found)

    def _box(self, part: Part) -> str:
        key, (size, seen) = part["key"], self._seen(part["image"], part["key"])
        placed = seen.place(to_unit(part, size, self.where))
        if placed is None:
            what = f'"{key}" lies where the model does not see its picture, whose borders are cut off'
            raise row_error(self.where, what, "remove the box, or pad the pictures to a square", "box not seen")
        if len(placed) == 2 and not self.notation.point:
            what = f'"{key}" is a point, for which the notation {self.processor.box_notation} has no way of writing'
            raise row_error(self.where, what, "write a box, or choose another `box_notation`", "box wrong")
        return written_box(self.notation, placed, seen.size, self.processor.box_grid)

    def _seen(self, image: int, key: str) -> tuple[tuple[int, int], Seen]:
        if image not in self.sizes:
            if image >= len(self.images):
                what = f'"{key}" is a box on image {image} (from 0), and the row has {len(self.images)}'
                raise row_error(self.where, what, "correct the row", "box without image")
            given = self.images[image]
            size = image_size(given, where=self.where, fetch=self.fetch)
            try:
                seen = self.processor.seen(size)
            except RowError as error:  # it knows of a size alone, and the row's place is added here
                raise RowError(f"{self.where}: {error}", where=self.where, reason=error.reason) from error
            self.sizes[image] = file_size(given, self.where, self.fetch), seen
        return self.sizes[image]


def seen_through(image_processor: BaseImageProcessor, size: tuple[int, int], square: bool = False) -> Seen:
    """Where a picture lies in what an image processor makes of it: padded to a square, resized, cut at its borders.

    Args:
        image_processor: Of transformers, one that makes one picture of a fixed size.
        size: (width, height) of the picture.
        square: Whether it is centred on a square first.
    """
    width, height = (max(size),) * 2 if square else size
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    borders: list[float] = [left, top, left + size[0], top + size[1]]
    if getattr(image_processor, "do_resize", False):
        wide, high = _resized((width, height), dict(image_processor.size))
        borders = [n * new / old for n, new, old in zip(borders, (wide, high) * 2, (width, height) * 2, strict=True)]
        width, height = wide, high
    if getattr(image_processor, "do_center_crop", False):
        crop = dict(image_processor.crop_size)
        # As transformers cuts: what is too small lies on a larger ground, whose odd pixel is at its end.
        moved = [-((new - old) // -2) if new > old else -((old - new) // 2)
                 for new, old in ((crop["width"], width), (crop["height"], height))]  # fmt: skip
        borders = [n + by for n, by in zip(borders, moved * 2, strict=True)]
        width, height = crop["width"], crop["height"]
    return Seen((width, height), *borders)


def _resized(size: tuple[int, int], wanted: Mapping[str, int | None]) -> tuple[int, int]:
    """(width, height) that a picture is resized to."""
    if wanted.get("height") and wanted.get("width"):
        return int(wanted["width"] or 0), int(wanted["height"] or 0)
    shape = (size[1], size[0])
    if (shortest := wanted.get("shortest_edge")) is None:
        return size
    if longest := wanted.get("longest_edge"):
        height, width = get_size_with_aspect_ratio(shape, shortest, longest)
    else:
        blank = np.broadcast_to(np.uint8(0), (3, *shape))
        height, width = get_resize_output_image_size(
            blank, size=shortest, default_to_square=False, input_data_format=ChannelDimension.FIRST
        )
    return width, height


def check_seen(processor: VLMProcessor) -> None:
    """Proves `VLMProcessor.seen` on pictures of which every point is known.

    Raises:
        UserError: The image processor does something else with pictures.
    """
    for size in PROBES:
        seen, width, height = processor.seen(size), *size
        across = np.broadcast_to(np.linspace(0, 255, width), (height, width))
        down = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
        probe = np.stack([across, down, across], axis=-1).round().astype(np.uint8)
        found, black, white = (
            np.asarray(processor.encode_images([picture]))[0].astype(np.float64)
            for picture in (Image.fromarray(probe), *(Image.new("RGB", size, name) for name in ("black", "white")))
        )
        right = found.shape[-2:] == (round(seen.size[1]), round(seen.size[0]))
        for channel, axis, low, high in ((0, 0, seen.left, seen.right), (1, 1, seen.top, seen.bottom)):
            if not right:
                break
            span = (white - black)[channel]
            there = np.abs(span) > 0.98 * np.abs(span).max()  # without the ground that smaller pictures lie on
            part, whole = (np.where(there, values, 0).sum(axis) for values in ((found - black)[channel], span))
            share = part / whole.clip(1e-9)
            place = (np.arange(len(share)) + 0.5 - low) / (high - low)
            inside = (place > 0.1) & (place < 0.9) & there.any(axis)
            right = bool(inside.any()) and float(np.abs(share - place)[inside].max()) < WRONG_BY
        if not right:
            name = type(processor.image_processor).__name__
            raise UserError(
                f"Boxes cannot be moved with the pictures of the image processor {name}, which does more than pad, "
                f"resize and crop at the centre; leave the rows with boxes out."
            )
