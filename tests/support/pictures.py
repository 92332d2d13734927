"""Pictures that look like photos, and what people do to copies of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps


def photo(seed: int, size: tuple[int, int] = (240, 180)) -> Image.Image:
    """Coloured clouds with some shapes before them, another picture for every seed."""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        for n in (3, 7, 15)
    ]
    picture = Image.blend(Image.blend(layers[0], layers[1], 0.4), layers[2], 0.25)
    draw = ImageDraw.Draw(picture)
    for _ in range(5):
        x, y, side = (int(rng.integers(0, limit)) for limit in (*size, size[1] // 2))
        colour = tuple(rng.integers(0, 256, 3).tolist())
        getattr(draw, rng.choice(["ellipse", "rectangle"]))((x, y, x + side, y + side), fill=colour)
    return picture


def saved_as_jpeg(picture: Image.Image, quality: int = 40) -> Image.Image:
    """The picture as a JPEG of that quality gives it back."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def cut(picture: Image.Image, share: float) -> Image.Image:
    """The picture without so large a share at each side."""
    width, height = picture.size
    x, y = round(width * share), round(height * share)
    return picture.crop((x, y, width - x, height - y))


def marked(picture: Image.Image) -> Image.Image:
    """The picture with a watermark."""
    picture = picture.copy()
    place = (picture.width // 2, picture.height * 4 // 5)
    ImageDraw.Draw(picture).text(place, "(c) example", fill="white", stroke_width=1, stroke_fill="black")
    return picture


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half the size": lambda picture: picture.resize((picture.width // 2, picture.height // 2)),
    "twice the size": lambda picture: picture.resize((picture.width * 2, picture.height * 2)),
    "squeezed to a square": lambda picture: picture.resize((224, 224)),
    "JPEG of quality 40": saved_as_jpeg,
    "cut at every side": lambda picture: cut(picture, 0.04),
    "darker": lambda picture: ImageEnhance.Brightness(picture).enhance(0.7),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.2),
    "grey": lambda picture: picture.convert("L").convert("RGB"),
    "watermark": marked,
    "mirrored": ImageOps.mirror,
    "all of it": lambda picture: saved_as_jpeg(ImageOps.mirror(cut(marked(picture), 0.03)).resize((120, 90)), 50),
}


def write(picture: Image.Image, path: Path) -> str:
    """Writes a picture and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return str(path)
