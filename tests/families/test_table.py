"""The table of existing VLMs: every entry exists in transformers, and what is not in it is refused in a sentence."""

from __future__ import annotations

import pytest
import transformers
from transformers import CONFIG_MAPPING, LlamaConfig, LlavaConfig, LlavaNextConfig, Qwen2Config

from support.tiny_families import TINY
from vlm_sft.base.assets import list_templates
from vlm_sft.base.errors import UserError
from vlm_sft.families.table import FAMILIES, default_template, family_of


def test_every_family_is_known_to_transformers_has_a_template_and_is_tested():
    assert set(FAMILIES) == set(TINY)
    for model_type, family in FAMILIES.items():
        assert model_type in CONFIG_MAPPING and hasattr(transformers, family.processor)
        assert set(family.template.values()) <= set(list_templates())
        assert family.counts in ("images", "written", "answer")


def test_a_stranger_is_refused():
    with pytest.raises(
        UserError, match="a 'bert' model \\('x'\\) is none of those that a recipe can start from \\(llava, "
    ):
        family_of("bert", "x")


def test_the_language_model_decides_on_the_template():
    assert default_template(LlavaConfig(text_config=LlamaConfig()), "x") == "vicuna_v1"
    assert default_template(LlavaNextConfig(text_config=transformers.MistralConfig()), "x") == "mistral"
    assert default_template(LlavaNextConfig(text_config=Qwen2Config()), "x") == "ovis2"
    with pytest.raises(UserError, match="none is known for the llava_next model 'x' with a llama language model; name"):
        default_template(LlavaNextConfig(text_config=LlamaConfig()), "x")
