"""How large a row wants one of its images: Qwen's sizes and OpenAI's `detail`, in the entry beside the file.

Every model's images are brought to that size first; what its own processor does to a picture comes after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..base.errors import row_error
from ..base.words import short

SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")
OPTIONS = (*SIZES, "detail")
DETAILS = {"auto": None, "high": None, "original": None, "low": 512 * 512}
"""OpenAI's words → the pixels that an image has at most."""


def sizes_of(image: Mapping[str, Any], where: str) -> dict[str, int]:
    """The sizes that an image's entry asks for, `detail` as `max_pixels`; nothing where it asks for none.

    Raises:
        RowError: they are no whole numbers from 1 on, or cannot hold together.
    """
    found: dict[str, int] = {}
    for name in SIZES:
        if (value := image.get(name)) is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or value != value // 1 or value < 1:
            what = f"{name} of an image is {short(str(value))}"
            raise row_error(where, what, "write a whole number of pixels from 1 on", "wrong type")
        found[name] = int(value)
    if (detail := image.get("detail")) is not None:
        if not isinstance(detail, str) or detail not in DETAILS:
            what = f'detail of an image is "{short(str(detail))}"'
            raise row_error(where, what, f"it must be one of {', '.join(DETAILS)}", "wrong type")
        if (most := DETAILS[detail]) is not None:
            found["max_pixels"] = min(most, found.get("max_pixels", most))
    if found.get("min_pixels", 0) > found.get("max_pixels", math.inf):
        raise row_error(where, "an image has min_pixels above its max_pixels", "correct one of them", "wrong type")
    return found


def size_asked(size: tuple[int, int], image: Mapping[str, Any]) -> tuple[int, int]:
    """(width, height) that an image of `size` is brought to by the sizes in its entry.

    `resized_height` and `resized_width` are taken as they are, one alone keeps the picture's shape, and both go before
    the bounds on pixels.
    """
    width, height = size
    wide, high = image.get("resized_width"), image.get("resized_height")
    if wide is not None:
        return wide, high or max(1, round(height * wide / width))
    if high is not None:
        return max(1, round(width * high / height)), high
    pixels, least, most = width * height, image.get("min_pixels") or 0, image.get("max_pixels")
    if most is not None and pixels > most:
        scale = math.sqrt(most / pixels)
        short_side = max(1, math.floor(min(size) * scale))
        long_side = max(1, min(math.floor(max(size) * scale), most // short_side))
        return (long_side, short_side) if width >= height else (short_side, long_side)
    if pixels < least:
        scale = math.sqrt(least / pixels)
        return math.ceil(width * scale), math.ceil(height * scale)
    return size
