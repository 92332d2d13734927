"""VisualGLM-6B against values of its own code, all four parts read out of one checkpoint in the published layout."""

from __future__ import annotations

import pytest

from support.golden import Golden, assert_close, save_shards


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
