"""Pieces → stack: widths, types, the freeze plan, and everything that does not fit."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
)

from vlm_sft.base.errors import UserError
from vlm_sft.batch.processor import VLMProcessor
from vlm_sft.pieces import checkpoints
from vlm_sft.stack.build_stack import build_empty_stack, build_stack, match_embeddings, plan_of
from vlm_sft.stack.precision import dtype_of

PATCH = {"vision": {"feature_select": "patch"}}


@pytest.fixture
def recipe(stack_recipe):
    return stack_recipe


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    """Fails when a file of weights is opened."""

    def refuse(path, *args, **kwargs):
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(checkpoints, "_open", refuse)
    monkeypatch.setattr(checkpoints, "_load_bin", refuse)
    monkeypatch.setattr("transformers.modeling_utils.safe_open", refuse)
    monkeypatch.setattr("transformers.modeling_utils.load_state_dict", refuse)


@pytest.mark.usefixtures("no_weights")
def test_widths_that_do_not_fit_name_both_parts_and_sizes_before_weights_are_read(recipe):
    sentence = r"vision tower gives features of width 32 but the resampler of '.*blip2' reads width 24; take both from"
    with pytest.raises(UserError, match=sentence):
        build_stack(recipe("wide", resampler="blip2"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("layer", [-5, 4, 23, -24])
def test_a_feature_layer_that_the_tower_does_not_have(layer, recipe):
    with pytest.raises(UserError, match=rf"feature_layer is {layer}, but the vision tower has 3 layers: .* -4 to 3\."):
        build_stack(recipe("clip", vision={"feature_layer": layer}))


@pytest.mark.parametrize("layer", [-4, -2, -1, 0, 3])
def test_every_feature_layer_that_the_tower_has(layer, recipe):
    stack = build_stack(recipe("siglip", vision={"feature_layer": layer}))
    pixels = torch.randn(1, 3, 28, 28)
    output = stack.model.model.vision_tower.eval()(pixels, output_hidden_states=True)
    wanted = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    assert torch.equal(stack.model.eval().model.encode_images(pixels), wanted)
    assert not torch.equal(output.last_hidden_state, output.hidden_states[-1]), "SigLIP has a norm between them"


@pytest.mark.usefixtures("no_weights")
def test_pieces_of_the_wrong_kind_are_named_before_weights_are_read(recipe, tmp_path, more_pieces):
    with pytest.raises(
        UserError, match=r"stack\.language_model\.pretrained: a 'clip_text_model' checkpoint is no causal"
    ):
        build_stack(recipe("clip", lm="clip"))
    with pytest.raises(UserError, match=r"stack\.resampler\.pretrained: a 'clip' checkpoint holds no Q-Former"):
        build_stack(recipe("clip", resampler="clip"))
    with pytest.raises(UserError, match=r"stack\.vision_tower\.pretrained: a 'llama' checkpoint holds no vision tower"):
        build_stack(recipe("llama"))
    with pytest.raises(UserError, match=r"stack\.vision_tower\.pretrained: 'openai/none' is no folder here and could"):
        build_stack(recipe("openai/none"))
    shutil.copytree(more_pieces["clip"], tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"has no image processor \(preprocessor_config\.json\)"):
        build_stack(recipe(str(tmp_path / "clip")))


# -- what is said ------------------------------------------------------------------------------------------------------


def test_tokens_that_were_added_and_code_that_is_run_are_said(recipe):
    said = []
    on = {"trust_remote_code": True}
    build_stack(recipe("clip", vision=on, language=on), say=said.append)
    text = "\n".join(said)
    assert "had no <image> token: it was added" in text and "had no <pad> token: it was added" in text
    assert re.search(r"stack\.vision_tower\.trust_remote_code is on: code from .*clip is executed", text)
    assert re.search(r"stack\.language_model\.trust_remote_code is on", text)


def test_nothing_is_said_when_nothing_was_done(recipe, tokenizer, more_pieces, tmp_path):
    shutil.copytree(more_pieces["llama"], tmp_path / "llama")
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path / "llama")
    said = []
    stack = build_stack(recipe("clip", lm=str(tmp_path / "llama")), say=said.append)
    assert said == [] and isinstance(stack.processor, VLMProcessor)


# -- types and plan ----------------------------------------------------------------------------------------------------

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [
    ({"bf16": None}, {"projector": 1e-3}, F32, F32),  # a CPU, on which the tests run
    ({"bf16": True}, {"projector": 1e-3}, BF16, BF16),
    ({"bf16": False}, {"projector": 1e-3}, F32, F32),
    ({"bf16": False, "fp16": True}, {"projector": 1e-3}, F16, F16),
    ({"bf16": None, "fp16": True}, {"projector": 1e-3}, F16, F16),
    ({"bf16": True}, {"language_model": 1e-5}, BF16, F32),
    ({"bf16": True}, {"vision_tower": 1e-5}, F32, BF16),
]


@pytest.mark.parametrize(("sft", "train", "tower", "lm"), DTYPES)
def test_frozen_parts_have_the_type_of_the_run_and_trained_ones_fp32(sft, train, tower, lm, recipe):
    made = recipe(sft=sft, train=train)
    assert (dtype_of(made, "vision_tower"), dtype_of(made, "language_model")) == (tower, lm)
    assert dtype_of(made, "projector") == (F32 if "projector" in train else dtype_of(made, "projector"))


def test_the_recipe_can_say_the_type(recipe):
    made = recipe("clip", vision={"dtype": "float16"}, language={"dtype": "bfloat16"}, train={"language_model": 1e-5})
    assert (dtype_of(made, "vision_tower"), dtype_of(made, "language_model")) == (F16, BF16)
    model = build_stack(made).model
    types = {name: p.dtype for name, p in model.named_parameters()}
    assert {t for n, t in types.items() if "vision_tower" in n} == {F16}
    assert {t for n, t in types.items() if "language_model" in n or "lm_head" in n} == {BF16}
    assert {t for n, t in types.items() if "projector" in n} == {F32}


@pytest.mark.parametrize("resampler", [None, "blip2"])
def test_a_stack_of_half_precision_runs(resampler, recipe):
    stack = build_stack(recipe("blip2", resampler=resampler, sft={"bf16": True}))
    tokens = stack.processor.num_image_tokens
    ids = torch.tensor([[1, *[stack.processor.image_token_id] * tokens, 7]])
    logits = stack.model.eval()(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28)).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_the_plan_freezes_what_is_not_named(recipe):
    stack = build_stack(recipe("blip2", resampler="blip2", train={"projector": 1e-3, "resampler": 1e-4}))
    trained = {n.split(".")[1] for n, p in stack.model.named_parameters() if p.requires_grad}
    assert trained == {"projector", "resampler"}
    assert stack.plan.train == {"projector": 1e-3, "resampler": 1e-4} and stack.plan.adapter_rate is None
    with_lora = recipe(lora={"r": 2}, sft={"learning_rate": 3e-4})
    assert plan_of(with_lora).adapter_rate == 3e-4
    assert plan_of(recipe(lora={"r": 2})).adapter_rate == 2e-5  # SFTConfig's own default


def test_the_projectors_revision_is_asked_for(recipe, more_pieces, monkeypatch):
    asked = []
    monkeypatch.setattr("vlm_sft.stack.kinds.load_projector_weights", lambda *args: asked.append(args[1:]))
    options = {"pretrained": more_pieces["blip2"], "revision": "v2"}
    build_stack(recipe("blip2", resampler="blip2", projector_options=options))
    assert asked == [(more_pieces["blip2"], "v2")]


def test_a_published_projector_is_taken(recipe, more_pieces):
    stack = build_stack(recipe("blip2", resampler="blip2", projector_options={"pretrained": more_pieces["blip2"]}))
    state = load_file(f"{more_pieces['blip2']}/model.safetensors")
    assert torch.equal(stack.model.model.projector.linear.weight, state["language_projection.weight"])


def test_pieces_say_where_they_came_from(recipe, more_pieces, monkeypatch, tmp_path):
    stack = build_stack(recipe("blip2", resampler="blip2"))
    assert set(stack.pieces) == {"vision_tower", "resampler", "language_model"}
    prints = {part: piece["fingerprint"] for part, piece in stack.pieces.items()}
    assert len(set(prints.values())) == 3 and all(len(p) == 16 for p in prints.values())
    assert stack.pieces["language_model"]["path"] == more_pieces["llama"]
    # The rest of the checkpoint does not matter to the tower.
    shutil.copytree(more_pieces["blip2"], tmp_path / "blip2")
    state = load_file(tmp_path / "blip2" / "model.safetensors")
    state["query_tokens"] += 1
    save_file(state, tmp_path / "blip2" / "model.safetensors", metadata={"format": "pt"})
    again = build_stack(recipe(str(tmp_path / "blip2"), resampler=str(tmp_path / "blip2"))).pieces
    assert again["vision_tower"]["fingerprint"] == prints["vision_tower"]
    assert again["resampler"]["fingerprint"] != prints["resampler"]


# -- the dry run -------------------------------------------------------------------------------------------------------

STACKS = [
    {"tower": "blip2", "resampler": "blip2"},
    {"tower": "clip", "projector": "mlp", **PATCH},
    {"tower": "siglip", "lm": "opt", "projector": "pixel_shuffle"},
    {"tower": "dino", "lm": "gpt2"},
]


@pytest.mark.parametrize("stack", STACKS)
def test_an_empty_stack_has_every_name_shape_and_type(stack, recipe, monkeypatch):
    made = recipe(**stack, sft={"bf16": True}, train={"projector": 1e-3})
    full = build_stack(made)

    def refuse(*args, **kwargs):
        raise AssertionError("a file of weights was opened")

    for name in ("vlm_sft.pieces.checkpoints._open", "vlm_sft.pieces.checkpoints._load_bin", "torch.load",
                 "transformers.modeling_utils.safe_open", "transformers.modeling_utils.load_state_dict"):  # fmt: skip
        monkeypatch.setattr(name, refuse)
    empty = build_empty_stack(made)
    assert all(p.is_meta for p in empty.model.parameters()) and empty.pieces == {}

    def facts(model):
        return {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()}

    assert facts(empty.model) == facts(full.model)
    assert empty.model.config.to_dict() == full.model.config.to_dict()
    assert empty.plan.table(empty.model).row_count == full.plan.table(full.model).row_count


# -- the projector's scale ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", ["linear", "mlp", "pixel_shuffle"])
def test_match_embeddings_gives_the_output_the_size_of_the_embeddings(projector, recipe):
    made = recipe("clip", projector=projector, projector_options={"init": "match_embeddings"}, **PATCH)
    model = build_stack(made).model
    with torch.no_grad():
        for parameter in model.model.projector.parameters():
            parameter.mul_(30)
    pixels = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    before = model.eval().get_image_features(pixels)
    model.train()
    factor = match_embeddings(model, pixels)
    assert model.training, "the mode is as it was"
    after = model.eval().get_image_features(pixels)
    rms = after.pow(2).mean().sqrt()
    torch.testing.assert_close(rms, model.get_input_embeddings().weight.pow(2).mean().sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(after, before * factor, rtol=1e-4, atol=1e-6)
    assert all(p.requires_grad for p in model.model.projector.parameters())


def test_match_embeddings_matches_what_is_read_from_the_table(recipe):
    """Gemma 3 scales it by the square root of its width."""
    model = build_stack(recipe("clip", projector="linear", **PATCH)).model.eval()
    table = model.get_input_embeddings()
    table.register_forward_hook(lambda module, given, rows: rows * 4)
    pixels = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    match_embeddings(model, pixels)
    size = model.get_image_features(pixels).pow(2).mean().sqrt()
    torch.testing.assert_close(size, table.weight.pow(2).mean().sqrt() * 4, rtol=1e-4, atol=0)


def test_a_model_without_weights_is_told_apart_from_one_with(recipe, more_pieces):
    """The composed model has the very weights of its language model, head included."""
    model = build_stack(recipe("clip", lm="gpt2")).model.eval()
    native = AutoModelForCausalLM.from_pretrained(more_pieces["gpt2"]).eval()
    ids = torch.tensor([[1, 5, 9, 2]])
    assert torch.equal(model(input_ids=ids).logits, native(ids).logits)
    assert model.lm_head.weight is model.get_input_embeddings().weight, "GPT-2 ties its head"
