"""A stage starts from an earlier one only when everything frozen is the same; what differs is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from support.bundles import ALTERED, altered, bump, logits, trained
from vlm_sft import load, save_bundle
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.handover import hand_over
from vlm_sft.stack.build_stack import build_stack


@pytest.fixture
def recipe(bundle_recipe):
    return bundle_recipe


@pytest.fixture
def stage1(recipe, tmp_path):
    """Bundle of a first stage that trained projector and resampler, and its model."""
    made = recipe(train={"projector": 1e-3, "resampler": 1e-4}, name="one")
    return str(tmp_path / "stage1"), trained(made, tmp_path / "stage1")


def test_a_stage_starts_from_the_earlier_one(stage1, recipe):
    folder, model = stage1
    stack = build_stack(recipe(name="two", init_from=folder))
    assert set(hand_over(stack, folder)) == {"projector", "resampler"}
    assert torch.equal(logits(stack.model.eval(), stack.processor), logits(model, stack.processor))


@pytest.mark.parametrize("changes", [{"lora": {"r": 2}}, {"train": {}, "lora": {"r": 2}}])
def test_what_was_handed_over_and_is_frozen_now_stays_in_the_bundle(changes, stage1, recipe, tmp_path):
    """The third bundle still has the Q-Former that only the first stage trained."""
    first, _ = stage1
    trained(recipe(name="two", init_from=first), tmp_path / "two")
    third = trained(recipe(name="three", init_from=str(tmp_path / "two"), **changes), tmp_path / "three")
    shutil.rmtree(first)
    shutil.rmtree(tmp_path / "two")
    again, processor = load(tmp_path / "three")
    assert torch.equal(logits(again, processor), logits(third, processor))
    manifest = json.loads((tmp_path / "three" / "bundle.json").read_text())
    assert manifest["held"] == ["projector", "resampler"]
    assert manifest["trained"] == sorted(changes.get("train", {"projector": 1}))


@pytest.mark.parametrize("part", ALTERED)
def test_another_base_is_named_at_the_hand_over(part, stage1, recipe, pieces, tmp_path):
    argument, piece, tensor = ALTERED[part]
    other = altered(pieces[piece], tmp_path / "other", bump(tensor))
    stack = build_stack(recipe(name="two", **{argument: other}))
    with pytest.raises(UserError) as error:
        hand_over(stack, stage1[0])
    text = str(error.value)
    assert text.startswith(f"init_from '{stage1[0]}': the bundle was trained on the {part} of '{pieces[piece]}'")
    assert f"but '{other}' gives" in text and text.endswith("use the same base.")


def test_a_stack_without_resampler_is_told_apart_from_one_with(stage1, recipe):
    stack = build_stack(recipe(name="two", resampler=None))
    with pytest.raises(UserError, match="the bundle has a resampler but this stack has none; use the same stack"):
        hand_over(stack, stage1[0])


def test_another_projector_is_named(recipe, tmp_path):
    trained(recipe(tower="clip", resampler=None, projector={"type": "mlp"}), tmp_path / "one")
    for projector, words in (
        ({"type": "linear"}, r"has a mlp projector .*'depth': 2.* but this recipe asks for linear \{\}"),
        ({"type": "mlp", "depth": 3}, r"'depth': 2.* asks for mlp .*'depth': 3"),
        ({"type": "mlp", "activation": "relu"}, "'activation': 'gelu'.* asks for mlp .*'activation': 'relu'"),
    ):
        stack = build_stack(recipe(tower="clip", resampler=None, projector=projector, name="two"))
        with pytest.raises(UserError, match=rf"^init_from .*{words}.*; use the same projector\.$"):
            hand_over(stack, tmp_path / "one")


@pytest.mark.parametrize("vision", [{"feature_layer": -2}, {"feature_select": "patch"}])
def test_other_features_of_the_same_tower_are_named(vision, recipe, tmp_path):
    """Nothing has another shape then, and a projector that was trained on other features is of no use."""
    trained(recipe(tower="clip", resampler=None), tmp_path / "one")
    stack = build_stack(recipe(tower="clip", resampler=None, vision=vision, name="two"))
    ((key, value),) = vision.items()
    with pytest.raises(UserError, match=rf"trained with stack\.vision_tower\.{key}: .*, but this recipe has {value}"):
        hand_over(stack, tmp_path / "one")


def test_what_cannot_be_started_from(recipe, tmp_path):
    stack = build_stack(recipe())
    with pytest.raises(UserError, match=r"'.*nowhere' is no bundle: there is no such folder; give the output_dir of a"):
        hand_over(stack, tmp_path / "nowhere")
    trained(recipe(lora={"r": 2}), tmp_path / "adapted")
    with pytest.raises(UserError, match="has a LoRA adapter, which a new stage cannot train on top of; merge it"):
        hand_over(stack, tmp_path / "adapted")
    save_bundle(tmp_path / "nameless", stack.model, stack.processor, stack.plan)
    with pytest.raises(UserError, match="the bundle does not say what it was trained on; it was saved without its"):
        hand_over(stack, tmp_path / "nameless")
    with pytest.raises(UserError, match=r"cannot be loaded: it was saved without its recipe \(recipe\.yaml\)"):
        load(tmp_path / "nameless")
