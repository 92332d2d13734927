"""The table of vision encoders in docs/systems.md is what `benchmarks/vision_towers.py` finds."""

from __future__ import annotations

import pytest

from support.scripts import script, systems_table

TABLE = systems_table("Vision encoders")
SAMPLE = ["clip_vision_model", "swin", "convnext", "vit_mae", "siglip2_vision_model", "levit", "qwen2_5_vl_vision"]


@pytest.fixture(scope="module")
def towers():
    return script("benchmarks/vision_towers.py")


def test_every_encoder_of_transformers_is_in_the_table(towers):
    assert list(TABLE) == towers.encoders()


@pytest.mark.parametrize("name", SAMPLE)
def test_the_table_says_what_an_encoder_does(name, towers):
    assert towers.attempt(name) == TABLE[name]
