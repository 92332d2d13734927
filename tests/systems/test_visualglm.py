"""VisualGLM-6B against values of its own code, all four parts read out of one checkpoint in the published layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from support.conversations import turn
from support.golden import RATES, Golden, assert_close, check_learning, save_shards
from support.ice_text import ids_of
from support.tiny_pieces import tiny_stack
from support.visualglm import QUERIES, write_visualglm
from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.export.native_model import native_form
from vlm_sft.pieces.layouts import LAYOUTS
from vlm_sft.pieces.part_configs import find_resampler, find_vision_tower
from vlm_sft.recipe.sections import Resampler, VisionTower
from vlm_sft.stack.build_stack import build_stack


def glm_stack(golden, folder):
    """The `stack:` of a recipe, of a folder as THUDM/visualglm-6b is: `.bin` shards, an index, one config.json."""
    c = golden.config
    config = {"model_type": "chatglm", **c["lm"], "eva_config": c["eva"], "qformer_config": c["qf"],
              "image_length": c["image_length"], "position_encoding_2d": c["position_encoding_2d"]}  # fmt: skip
    pretrained = save_shards(folder, golden.tensors(), config)
    return {
        "vision_tower": {"pretrained": pretrained},
        "resampler": {"type": "qformer", "pretrained": pretrained},
        "projector": {"type": "linear", "pretrained": pretrained},
        "language_model": {"pretrained": pretrained},
    }


@pytest.fixture
def golden():
    return Golden("visualglm")


@pytest.fixture
def model(golden, golden_stack, tmp_path):
    return golden_stack(**glm_stack(golden, tmp_path / "visualglm")).model


def with_images(golden, model, name):
    """Ids of the golden with our image token where its slots are."""
    ids, start = golden.inputs[name].clone(), int(golden.inputs["pre_image_length"])
    ids[:, start : start + golden.config["image_length"]] = model.config.image_token_id
    return ids


def test_image_path(golden, model):
    pixels, wanted = golden.inputs["images"], golden.outputs
    seen = model.model.vision_tower(pixels).last_hidden_state
    assert_close(seen, wanted["vit_out"])
    assert_close(model.model.resampler(seen), wanted["qformer_out"])
    assert_close(model.get_image_features(pixels), wanted["image_embeds"])


def test_forward_with_images(golden, model):
    ids, pixels, wanted = with_images(golden, model, "input_ids"), golden.inputs["images"], golden.outputs
    assert_close(model.model.embed(ids, pixels), wanted["inputs_embeds"])
    output = model(input_ids=ids, pixel_values=pixels, labels=golden.inputs["labels"])
    assert_close(output.logits, wanted["logits"])
    assert_close(output.loss, wanted["loss"])
    ids = with_images(golden, model, "prompt_input_ids")
    assert_close(model(input_ids=ids, pixel_values=pixels).logits, wanted["prompt_logits"])


def greedy(model, inputs, steps):
    """Tokens by whole forwards, without a cache."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(steps):
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids[:, inputs["input_ids"].shape[1] :]


def test_generation_with_a_cache_and_left_padding(golden, model):
    """Prompts of different lengths side by side: each continues as it does alone, and as without a cache."""
    ids, pixels = with_images(golden, model, "prompt_input_ids"), golden.inputs["images"]
    pad = golden.config["lm"]["pad_token_id"]
    start = int(golden.inputs["pre_image_length"]) + golden.config["image_length"]
    shorter = torch.cat([torch.tensor([pad]), ids[1, :start], ids[1, start + 1 :]])
    ids = torch.stack([ids[0], shorter])
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": pad}
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    together = model.generate(**model.generation_inputs(batch, 1), **settings)
    assert torch.equal(together, greedy(model, batch, 5))
    assert torch.equal(model.generate(**batch, **settings)[:, ids.shape[1] :], together)
    alone = {"input_ids": shorter[None, 1:], "attention_mask": mask[1:, 1:], "pixel_values": pixels[1:]}
    assert torch.equal(model.generate(**model.generation_inputs(alone, 1), **settings), together[1:])
    beams = {**settings, "num_beams": 3}
    wanted = model.generate(**model.generation_inputs(batch, 3), **beams, use_cache=False)
    assert torch.equal(model.generate(**model.generation_inputs(batch, 3), **beams), wanted)


# -- a checkpoint with its tokenizer -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_visualglm(tmp_path_factory.mktemp("visualglm-6b"))


def published(folder, **language_model):
    return tiny_stack({}, folder, folder, folder, {"type": "linear", "pretrained": folder}, language=language_model)


