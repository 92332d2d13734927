"""Sizes follow from the pieces before any weight is read: image tokens, pixels, and what cannot be folded."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from vlm_sft.base.errors import UserError
from vlm_sft.stack.build_stack import build_stack
from vlm_sft.stack.compose import count_image_tokens
from vlm_sft.stack.kinds import compose
from vlm_sft.systems.qwen_vl import QwenVLResamplerConfig

PATCH = {"vision": {"feature_select": "patch"}}


@pytest.fixture
def recipe(stack_recipe):
    return stack_recipe


COUNTS = [
    ({"tower": "blip2", "resampler": "blip2"}, 4),
    ({"tower": "blip2", "resampler": "blip2", **PATCH}, 4),
    ({"tower": "clip"}, 17),
    ({"tower": "clip", **PATCH}, 16),
    ({"tower": "clip", "vision": {"feature_layer": -2, "feature_select": "patch"}, "projector": "mlp"}, 16),
    ({"tower": "clip", **PATCH, "projector": "pixel_shuffle"}, 4),
    ({"tower": "clip", **PATCH, "projector": "pixel_shuffle", "projector_options": {"scale_factor": 4}}, 1),
    ({"tower": "siglip"}, 16),
    ({"tower": "siglip", **PATCH}, 16),
    ({"tower": "siglip", "projector": "pixel_shuffle"}, 4),
    ({"tower": "dino"}, 17),  # 28 pixels, although the tower was made for 56
]


@pytest.mark.parametrize(("stack", "tokens"), COUNTS)
def test_image_tokens_are_counted_as_the_model_makes_them(stack, tokens, recipe):
    built = build_stack(recipe(**stack))
    assert built.processor.num_image_tokens == built.model.config.num_image_tokens == tokens

    pixels = built.processor.encode_images([Image.new("RGB", (50, 30), "red"), Image.new("RGB", (9, 90))])
    assert built.model.eval().get_image_features(pixels).shape == (2, tokens, 32)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "这是什么？"}]},
               {"role": "assistant", "content": "a cat"}]  # fmt: skip
    ids = built.processor.encode_chat(message).input_ids
    assert ids.count(built.model.config.image_token_id) == tokens


def test_what_cannot_be_folded_says_how_to_mend_it(recipe):
    with pytest.raises(UserError, match=r"gives 17 tokens an image; set vision_tower\.feature_select: patch"):
        compose(recipe("clip", projector="pixel_shuffle"))
    with pytest.raises(UserError, match="side can be divided by scale_factor 3, but the vision tower gives 16 tokens"):
        compose(recipe("clip", projector="pixel_shuffle", projector_options={"scale_factor": 3}, **PATCH))


def test_a_class_token_has_no_place_in_the_square_of_cross_attention(recipe):
    config = compose(recipe("clip")).config
    config.resampler_type, config.num_query_tokens = "cross_attention", 4
    config.resampler_config = QwenVLResamplerConfig(hidden_size=16, num_attention_heads=2, encoder_hidden_size=16)
    with pytest.raises(UserError, match=r"gives 17 features an image; set stack\.vision_tower\.feature_select: patch"):
        count_image_tokens(config)
    config.vision_feature_select = "patch"
    assert count_image_tokens(config) == 4


def test_images_of_another_size_than_the_towers_are_an_error(recipe, more_pieces, tmp_path):
    """BLIP-2's tower would take them and read the wrong positions."""
    for name in ("blip2", "clip", "siglip"):
        folder = tmp_path / name
        shutil.copytree(more_pieces[name], folder)
        path = folder / "preprocessor_config.json"
        config = json.loads(path.read_text())
        config["size"] = config["crop_size"] = {"height": 14, "width": 14}
        path.write_text(json.dumps(config))
        with pytest.raises(UserError, match="gives images of 14×14 pixels but its vision tower was made for 28×28"):
            compose(recipe(str(folder)))
        config.update(size={"shortest_edge": 28}, crop_size=None, do_center_crop=False)
        path.write_text(json.dumps(config))
        if name == "clip":
            with pytest.raises(UserError, match="not turn each image into one picture of a fixed size"):
                compose(recipe(str(folder)))
    # DINOv2 fits its position table to the image; its patches are counted from the image that arrives.
    config = compose(recipe("dino", **PATCH)).config
    assert config.num_image_tokens == (28 // config.vision_config.patch_size) ** 2
