"""Bundles to export: of composed stacks, and of existing VLMs."""

from __future__ import annotations

import pytest
import torch

from support.bundles import trained
from support.tiny_families import tiny
from vlm_sft import load_recipe


@pytest.fixture
def bundle(bundle_recipe, tmp_path):
    """Trains nothing, but moves what would be trained, and saves it. Returns the folder."""

    def make(name="bundle", **stack):
        torch.manual_seed(0)  # else whether a tiny model says anything would depend on the tests before
        trained(bundle_recipe(**stack), tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def save(recipe_file, tmp_path):
    """Saves a bundle of a family's tiny model whose trained parameters have moved. Returns the folder."""

    def make(name, base=None, label="bundle", **changes):
        plain = {"stack": None, "chat_template": None, "model": {"pretrained": str(base or tiny(name))}}
        recipe = load_recipe(recipe_file(label, **{**plain, "lora": {"r": 2}, **changes}))
        torch.manual_seed(0)  # else whether a tiny model says anything would depend on the tests before
        trained(recipe, tmp_path / label)
        return tmp_path / label

    return make