@pytest.fixture
def built(folder, recipe_file):
    return build_stack(load_recipe(recipe_file(stack=published(folder), chat_template="visualglm")))


def test_ids_are_upstreams(built):
    processor = built.processor
    images = [processor.image_token_id] * built.model.config.num_image_tokens
    sop, eop, gmask = processor.tokenizer.convert_tokens_to_ids(["<sop>", "<eop>", "[gMASK]"])
    for question, asks, answer in (("这是什么？", "问：{}\n答：", "一只猫。"), ("What is this?", "Q:{}\nA:", "a cat")):
        chat = processor.encode_chat(turn(question, answer, images=1))
        prompt = [*ids_of("<img>"), *images, *ids_of("</img>" + asks.format(question)), gmask, sop]
        assert chat.input_ids == [*prompt, *ids_of(answer), eop]
        assert chat.labels == [-100] * len(prompt) + [*ids_of(answer), eop]
        assert processor.encode_chat(turn(question, "x", images=1)[:1], True).input_ids == prompt


def test_typed_control_tokens_are_text(built):
    processor = built.processor
    chat = processor.encode_chat(turn("<sop> [gMASK] 是什么？", "<eop>还有", images=1))
    control = processor.tokenizer.convert_tokens_to_ids(["<sop>", "[gMASK]", "<eop>"])
    assert [chat.input_ids.count(token) for token in control] == [1, 1, 1]


def test_pixels_are_clips(built):
    picture = Image.new("RGB", (40, 30), (255, 0, 127))
    pixels = built.processor.encode_images([picture])
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    assert_close(pixels[0, :, 3, 3], (torch.tensor([255.0, 0.0, 127.0]) / 255 - mean) / std)


@pytest.mark.slow
def test_every_part_learns_and_comes_back_from_a_bundle(folder, recipe_file):
    check_learning(load_recipe(recipe_file(stack=published(folder), chat_template="visualglm", train=RATES)))


def test_it_has_no_native_form(built):
    for module in built.model.model.vision_tower.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = built.model.config.tower.layer_norm_eps  # as BLIP-2's class has it
    with pytest.raises(
        UserError, match=r"its language model \(chatglm\) is none of transformers' own; use --to bundle-m"
    ):
        native_form(built.model)


def test_sizes_of_the_published_model_need_no_statement():
    eye, asks = LAYOUTS["visualglm_vision"], LAYOUTS["visualglm_qformer"]
    shapes = {"transformer.word_embeddings.weight": (1, 1408), "transformer.position_embeddings.weight": (257, 1408),
              "mixins.patch_embedding.proj.weight": (1408, 3, 14, 14)}  # fmt: skip
    shapes |= {f"transformer.layers.{i}.mlp.dense_h_to_4h.weight": (6144, 1408) for i in range(39)}
    vision = eye.configure(shapes, {})
    assert (vision.num_hidden_layers, vision.num_attention_heads, vision.image_size) == (39, 16, 224)
    assert (vision.intermediate_size, vision.layer_norm_eps, vision.post_layernorm_eps) == (6144, 1e-6, 1e-5)
    shapes = {"layers.0.input_layernorm.weight": (768,), "layers.11.input_layernorm.weight": (768,),
              "layers.0.mlp.dense_h_to_4h.weight": (3072, 768)}  # fmt: skip
    for layer in range(0, 12, 2):
        shapes[f"layers.{layer}.cross_attention.query.weight"] = (768, 768)
        shapes[f"layers.{layer}.cross_attention.key_value.weight"] = (1536, 1408)
    qformer = asks.configure(shapes, {})
    assert (qformer.num_hidden_layers, qformer.num_attention_heads, qformer.encoder_hidden_size) == (12, 12, 1408)
    assert (qformer.cross_attention_frequency, qformer.layer_norm_eps) == (2, 1e-12)


def test_heads_are_those_of_its_config_or_the_recipes(folder):
    eye = {"pretrained": folder}
    assert find_vision_tower(VisionTower(**eye)).config.num_attention_heads == 4
    found = find_resampler(Resampler(type="qformer", **eye, config={"num_attention_heads": 4}))
    assert (found.config.num_attention_heads, found.config.hidden_size, found.num_query_tokens) == (4, QUERIES, 4)


def test_a_checkpoint_without_its_vocabulary_is_said(folder, tmp_path, recipe_file):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(Path(folder) / "config.json", bare)
    stack = {**published(folder), "language_model": {"pretrained": str(bare)}}
    with pytest.raises(UserError, match=r"stack\.language_model\.pretrained: .* has no tokenizer"):
        build_stack(load_recipe(recipe_file(stack=stack, chat_template="visualglm")))
