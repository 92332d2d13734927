"""A stack and an existing VLM behind the same questions; which of the two it is, is asked in one place."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from support.paths import ROOT
from support.tiny_families import processor_of, tiny
from vlm_sft import load_recipe
from vlm_sft.base.names import PARTS
from vlm_sft.families.build_family import FamilyKind
from vlm_sft.pieces.piece import specs_of
from vlm_sft.stack.build_stack import build_stack
from vlm_sft.stack.fit import check_texts
from vlm_sft.stack.kinds import StackKind, compose, kind_of
from vlm_sft.stack.precision import dtypes_of


@pytest.fixture
def model_recipe(recipe_file):
    def make(name="llava", **changes):
        model = {"pretrained": str(tiny(name)), "processor": {}}
        return load_recipe(recipe_file(stack=None, model=model, chat_template=None, **changes))

    return make


def test_the_kind_is_told_by_the_names_of_the_pieces(stack_recipe, model_recipe):
    for recipe, kind in ((stack_recipe("clip"), StackKind), (model_recipe(), FamilyKind)):
        assert isinstance(kind_of(specs_of(recipe)), kind), "of a recipe"
        assert isinstance(kind_of(compose(recipe).pieces), kind), "of what was composed"
    assert isinstance(kind_of({}), StackKind), "of a bundle that was saved without its recipe"


def test_nobody_else_asks_which_of_the_two_it_is():
    """The rules of a recipe do: they are about its keys."""
    question = re.compile(r"isinstance\([^()]*Family|\.(model|stack) is (not )?None|\"model\" (not )?in ")
    rooms = ROOT / "vlm_sft"
    asked = [
        path.relative_to(rooms).as_posix()
        for path in sorted(rooms.rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if question.search(line) and "assert" not in line and path.parent.name != "recipe"
    ]
    assert asked == ["stack/kinds.py"]


def test_what_they_call_their_base_and_what_lies_in_it():
    assert (StackKind.base, StackKind.covers) == ("language_model", ("language_model",))
    assert (FamilyKind.base, FamilyKind.covers) == ("model", PARTS)
    assert FamilyKind.settled == {} and StackKind.settled["stack.projector.pretrained"] is None


def test_another_base_is_put_into_the_recipe_and_the_old_one_stays(stack_recipe, model_recipe):
    changes = {"pretrained": "合并", "revision": None, "dtype": "bfloat16"}
    for recipe in (stack_recipe("clip", language={"trust_remote_code": True}), model_recipe()):
        kind = kind_of(specs_of(recipe))
        old, new = specs_of(recipe)[kind.base], specs_of(kind.with_base(recipe, changes))[kind.base]
        assert (new.pretrained, new.dtype) == ("合并", "bfloat16") and old.pretrained != "合并"
        assert not getattr(new, "trust_remote_code", False)


def test_parts_are_cast_to_the_types_of_a_recipe(stack_recipe, model_recipe):
    types = {"sft": {"output_dir": "out", "bf16": True}, "train": {"projector": 1e-3}}
    for recipe in (stack_recipe("clip", **types), model_recipe(**types)):
        model, kind = build_stack(recipe).model, kind_of(specs_of(recipe))
        wanted = {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert set(wanted.values()) == {torch.bfloat16, torch.float32}
        model.float()
        kind.cast(model, recipe, dtypes_of(recipe))
        assert {name: parameter.dtype for name, parameter in model.named_parameters()} == wanted


def test_a_processor_is_read_from_the_folder_of_a_bundle(stack_recipe, model_recipe, tmp_path):
    for number, recipe in enumerate((stack_recipe("clip"), model_recipe())):
        composed, folder = compose(recipe), tmp_path / str(number)
        composed.processor.save_pretrained(folder)
        again = kind_of(composed.pieces).read_processor(folder, recipe, composed.config)
        assert type(again) is type(composed.processor)
        chat = [{"role": "user", "content": [{"type": "text", "text": "你好"}]}, {"role": "assistant", "content": "Hi"}]
        assert again.encode_chat(chat).input_ids == composed.processor.encode_chat(chat).input_ids


def test_a_stack_says_what_was_done_and_an_existing_model_has_nothing_to_say(stack_recipe, model_recipe):
    recipe = stack_recipe("clip", language={"trust_remote_code": True})
    said = list(StackKind().remarks(recipe, compose(recipe)))
    assert any("had no <image> token: it was added" in remark for remark in said)
    assert any(remark.startswith("stack.language_model.trust_remote_code is on: code from") for remark in said)
    recipe = model_recipe()
    assert list(FamilyKind().remarks(recipe, compose(recipe))) == []
    assert type(compose(recipe).processor) is type(processor_of("llava"))


def test_what_was_taken_over_is_marked_where_it_came_into():
    stack, model = {"vision_tower": {}, "language_model": {}}, {"model": {"pretrained": "猫"}}
    kind_of(stack).mark_taken(stack, ["projector", "language_model"], "阶段一")
    assert stack == {"vision_tower": {}, "language_model": {"init_from": "阶段一"}}
    kind_of(model).mark_taken(model, ["projector", "language_model"], "阶段一")
    assert model["model"] == {"pretrained": "猫", "init_from": "阶段一", "held": ["language_model", "projector"]}


def test_zero_3_cuts_no_model_while_it_is_made(stack_recipe, model_recipe):
    """Without DeepSpeed here, a model that is still made so asks for it, and fails."""
    settings = mock.Mock(**{"is_zero3.return_value": True})  # held here: transformers has a weak reference
    for recipe in (stack_recipe("clip"), model_recipe()):
        set_hf_deepspeed_config(settings)
        try:
            composed = compose(recipe)
            check_texts(composed.config, composed.processor, 16)
            model = build_stack(recipe, composed=composed).model
        finally:
            unset_hf_deepspeed_config()
        assert all(parameter.numel() for parameter in model.parameters())
