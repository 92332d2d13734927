"""Which stacks a class of transformers equals, what it is given of them, and what is refused in one sentence."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from support.bundles import BLIP2, LLAVA
from vlm_sft.base.errors import UserError
from vlm_sft.export.native_model import (
    llava_features,
    native_form,
    native_generation,
    native_model,
    to_causal_lm,
)
from vlm_sft.stack.build_stack import build_stack
from vlm_sft.stack.vocabulary import grow_vocabulary

NONE = {
    "pixel_shuffle": ({**LLAVA, "projector": {"type": "pixel_shuffle"}}, "no class has a pixel_shuffle projector"),
    "Q-Former and mlp": ({**BLIP2, "projector": {"type": "mlp"}}, "BLIP-2's projector is linear, this one is mlp"),
    "mlp of depth 3": ({**LLAVA, "projector": {"type": "mlp", "depth": 3}}, "an mlp of depth 2, and this is not"),
    "dynamic tiles": ({**LLAVA, "vision": {**LLAVA["vision"], "tiles": "dynamic"}}, "not cut an image into `dynamic`"),
    "linear": ({**LLAVA, "projector": {"type": "linear"}}, "an mlp of depth 2, and this is not"),
    "BLIP-2's ViT before an mlp": ({**LLAVA, "tower": "blip2"}, "cannot hold a 'blip_2_vision_model'"),
    "an earlier layer": ({**BLIP2, "vision": {"feature_layer": -2}}, "reads every token after the ViT's last norm"),
}


@pytest.mark.parametrize("case", NONE)
def test_what_has_no_native_form_says_so_in_one_sentence(case, bundle_recipe):
    stack, sentence = NONE[case]
    model = build_stack(bundle_recipe(**stack)).model
    with pytest.raises(UserError, match=rf"has no native form in transformers: .*{sentence}.*; use --to bundle-merged"):
        native_form(model)


def test_towers_and_epsilons_that_the_classes_read_otherwise(stack_recipe, bundle_recipe):
    siglip = build_stack(stack_recipe("siglip", projector="mlp")).model
    with pytest.raises(UserError, match="feature_layer -1 is read after the tower's last norm here"):
        native_form(siglip)
    assert native_form(build_stack(stack_recipe("siglip", projector="mlp", vision={"feature_layer": -2})).model)
    blip2 = build_stack(bundle_recipe(**BLIP2)).model
    blip2.model.vision_tower.post_layernorm.eps = 1e-5
    with pytest.raises(UserError, match="post_layernorm of its ViT has the epsilon 1e-05, BLIP-2's class 1e-06"):
        native_form(blip2)


@pytest.mark.parametrize("lm", ["llama", "opt"])
def test_new_rows_of_the_vocabulary_are_never_the_likeliest(lm, bundle_recipe):
    model = build_stack(bundle_recipe(**{**LLAVA, "lm": lm})).model
    old = model.get_input_embeddings().num_embeddings
    hidden = torch.randn(50, 32)
    before = model.lm_head(hidden)
    grow_vocabulary(model, old + 3)
    after = model.lm_head(hidden)
    assert torch.equal(after[:, :old], before) or torch.allclose(after[:, :old], before, atol=1e-6)
    assert after.shape[1] == old + 3 and (after.argmax(-1) < old).all()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (lm == "opt")


def test_answers_end_where_the_template_ends_them(bundle_recipe):
    stack = build_stack(bundle_recipe(**LLAVA))
    config = native_generation(stack.model, stack.processor, {"max_new_tokens": 7})
    assert isinstance(config, GenerationConfig) and config.eos_token_id == [2] and config.max_new_tokens == 7


def test_a_line_break_that_ends_answers_is_an_id_there(bundle_recipe):
    stack = build_stack(bundle_recipe(**{**LLAVA, "chat_template": "plain"}))
    assert stack.processor.end_of_answer == "\n"
    (line_break,) = stack.processor.tokenizer("\n", add_special_tokens=False).input_ids
    config = native_generation(stack.model, stack.processor, {})
    assert config.eos_token_id == sorted({2, line_break}) and config.stop_strings is None


@pytest.mark.parametrize(("select", "wanted"), [("patch", ("default", 1)), ("full", ("full", 1))])
def test_llava_is_told_which_tokens_of_its_tower_to_read(bundle_recipe, select, wanted):
    vision = {"feature_layer": -2, "feature_select": select}
    assert llava_features(build_stack(bundle_recipe(**{**LLAVA, "vision": vision})).model) == wanted


@pytest.mark.parametrize("stack", [LLAVA, BLIP2], ids=["LLaVA", "BLIP-2"])
def test_the_native_model_shares_the_weights_and_looks_the_placeholder_up(bundle_recipe, stack):
    built = build_stack(bundle_recipe(**stack))
    tower, head = built.model.model.vision_tower, built.model.lm_head
    native = native_model(built.model, built.processor, {"max_new_tokens": 5})
    assert {id(p) for p in (*tower.parameters(), *head.parameters())} <= {id(p) for p in native.parameters()}
    assert native.config.image_token_id == built.processor.image_token_id < native.get_input_embeddings().num_embeddings
    assert native.generation_config.max_new_tokens == 5 and not native.training
    assert not [name for name, tensor in native.state_dict().items() if tensor.is_meta]


@pytest.mark.parametrize("lm", ["llama", "opt"])
def test_the_language_model_by_itself_is_the_class_it_came_from(bundle_recipe, lm):
    model = build_stack(bundle_recipe(**{**LLAVA, "lm": lm})).model.eval()
    causal, ids = to_causal_lm(model).eval(), torch.tensor([[1, 40, 41, 42]])
    assert type(causal).__name__ == {"llama": "LlamaForCausalLM", "opt": "OPTForCausalLM"}[lm]
    with torch.no_grad():
        assert torch.allclose(causal(ids).logits, model(input_ids=ids).logits, atol=1e-5)
