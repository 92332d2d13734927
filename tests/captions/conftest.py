"""Tiny models that write and match captions, once for all tests."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from support.blip import save_blip2, save_captioner, save_matcher


@pytest.fixture(scope="session")
def blip(tmp_path_factory) -> dict[str, str]:
    """Folders: `captioner`, `matcher`, `blip2`."""
    root = tmp_path_factory.mktemp("blip")
    return {
        "captioner": save_captioner(root / "captioner"),
        "matcher": save_matcher(root / "matcher"),
        "blip2": save_blip2(root / "blip2"),
    }


@pytest.fixture
def album(tmp_path):
    """A folder of seven pictures, one below, one that is broken and one that is hidden."""
    folder = tmp_path / "album"
    (folder / "下面").mkdir(parents=True)
    chance = np.random.default_rng(0)
    for number in range(6):
        pixels = chance.integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    Image.new("RGB", (50, 20), (200, 30, 30)).save(folder / "下面" / "红.jpg")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    return folder
