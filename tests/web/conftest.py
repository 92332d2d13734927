"""A tiny model behind a pool, as the page asks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.asking import tiny_served
from vlm_sft.serving.app import Server
from vlm_sft.serving.meters import Meters
from vlm_sft.serving.pool import Pool
from vlm_sft.serving.prepare import Rules


@pytest.fixture(scope="session")
def served(pieces, caption_file, tmp_path_factory):
    """The tiny model as a bundle called `tiny`."""
    return tiny_served(pieces, caption_file, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_server(served, shared_photos):
    """A server without an address, whose pool ends with the test; bounds by keyword."""
    pools = []

    def make(batch_size: int = 4, queue: int = 8, **rules) -> Server:
        meters = Meters()
        pools.append(Pool(batch_size, queue, meters))
        folder = str(Path(shared_photos[0]).parent)
        bounds = Rules(**{"image_folders": (folder,), "tokens": 12, **rules})
        return Server({"tiny": served, "另一个": served}, pools[-1], meters, bounds)

    yield make
    for pool in pools:
        pool.close()
        pool.join(20)
