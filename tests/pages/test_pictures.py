"""Pictures inside a page are small."""

from __future__ import annotations

import io

from PIL import Image

from vlm_sft.pages.pictures import thumbnail


def test_thumbnails_are_small():
    large = thumbnail(Image.effect_noise((3000, 1500), 90).convert("RGB"))
    assert Image.open(io.BytesIO(large.jpeg)).size == (large.width, large.height) == (288, 144)
    assert len(large.jpeg) < 40_000
