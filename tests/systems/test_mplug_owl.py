"""mPLUG-Owl's tower and abstractor against values of its own code, read out of one checkpoint of all four parts."""

from __future__ import annotations

import torch

from support.golden import RATES, Golden, assert_close, check_learning, save_shards, small_llama
from vlm_sft import load_recipe
from vlm_sft.pieces.layouts import LAYOUTS


def owl_stack(golden, folder):
    c = golden.config
    text = {**c["text_config"], "rms_norm_eps": c["text_rms_norm_eps"]}
    pretrained = save_shards(folder, golden.tensors(), {"model_type": "mplug-owl", "text_config": text})
    vision, resampler = c["vision_config"], c["visual_abstractor_config"]
    return {
        "vision_tower": {"pretrained": pretrained, "config": {"num_attention_heads": vision["num_attention_heads"]}},
        "resampler": {"type": "abstractor", "pretrained": pretrained,
                      "config": {"num_attention_heads": resampler["num_attention_heads"]}},
        "projector": {"type": "linear_end", "pretrained": pretrained},
        "language_model": {"pretrained": pretrained},
    }  # fmt: skip


def test_mplug_owl_with_all_parts_from_one_checkpoint(golden_stack, tmp_path):
    golden = Golden("mplug_owl")
    c, inputs, wanted = golden.config, golden.inputs, golden.outputs
    built = golden_stack(**owl_stack(golden, tmp_path / "owl"))
    model = built.model
    assert model.config.num_image_tokens == built.processor.num_image_tokens == c["tokens_per_image"]
    vision_last = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
    assert_close(vision_last, wanted["vision_last"])
    assert_close(model.model.resampler(vision_last), wanted["abstractor_hidden"])
    assert_close(model.get_image_features(inputs["pixel_values"]), wanted["image_tokens"])
    ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == c["media_token_id"], model.config.image_token_id)
    assert_close(model.model.embed(ids, inputs["pixel_values"]), wanted["inputs_embeds"])
    masks = inputs["non_padding_mask"] * inputs["non_media_mask"] * inputs["prompt_mask"]
    labels = torch.cat([ids[:, :1], ids[:, 1:].masked_fill(masks == 0, -100)], dim=1)
    assert torch.equal(labels, wanted["labels"])
    output = model(
        input_ids=ids, attention_mask=inputs["attention_mask"], labels=labels, pixel_values=inputs["pixel_values"]
    )
    real = inputs["attention_mask"].bool()
    assert_close(output.logits[real], wanted["logits"][real])
    assert_close(output.loss, wanted["loss"])


def test_it_learns_and_comes_back_from_a_bundle(recipe_file, save_llm, tmp_path):
    stack = owl_stack(Golden("mplug_owl"), tmp_path / "owl")
    stack["language_model"] = save_llm(small_llama(40))
    stack["projector"].pop("pretrained")
    check_learning(load_recipe(recipe_file(stack=stack, train=RATES)))


def test_published_sizes_need_no_statement():
    shapes = {"embeddings.position_embedding": (1, 257, 1024), "embeddings.patch_embed.weight": (1024, 3, 14, 14)}
    shapes |= {f"encoder.layers.{i}.mlp.fc1.weight": (4096, 1024) for i in range(24)}
    vision = LAYOUTS["mplug_owl_vision"].configure(shapes, {})
    assert (vision.num_hidden_layers, vision.num_attention_heads, vision.image_size) == (24, 16, 224)
