"""Sizes that follow from the configurations of the pieces."""

from __future__ import annotations

import pytest
from transformers import Blip2QFormerConfig, CLIPVisionConfig, LlamaConfig, OPTConfig

from vlm_sft.model.configuration import VLMConfig, count_patches, image_size_of, text_width_of

VISION = CLIPVisionConfig(hidden_size=24, image_size=28, patch_size=7, num_hidden_layers=2, num_attention_heads=2)
TEXT = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
QFORMER = Blip2QFormerConfig(hidden_size=16, encoder_hidden_size=24, num_hidden_layers=2, num_attention_heads=2)


def test_a_projector_stands_between_the_resampler_or_the_tower_and_the_embeddings():
    assert VLMConfig(vision_config=VISION, text_config=TEXT).projector_widths == (24, 32)
    with_resampler = VLMConfig(
        vision_config=VISION, text_config=TEXT, resampler_config=QFORMER, resampler_type="qformer"
    )
    assert with_resampler.projector_widths == (16, 32)


def test_opt_350m_embeds_narrower_than_it_computes():
    assert text_width_of(OPTConfig(hidden_size=64, word_embed_proj_dim=32, num_attention_heads=2)) == 32
    assert text_width_of(TEXT) == 32


@pytest.mark.parametrize(("size", "pixels", "patches"), [(28, (28, 28), 16), ((28, 56), (28, 56), 32)])
def test_patches_of_an_image(size, pixels, patches):
    config = CLIPVisionConfig(image_size=28, patch_size=7)
    config.image_size = size
    assert image_size_of(config) == pixels and count_patches(config, *pixels) == patches
    config.patch_size = [7, 7]  # as InternVL writes it
    assert count_patches(config, *pixels) == patches
    assert count_patches(config, 34, 34) == 16, "what is over at the edge is no patch"


def test_it_comes_back_from_its_file(tmp_path):
    config = VLMConfig(
        vision_config=VISION, text_config=TEXT, resampler_config=QFORMER, resampler_type="qformer",
        projector_type="mlp", projector_options={"depth": 2, "activation": "gelu"}, image_token_id=50,
        num_image_tokens=32, vision_feature_layer=-2, vision_feature_select="patch",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    again = VLMConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() and type(again.resampler_config) is Blip2QFormerConfig
