"""Adapters in bundles: merged ones stay with every bundle that stands on them, and what is not whole is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel

from support.bundles import logits, trained
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.load import load
from vlm_sft.stack.adapters import forget_merged, merge_adapter, merged_in
from vlm_sft.stack.build_stack import build_stack


@pytest.fixture
def recipe(bundle_recipe):
    return bundle_recipe


@pytest.mark.parametrize("lora", [{"r": 2}, {"r": 2, "use_dora": True}, {"r": 4, "use_rslora": True}])
def test_a_merged_adapter_is_the_model_with_it_and_comes_back_without_the_first_bundle(lora, recipe, tmp_path):
    first = trained(recipe(name="one", lora=lora), tmp_path / "one")
    changes = {"init_from": str(tmp_path / "one"), "lora_from": "merge", "lora": {"r": 3}}
    second = trained(recipe(name="two", **changes), tmp_path / "two", moves=False)
    third = trained(recipe(name="three", **{**changes, "init_from": str(tmp_path / "two")}), tmp_path / "three")
    for name in ("one", "two"):
        shutil.rmtree(tmp_path / name)
    again, processor = load(tmp_path / "three")
    assert torch.allclose(logits(second, processor), logits(first, processor), atol=1e-5)
    assert isinstance(again, PeftModel) and torch.equal(logits(again, processor), logits(third, processor))
    manifest = json.loads((tmp_path / "three" / "bundle.json").read_text())
    assert manifest["merged"] == [str(tmp_path / "one"), str(tmp_path / "two")] and manifest["format"] == 2
    assert [stage.get("lora_from") for stage in manifest["stages"]][-1] == "merge"
    # Nothing but small files: the first adapter is as PEFT wrote it, and no base weight is in any.
    assert {path.name for path in (tmp_path / "three" / "merged_1").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip


def test_a_merged_adapter_that_is_gone_or_a_list_that_is_none(recipe, tmp_path):
    trained(recipe(name="one", lora={"r": 2}), tmp_path / "one")
    changes = {"init_from": str(tmp_path / "one"), "lora_from": "merge"}
    trained(recipe(name="two", **changes), tmp_path / "two")
    assert not (tmp_path / "two" / "adapter_config.json").exists()
    manifest = json.loads((tmp_path / "two" / "bundle.json").read_text())
    (tmp_path / "two" / "bundle.json").write_text(json.dumps({**manifest, "merged": 1}))
    with pytest.raises(UserError, match="`merged` is no list of words"):
        load(tmp_path / "two")
    (tmp_path / "two" / "bundle.json").write_text(json.dumps(manifest))
    shutil.rmtree(tmp_path / "two" / "merged_1")
    with pytest.raises(UserError, match=r"merged_1' has no adapter_config\.json"):
        load(tmp_path / "two")


def test_another_bundle_in_the_folder_leaves_no_merged_adapter_behind(recipe, tmp_path):
    trained(recipe(name="one", lora={"r": 2}), tmp_path / "one")
    trained(recipe(name="two", init_from=str(tmp_path / "one"), lora_from="merge"), tmp_path / "two")
    trained(recipe(name="plain"), tmp_path / "two")
    assert not list((tmp_path / "two").glob("merged_*"))
    load(tmp_path / "two")


def test_a_model_forgets_what_was_merged_when_its_base_is_written_anew(recipe, tmp_path):
    trained(recipe(name="one", lora={"r": 2}), tmp_path / "one")
    model = build_stack(recipe(name="two")).model
    merge_adapter(tmp_path / "one", model, "one")
    assert [adapter.source for adapter in merged_in(model)] == ["one"]
    assert forget_merged(model) == {"language_model"} and merged_in(model) == []


def test_an_adapter_that_does_not_fit_the_model(recipe, pieces, tmp_path):
    trained(recipe(name="one", lora={"r": 2, "target_modules": ["q_proj"]}), tmp_path / "one")
    path = tmp_path / "one" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["nowhere"]}))
    with pytest.raises(UserError, match="is no adapter that PEFT can read: Target modules"):
        merge_adapter(tmp_path / "one", build_stack(recipe(name="two")).model, "one")
