"""Asks a VLE whether texts belong to an image, and where in the image one is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from .vle import VLE


def match(encoder: VLE, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
    """How likely each of N texts belongs to the image beside it, 0 … 1."""
    return encoder(images, texts).softmax(-1)[:, 1].tolist()


def find(encoder: VLE, image: Image.Image, text: str) -> torch.Tensor:
    """How likely each patch of an image shows what a text says, (rows, columns) of 0 … 1."""
    shares = encoder([image], [text]).softmax(-1)[0, :, 1]
    side = encoder.model.config.vision_config
    return shares.view(-1, side.image_size // side.patch_size)


def draw(encoder: VLE, image: Image.Image, found: torch.Tensor) -> Image.Image:
    """The picture with what was found in it bright and the rest dark.

    Args:
        encoder: What found it; a margin that its image processor cuts off is dark.
        image: The picture.
        found: (rows, columns) as `find` gives it.
    """
    low, high = float(found.min()), float(found.max())
    shades = ((found - low) / (high - low or 1.0) * 215 + 40).round().to(torch.uint8).numpy()
    left, top, right, bottom = _seen(encoder, image.size)
    light = Image.new("L", image.size, 40)
    light.paste(Image.fromarray(shades).resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
    return Image.composite(image, Image.new("RGB", image.size), light)


def _seen(encoder: VLE, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the part of a picture that reaches the model, in its pixels."""
    settings, (width, height) = encoder.image_processor.to_dict(), size
    if not (settings.get("do_center_crop") and (edge := (settings.get("size") or {}).get("shortest_edge"))):
        return 0, 0, width, height
    scale = min(size) / edge
    cut = settings["crop_size"]
    wide, high = min(round(cut["width"] * scale), width), min(round(cut["height"] * scale), height)
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high
