"""Bundles of existing VLMs."""

from __future__ import annotations

import pytest
import torch

from support.bundles import trained
from support.tiny_families import tiny
from vlm_sft import load_recipe


@pytest.fixture
def save_family(recipe_file, tmp_path):
    """Saves a bundle of a family's tiny model whose trained parameters have moved. Returns the folder."""

    def make(name, base=None):
        plain = {"stack": None, "chat_template": None, "model": {"pretrained": str(base or tiny(name))}}
        torch.manual_seed(0)
        trained(load_recipe(recipe_file(name, **plain, lora={"r": 2})), tmp_path / f"bundle-{name}")
        return tmp_path / f"bundle-{name}"

    return make
