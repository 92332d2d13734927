"""An encoder behind the questions that are asked of every kind of model."""

from __future__ import annotations

import json

import pytest
import torch

from support.vle import ANSWERS, GOLDEN, save_vle
from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.base.names import ENCODER_PARTS
from vlm_sft.encoders.kind import EncoderKind
from vlm_sft.pieces.piece import specs_of
from vlm_sft.stack.build_stack import build_empty_stack, build_stack
from vlm_sft.stack.kinds import compose, kind_of

RATES = dict.fromkeys(ENCODER_PARTS, 1e-3)


@pytest.fixture
def encoder_recipe(tmp_path, recipe_file):
    def make(heads=("vqa_classifier",), train=RATES, **encoder):
        if not (tmp_path / "vle").exists():
            save_vle(tmp_path / "vle", *heads)
        section = {"pretrained": str(tmp_path / "vle"), **encoder}
        return load_recipe(recipe_file(stack=None, chat_template=None, encoder=section, train=train))

    return make


def test_the_answers_of_the_checkpoint_are_kept_with_its_head(encoder_recipe):
    recipe = encoder_recipe()
    assert isinstance(kind_of(specs_of(recipe)), EncoderKind)
    stack = build_stack(recipe)
    assert stack.processor.known.answers == ANSWERS
    torch.testing.assert_close(stack.model.vqa_classifier[3].weight, GOLDEN.tensors()["vqa_classifier.3.weight"])
    torch.testing.assert_close(stack.model.vle.token_type_embeddings.weight,
                               GOLDEN.tensors()["vle.token_type_embeddings.weight"])  # fmt: skip


def test_other_answers_get_a_new_head(encoder_recipe, tmp_path):
    (tmp_path / "list.json").write_text('["是", "no"]', encoding="utf-8")
    model = build_stack(encoder_recipe(answers=str(tmp_path / "list.json"))).model
    head = model.vqa_classifier
    assert head[3].weight.shape[0] == 2 and model.config.id2label == {0: "是", 1: "no"}
    assert 0.01 < float(head[0].weight.detach().std()) < 0.03 and not head[3].bias.any()
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_without_a_head_the_rows_say_what_may_be_answered(encoder_recipe):
    composed = compose(encoder_recipe(heads=()))
    assert sorted(composed.processor.known.answers)[:3] == ["a blue 7", "a bus", "a cat"]
    assert len(composed.config.id2label) == 8


def test_a_stream_has_a_list_of_answers_or_a_head_that_has_them(encoder_recipe, tmp_path):
    """Nobody reads a stream to its end before the first step."""

    def streamed(**given):
        recipe = encoder_recipe(**given)
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"streaming": True})})

    assert compose(streamed()).processor.known.answers == ANSWERS
    bare = str(save_vle(tmp_path / "bare"))
    with pytest.raises(UserError, match=r"a stream has no list of its answers; name one: `encoder\.answers`"):
        compose(streamed(pretrained=bare))


def test_every_weight_is_of_a_part_and_learns_at_its_rate(encoder_recipe):
    rates = {"fusion": 1e-4, "head": 1e-2}
    stack = build_empty_stack(encoder_recipe(train=rates))
    assert all(parameter.is_meta for parameter in stack.model.parameters())
    rows = {row.part: row for row in stack.plan.rows(stack.model)}
    assert list(rows) == list(ENCODER_PARTS)
    assert [bool(row.trained) for row in rows.values()] == [False, False, True, True]


@pytest.mark.parametrize(("changes", "says"), [
    ({"train": {"projector": 1e-3}}, "the parts are vision_tower, text_encoder, fusion, head"),
    ({"lora": {"r": 2}}, "`lora` is not for an `encoder`"),
    ({"chat_template": "plain"}, "`chat_template` is not for an `encoder`"),
    ({"stack": None, "model": {"pretrained": "x"}}, "`encoder` is a model of its own"),
    ({"sft": {"output_dir": "o", "packing": True}}, "`sft.packing` is not for an `encoder`"),
    ({"encoder": {"pretrained": "x", "min_count": 0}}, "min_count"),
])  # fmt: skip
def test_what_an_encoder_has_not_is_one_sentence(recipe_file, changes, says):
    given = {"stack": None, "chat_template": None, "encoder": {"pretrained": "x"}, "train": RATES, **changes}
    with pytest.raises(UserError, match=says):
        load_recipe(recipe_file(**given))


def test_settings_of_an_answer_are_for_one_that_writes(encoder_recipe):
    recipe = encoder_recipe().model_copy(update={"generation": {"num_beams": 2}})
    with pytest.raises(UserError, match=r"chooses its answers and writes none; remove `generation`"):
        compose(recipe)


def test_a_checkpoint_that_is_none_is_one_sentence(encoder_recipe, tmp_path, pieces):
    encoder_recipe()
    for pretrained in (pieces["llama"], str(tmp_path / "nothing")):
        with pytest.raises(UserError, match=r"encoder\.pretrained") as raised:
            compose(encoder_recipe(pretrained=pretrained))
        assert "\n" not in str(raised.value)
    told = json.loads((tmp_path / "vle" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "vle" / "config.json").write_text(json.dumps({**told, "hidden_size": 32}))
    with pytest.raises(UserError, match=r"encoder\.pretrained"):
        build_stack(encoder_recipe())
