"""The table of vision encoders in docs/systems.md is what `benchmarks/vision_towers.py` finds."""

from __future__ import annotations

import importlib.util
import re

import pytest

from support.paths import ROOT

PAGE = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8").partition("## Vision encoders")[2]
TABLE = dict(re.findall(r"^\| `([\w-]+)` \| ((?:works|no): .*) \|$", PAGE.partition("\n## ")[0], re.MULTILINE))
SAMPLE = ["clip_vision_model", "swin", "convnext", "vit_mae", "siglip2_vision_model", "levit", "qwen2_5_vl_vision"]


@pytest.fixture(scope="module")
def towers():
    spec = importlib.util.spec_from_file_location("vision_towers", ROOT / "benchmarks" / "vision_towers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_encoder_of_transformers_is_in_the_table(towers):
    assert list(TABLE) == towers.encoders()


@pytest.mark.parametrize("name", SAMPLE)
def test_the_table_says_what_an_encoder_does(name, towers):
    assert towers.attempt(name) == TABLE[name]
