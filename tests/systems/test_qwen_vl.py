"""Qwen-VL's tower and resampler against values of its own code, before another language model."""

from __future__ import annotations

import torch

from support.golden import RATES, Golden, assert_close, check_learning, save_shards, small_llama
from vlm_sft import load_recipe
from vlm_sft.pieces.layouts import LAYOUTS
from vlm_sft.systems.position_tables import resize_positions
from vlm_sft.systems.qwen_vl import sincos_positions


def qwen_stack(golden, folder, llm):
    c = golden.config
    state = {c["key_prefix_in_full_model"] + n: t for n, t in golden.tensors().items()}
    state |= {"transformer.wte.weight": torch.zeros(4, 4), "lm_head.weight": torch.zeros(4, 4)}
    pretrained = save_shards(folder, state, {"model_type": "qwen", "visual": {}})
    return {
        "vision_tower": {"pretrained": pretrained, "config": {"num_attention_heads": c["heads"],
                                                              "image_size": c["image_size"]}},
        "resampler": {"type": "cross_attention", "pretrained": pretrained,
                      "config": {"num_attention_heads": c["resampler_heads"]}},
        "projector": {"type": "linear_no_bias", "pretrained": pretrained},
        "language_model": llm,
    }  # fmt: skip


def test_qwen_vl_visual_before_another_language_model(golden_stack, save_llm, tmp_path):
    golden = Golden("qwen_vl_visual")
    c, pixels, wanted = golden.config, golden.inputs["pixel_values"], golden.outputs
    built = golden_stack(**qwen_stack(golden, tmp_path / "qwen", save_llm(small_llama(c["output_dim"]))))
    model = built.model.model
    assert built.processor.num_image_tokens == c["n_queries"]
    patches = (c["image_size"] // c["patch_size"]) ** 2
    assert_close(resize_positions(model.vision_tower.positional_embedding, patches), wanted["vit_pos_interpolated"])
    assert_close(resize_positions(model.resampler.pos_embed, patches), wanted["pos_embed_interpolated"])
    vit_out = model.vision_tower(pixels).last_hidden_state
    assert_close(vit_out, wanted["vit_out"])
    assert_close(model.resampler.pool(vit_out), wanted["resampler_out"])
    assert_close(model.get_image_features(pixels), wanted["features"])


def test_positions_are_made_as_the_checkpoint_has_them():
    golden = Golden("qwen_vl_visual")
    table = golden.tensors()["attn_pool.pos_embed"]
    assert_close(sincos_positions(golden.config["output_dim"], golden.config["n_queries"]), table)


def test_it_learns_and_comes_back_from_a_bundle(recipe_file, save_llm, tmp_path):
    golden = Golden("qwen_vl_visual")
    stack = qwen_stack(golden, tmp_path / "qwen", save_llm(small_llama(golden.config["output_dim"])))
    check_learning(load_recipe(recipe_file(stack=stack, train=RATES)))


def test_published_sizes_need_no_statement():
    shapes = {
        "conv1.weight": (1664, 3, 14, 14),
        "attn_pool.query": (256, 4096),
        "attn_pool.kv_proj.weight": (4096, 1664),
    }
    shapes |= {f"transformer.resblocks.{i}.mlp.c_fc.weight": (8192, 1664) for i in range(48)}
    vision = LAYOUTS["qwen_vl_vision"].configure(shapes, {})
    assert (vision.num_hidden_layers, vision.num_attention_heads, vision.image_size) == (48, 16, 448)
    assert LAYOUTS["qwen_vl_resampler"].configure(shapes, {}).num_attention_heads == 32
