"""One box or point of a row: what its numbers count, whether they can be one, and where it lies on its picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..base.errors import row_error
from ..base.names import Values
from ..base.words import short
from .messages import Part, box_part
from .raw_row import RowView

SCALES: dict[str, float | None] = {"pixels": None, "unit": 1.0, "thousand": 1000.0, "padded": 1.0}
"""What numbers count → their largest: pixels of the upright picture, 0 to 1 or 0 to 1000 of its sides, or 0 to 1 of the
square that the picture is centred on (LLaVA's own data)."""
SLACK = 0.5  # pixels by which a box may stick out of its picture; it is cut there


def given_box(row: RowView, part: Values, key: str) -> Part:
    """A part of type `box` that a row writes itself, as `vlm-sft data convert` does."""
    box, scale, image = part.get("box"), part.get("scale"), part.get("image", 0)
    if scale not in SCALES or not isinstance(box, list) or type(image) is not int:
        what = f"{key} is no box"
        raise row.error(what, f'write {{"type": "box", "box": [x1, y1, x2, y2], "scale": …}}, of {either(SCALES)}')
    return checked_box(row, box, scale, image, f"{key}.box", None)


def check_image(row: RowView, image: int, images: int, key: str) -> None:
    """Looks that a row of so many images has that one."""
    if not 0 <= image < images:
        have = f"image {image} (from 0), and the row has {images}" if images else "an image, and the row has none"
        raise row.error(f'"{key}" is a box on {have}', "correct the row", "box without image")


def checked_box(row: RowView, box: Sequence[Any], scale: str, image: int, key: str, images: int | None) -> Part:
    """A box whose numbers can be one."""
    if images is not None:
        check_image(row, image, images, key)
    if problem := problem_of(box, scale):
        what, mend = problem
        raise row.error(f'"{key}" {what}', mend, "box wrong")
    return box_part(box, scale, image, key)


def only_image(row: RowView, key: str, images: int) -> int:
    """The number of the image that a box lies on where nothing says it: a row of several is refused."""
    if images > 1:
        what = f'"{key}" is a box, the row has {images} images, and nothing says which it lies on'
        raise row.error(what, "write the boxes as ms-swift's `objects` with `image_id`", "box unclear")
    return 0


def problem_of(box: Sequence[Any], scale: str) -> tuple[str, str] | None:
    """What is wrong with the numbers of a box or point, and how to mend it; None where nothing is."""
    said = short(str(list(box)))
    if not all(is_number(number) for number in box):
        return f"is {said}", "write numbers"
    if len(box) not in (2, 4):
        if len(box) >= 6 and len(box) % 2 == 0:
            return f"has {len(box)} numbers, as a polygon has", "write the box around it, [x1, y1, x2, y2]"
        return f"has {len(box)} numbers", "write [x1, y1, x2, y2] for a box or [x, y] for a point"
    if len(box) == 4 and (box[2] <= box[0] or box[3] <= box[1]):
        mend = "write [x1, y1, x2, y2], the left upper corner first"
        return f"is {said}, which has no width or height (x2 <= x1 or y2 <= y1)", mend
    most = SCALES[scale]
    if min(box) < (0 if most else -SLACK) or (most and max(box) > most):
        unit = f"0 to {most:g}" if most else "pixels from 0 on"
        mend = "correct it" if most is None else "correct it, or what the source's `boxes` or its bbox_type says"
        return f"is {said}, outside of its picture ({scale}: {unit})", mend
    return None


def to_unit(part: Values, size: tuple[int, int], where: str) -> list[float]:
    """A box part's numbers as 0 to 1 of the sides of its picture.

    Args:
        part: as `box_part` makes it.
        size: (width, height) in pixels of the upright picture, as it lies in the file.
        where: the row in words.

    Raises:
        RowError: the box lies outside of its picture.
    """
    convert: Callable[[float, int], float]
    side = max(size)
    convert = {
        "pixels": lambda number, length: number / length,
        "unit": lambda number, length: number,
        "thousand": lambda number, length: number / 1000,
        "padded": lambda number, length: (number * side - (side - length) // 2) / length,
    }[part["scale"]]
    lengths = [size[i % 2] for i in range(len(part["box"]))]
    found = [convert(number, length) for number, length in zip(part["box"], lengths, strict=True)]
    slack = math.inf if part["scale"] == "padded" and len(found) == 4 else SLACK
    over = any(not -slack <= number * length <= length + slack for number, length in zip(found, lengths, strict=True))
    kept = [min(max(number, 0.0), 1.0) for number in found]
    if over or (len(kept) == 4 and (kept[2] <= kept[0] or kept[3] <= kept[1])):
        what = f'"{part["key"]}" is {short(str(part["box"]))} ({part["scale"]}), outside of its picture of '
        mend = "correct it, or what the source's `boxes` or its bbox_type says"
        raise row_error(where, f"{what}{size[0]:,} x {size[1]:,} pixels", mend, "box wrong")
    return kept


def is_number(value: object) -> bool:
    """Whether a value of a row is a number, and a finite one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def either(names: Iterable[str]) -> str:
    """`a, b or c`."""
    *most, last = names
    return f"{', '.join(most)} or {last}"
