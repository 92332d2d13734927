"""Parts of their configurations alone, and loaded ones that keep their weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, Blip2VisionConfig, CLIPVisionConfig, LlamaConfig

from vlm_sft.model.configuration import VLMConfig
from vlm_sft.model.modeling import VLMForConditionalGeneration
from vlm_sft.model.parts import build_vision_tower, mark_initialised, parts_from_config
from vlm_sft.systems.mplug_owl import MPLUGOwlVisionConfig
from vlm_sft.systems.qwen_vl import QwenVLVisionConfig

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
         "patch_size": 14}  # fmt: skip
CONFIG = VLMConfig(
    vision_config=CLIPVisionConfig(**SIZES),
    text_config=LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                            num_attention_heads=2),
)  # fmt: skip


@pytest.mark.parametrize("kind", [CLIPVisionConfig, Blip2VisionConfig, MPLUGOwlVisionConfig, QwenVLVisionConfig])
def test_a_tower_is_built_of_what_its_configuration_says(kind):
    config = AutoConfig.for_model(kind.model_type, **SIZES)
    assert type(config) is kind
    tower = build_vision_tower(config)
    states = tower(torch.zeros(1, 3, 28, 28), output_hidden_states=True)
    assert states.last_hidden_state.shape[-1] == 16 and len(states.hidden_states) == 3


def test_the_norm_behind_the_tower_may_have_a_size_of_its_own():
    config = Blip2VisionConfig(**SIZES, layer_norm_eps=1e-6)
    assert build_vision_tower(config).post_layernorm.eps == 1e-6
    config.post_layernorm_eps = 1e-5
    assert build_vision_tower(config).post_layernorm.eps == 1e-5


def test_all_parts_can_be_made_without_memory():
    with torch.device("meta"):
        parts = parts_from_config(CONFIG)
    modules = (parts.vision_tower, parts.projector, parts.causal_lm)
    assert all(p.is_meta for module in modules for p in module.parameters()) and parts.resampler is None


def test_loaded_weights_are_not_drawn_again():
    parts = parts_from_config(CONFIG)
    for module in (parts.vision_tower, parts.projector, parts.causal_lm):
        mark_initialised(module)
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, 0.25)
    model = VLMForConditionalGeneration(CONFIG, parts)
    model.init_weights()
    assert all((parameter == 0.25).all() for parameter in model.parameters())
