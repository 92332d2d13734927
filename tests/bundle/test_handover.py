"""A stage starts from an earlier one only when everything frozen is the same; what differs is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from support.bundles import ALTERED, altered, bump, logits, trained
from support.tiny_families import tiny
from vlm_sft import load, load_recipe, save_bundle
from vlm_sft.base.errors import UserError
from vlm_sft.bundle.handover import check_adapter, hand_over, settle_adapter
from vlm_sft.bundle.parity import probe_logits
from vlm_sft.export.check import QUESTION, noise_picture
from vlm_sft.stack.build_stack import build_stack
from vlm_sft.stack.kinds import compose


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
    with pytest.raises(UserError, match="has a LoRA adapter; say what becomes of it: lora_from='continue' or 'merge'"):
        hand_over(stack, tmp_path / "adapted")
    save_bundle(tmp_path / "nameless", stack.model, stack.processor, stack.plan)
    with pytest.raises(UserError, match="the bundle does not say what it was trained on; it was saved without its"):
        hand_over(stack, tmp_path / "nameless")
    with pytest.raises(UserError, match=r"cannot be loaded: it was saved without its recipe \(recipe\.yaml\)"):
        load(tmp_path / "nameless")


# -- LoRA of the earlier stage -----------------------------------------------------------------------------------------


@pytest.fixture
def adapted(recipe, tmp_path):
    """A bundle with LoRA on two layers, and the recipe of a stage that starts from it."""
    trained(recipe(name="one", lora={"r": 4, "target_modules": ["q_proj", "v_proj"]}), tmp_path / "one")

    def later(**changes):
        return recipe(**{"name": "two", "init_from": str(tmp_path / "one"), **changes})

    return later


@pytest.mark.parametrize("lora", [None, {}, {"lora_dropout": 0.1}, {"r": 4, "target_modules": ["v_proj", "q_proj"]}])
def test_a_continued_adapter_is_the_bundle_s(lora, adapted, tmp_path):
    """Rank, targets and alpha may be left out or repeated; the dropout may differ."""
    made = settle_adapter(adapted(lora_from="continue", **({} if lora is None else {"lora": lora})))
    assert made.lora["r"] == 4 and made.lora.get("lora_dropout") == (lora or {}).get("lora_dropout")
    check_adapter(made, compose(made))
    second = trained(made, tmp_path / "two", moves=False)
    first, processor = load(tmp_path / "one")
    assert torch.equal(logits(second, processor), logits(first, processor))
    again, _ = load(tmp_path / "two")
    assert torch.equal(logits(again, processor), logits(first, processor))


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 2}, "which has lora.r: 4, but this recipe has 2; leave lora.r out, or start a new LoRA"),
        ({"lora_alpha": 64}, "lora.lora_alpha: 8, but this recipe has 64"),
        ({"use_rslora": True}, "lora.use_rslora: False, but this recipe has True"),
        ({"use_dora": True}, "lora.use_dora: False, but this recipe has True"),
        ({"rank_pattern": {"q_proj": 2}}, "lora.rank_pattern: {}, but this recipe has {'q_proj': 2}"),
        ({"target_modules": ["q_proj"]}, r"target_modules: \[q_proj, v_proj\] \(4 modules\), but .* \[q_proj\] \(2"),
        ({"layers_to_transform": [0]}, r"layers_to_transform: \[q_proj, v_proj\] \(4 modules\), but .* \(2 modules"),
        ({"add_tokens": ["缺陷"]}, r"lora.add_tokens: None, but this recipe has \['缺陷'\]"),
    ],
)
def test_a_contradiction_to_the_continued_adapter_names_key_and_both_values(lora, words, adapted):
    made = settle_adapter(adapted(lora_from="continue", lora=lora))
    with pytest.raises(UserError, match=words):
        check_adapter(made, compose(made))


def test_what_becomes_of_the_lora_is_asked(adapted, recipe, tmp_path):
    with pytest.raises(UserError, match="add `lora_from: continue` to train it on, or `lora_from: merge` to put it"):
        settle_adapter(adapted(lora={"r": 2}))
    trained(recipe(name="plain"), tmp_path / "plain")
    for way in ("continue", "merge"):
        made = adapted(init_from=str(tmp_path / "plain"), lora_from=way)
        with pytest.raises(UserError, match=f"has no LoRA for `lora_from: {way}`; remove that key"):
            settle_adapter(made)
    made = adapted(init_from=str(tmp_path / "nowhere"), lora_from="continue")
    assert settle_adapter(made, planned=True) is made
    with pytest.raises(UserError, match="there is no such folder"):
        settle_adapter(made)


def test_several_adapters_in_a_bundle(adapted, tmp_path):
    (tmp_path / "one" / "style").mkdir()
    shutil.copy(tmp_path / "one" / "adapter_config.json", tmp_path / "one" / "style")
    with pytest.raises(UserError, match=r"has several adapters \(style beside its own\); keep one of them"):
        settle_adapter(adapted(lora_from="continue"))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "kosmos-2"])
def test_words_and_lora_of_an_existing_vlm_go_on(name, recipe_file, tmp_path):
    """Words in a first stage, its LoRA trained on or merged in a second, another word in a third."""

    def stage(label, **changes):
        plain = {"stack": None, "chat_template": None, "model": {"pretrained": str(tiny(name))}, "train": {}}
        return load_recipe(recipe_file(label, **{**plain, **changes}))

    def said(model, processor):
        picture = noise_picture()
        rows = [{**QUESTION[0], "content": [QUESTION[0]["content"][0], {"type": "text", "text": "<defect>?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a red 缺陷 3"}]}]  # fmt: skip
        batch = processor.batch([processor.encode_chat(rows, sizes=[picture.size])])
        batch |= processor.image_inputs([picture], processor.instructions(rows))
        ids = {word.id for word in processor.words}
        assert ids and (ids <= set(batch["input_ids"].flatten().tolist()) or len(ids) > 2)
        return probe_logits(model, batch)

    one = trained(stage("one", lora={"r": 2, "add_tokens": ["<defect>", "缺陷"]}), tmp_path / "one")
    first, processor = load(tmp_path / "one")
    wanted = said(one, processor)
    assert torch.equal(said(first, processor), wanted)
    start = {"init_from": str(tmp_path / "one")}
    on = trained(stage("on", lora_from="continue", **start), tmp_path / "on", moves=False)
    assert torch.equal(said(on, processor), wanted)
    new = {"r": 2, "add_tokens": ["zzq"]}
    merged = trained(stage("merged", lora_from="merge", lora=new, **start), tmp_path / "merged", moves=False)
    found = said(merged, processor)[:, : wanted.shape[-1]]
    other = (found - wanted).abs().amax(0) > 1e-4  # the new word alone, where it took a spare row
    assert other.nonzero().flatten().tolist() in ([], [max(word.id for word in processor.words) + 1])
    shutil.rmtree(tmp_path / "one")
    last, words = load(tmp_path / "merged")
    assert [word.text for word in words.words] == ["<defect>", "缺陷", "zzq"]
    assert torch.equal(said(last, words), said(merged, words))
