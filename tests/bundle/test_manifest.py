"""`bundle.json`: what a bundle says of itself, which parts it must hold, and what is no manifest."""

from __future__ import annotations

import json

import pytest
import torch

from support.bundles import trained
from vlm_sft import load, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.manifest import Provenance, held_parts, update_manifest
from vlm_sft.bundle.save import save_bundle
from vlm_sft.model.freeze import FreezePlan
from vlm_sft.stack.build_stack import build_stack


@pytest.fixture
def recipe(bundle_recipe):
    return bundle_recipe


def test_the_manifest_says_what_the_bundle_is(recipe, pieces, tmp_path):
    stack = build_stack(made := recipe())
    notes = {"train_rows": {"rows": 8, "名": "猫"}}
    provenance = Provenance(made, stack.pieces, notes)
    save_bundle(tmp_path / "bundle", stack.model, stack.processor, FreezePlan({"projector": 1e-3}), provenance)
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text(encoding="utf-8"))
    assert manifest["format"] == 1 and manifest["trained"] == ["projector"] and manifest["adapter"] is False
    assert manifest["train_rows"] == notes["train_rows"]
    assert manifest["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert manifest["pieces"]["language_model"]["pretrained"] == pieces["llama"]
    assert load_recipe(tmp_path / "bundle" / "recipe.yaml").resolved() == made.resolved()


def test_a_folder_that_is_no_bundle_or_one_of_a_later_format(recipe, tmp_path):
    with pytest.raises(UserError, match=r"is no bundle: it has no bundle\.json; give the output_dir of a finished run"):
        load(tmp_path)
    trained(recipe(), tmp_path / "bundle")
    update_manifest(tmp_path / "bundle", {"format": 3})
    with pytest.raises(UserError, match=r"has the format 3, this version reads 1 and 2; upgrade vlm_sft"):
        load(tmp_path / "bundle")
    for content, words in (("{", "cannot be read"), ("[]", "holds no mapping")):
        (tmp_path / "bundle" / "bundle.json").write_text(content)
        with pytest.raises(UserError, match=rf"bundle\.json' {words}.*the bundle is not whole"):
            load(tmp_path / "bundle")


STACK = {"vision_tower": {}, "resampler": {"init_from": "earlier"}, "language_model": {}}
HELD = [
    ({"vision_tower": 1e-5}, {}, {"vision_tower", "projector"}),
    ({"language_model": 1e-5}, STACK, {"language_model", "projector", "resampler"}),
    ({"projector": 1e-3}, {"model": {}}, {"projector"}),
    ({"language_model": 1e-5}, {"model": {"init_from": "earlier", "held": ["projector"]}},
     {"language_model", "projector"}),
]  # fmt: skip


@pytest.mark.parametrize(("train", "pieces", "held"), HELD)
def test_a_bundle_holds_what_no_base_piece_is_like(train, pieces, held):
    assert held_parts(FreezePlan(train), pieces) == held
