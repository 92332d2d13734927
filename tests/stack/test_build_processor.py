"""The processor of a stack: each piece brings its own, and what is missing is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from vlm_sft.base.errors import UserError
from vlm_sft.stack.kinds import compose

PHOTO = Image.linear_gradient("L").resize((50, 30)).convert("RGB")


def copied(folder, tmp_path, *without: str) -> str:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for name in without:
        (copy / name).unlink()
    return str(copy)


def test_images_are_the_towers_text_is_the_language_models(stack_recipe, more_pieces):
    from transformers import AutoImageProcessor, AutoTokenizer

    processor = compose(stack_recipe("clip", chat_template="vicuna_v1", system="简短。")).processor
    own = AutoImageProcessor.from_pretrained(more_pieces["clip"], backend="pil")
    assert processor.encode_images([PHOTO]).equal(own([PHOTO], return_tensors="pt")["pixel_values"])
    tokenizer = AutoTokenizer.from_pretrained(more_pieces["llama"])
    assert processor.tokenizer.encode("你好 there") == tokenizer.encode("你好 there")
    assert "简短。" in processor.render([{"role": "user", "content": "你好"}]).text


def test_an_image_size_of_the_recipe_keeps_the_margin_that_is_cut_off(stack_recipe):
    plain = compose(stack_recipe("clip")).processor
    larger = compose(stack_recipe("clip", vision={"image_size": 56})).processor
    assert plain.encode_images([PHOTO]).shape[-2:] == (28, 28)
    assert larger.encode_images([PHOTO]).shape[-2:] == (56, 56)
    share = [p.image_processor.size["shortest_edge"] / p.image_processor.crop_size["height"] for p in (plain, larger)]
    assert share[0] == share[1]


def test_a_tower_without_an_image_processor_is_named(stack_recipe, more_pieces, tmp_path):
    bare = copied(more_pieces["clip"], tmp_path, "preprocessor_config.json")
    with pytest.raises(UserError, match=r"stack\.vision_tower\.pretrained: .* has no image processor"):
        compose(stack_recipe(bare))


def test_a_language_model_without_a_tokenizer_is_named(stack_recipe, more_pieces, tmp_path):
    bare = copied(more_pieces["llama"], tmp_path, "tokenizer.json", "tokenizer_config.json")
    with pytest.raises(UserError, match=r"stack\.language_model\.pretrained: .*tokenizer"):
        compose(stack_recipe("clip", bare))
