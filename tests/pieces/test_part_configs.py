"""The configuration of a part, out of a `config.json` alone: no weight lies beside these."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    Blip2Config,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    Dinov2Config,
    InstructBlipConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    OPTConfig,
    UMT5Config,
)

from support.tiny_pieces import VISION
from vlm_sft.base.errors import UserError
from vlm_sft.pieces.part_configs import (
    LANGUAGE_MODEL_NAMES,
    find_language_model,
    find_model,
    find_pieces,
    find_resampler,
    find_vision_tower,
)
from vlm_sft.recipe.sections import LanguageModel, PretrainedModel, Resampler, VisionTower

TEXT = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
QFORMER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "encoder_hidden_size": 24}


@pytest.fixture
def write(tmp_path):
    def save(config) -> str:
        if isinstance(config, dict):
            (tmp_path / "config.json").write_text(json.dumps(config))
        else:
            config.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


def blip2(**text):
    return Blip2Config(
        vision_config=Blip2VisionConfig(**VISION),
        qformer_config=Blip2QFormerConfig(**QFORMER),
        text_config=OPTConfig(hidden_size=32, num_attention_heads=4, **text),
        num_query_tokens=6,
    )


def tower_of(folder, **options):
    return find_vision_tower(VisionTower(pretrained=folder, **options)).config


def resampler_of(folder, kind="qformer", **options):
    return find_resampler(Resampler(type=kind, pretrained=folder, **options))


def language_model_of(folder):
    return find_language_model(LanguageModel(pretrained=folder))


TOWERS = {
    "alone": CLIPVisionConfig(**VISION),
    "in BLIP-2": blip2(),
    "in LLaVA": LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT)),
}


@pytest.mark.parametrize("place", TOWERS)
def test_a_tower_is_found_alone_and_inside_larger_models(place, write):
    config = tower_of(write(TOWERS[place]))
    assert (config.hidden_size, config.image_size, config.patch_size) == (24, 28, 7)


def test_what_the_recipe_states_stands_in_place_of_the_checkpoint_s(write):
    folder = write(CLIPVisionConfig(**VISION))
    assert tower_of(folder, config={"num_attention_heads": 2}).num_attention_heads == 2
    assert tower_of(folder, image_size=56).image_size == 56
    with pytest.raises(UserError, match=r"^stack\.vision_tower\.config: a CLIPVisionConfig has no setting '层数'\.$"):
        tower_of(folder, config={"层数": 2})
    with pytest.raises(UserError, match=r"^stack\.vision_tower\.image_size is 40, .* of 7 pixels: .* like 35\.$"):
        tower_of(folder, image_size=40)


def test_a_tower_that_fits_its_table_to_the_image_keeps_its_size(write):
    assert tower_of(write(Dinov2Config(**{**VISION, "image_size": 56})), image_size=28).image_size == 56


def test_a_resampler_brings_its_number_of_queries_and_is_of_its_type(write):
    folder = write(blip2())
    piece = resampler_of(folder, config={"cross_attention_frequency": 1})
    assert (piece.config.model_type, piece.num_query_tokens) == ("blip_2_qformer", 6)
    assert piece.config.cross_attention_frequency == 1
    with pytest.raises(UserError, match=r"^stack\.resampler\.type: .* type qformer, not instruct_qformer\.$"):
        resampler_of(folder, "instruct_qformer")
    assert resampler_of(write(InstructBlipConfig()), "instruct_qformer").num_query_tokens == 32


LANGUAGE_MODELS = {
    "alone": (LlamaConfig(**TEXT), "llama", None),
    "in BLIP-2": (blip2(), "opt", LANGUAGE_MODEL_NAMES),
    "in LLaVA": (TOWERS["in LLaVA"], "llama", LANGUAGE_MODEL_NAMES),
    "LLaVA as its own code writes it": ({**TEXT, "model_type": "llava_mistral", "mm_hidden_size": 24}, "mistral", {}),
    "mPLUG-Owl": ({"model_type": "mplug-owl", "text_config": {**TEXT, "model_type": "llama"}}, "llama",
                  LANGUAGE_MODEL_NAMES),
}  # fmt: skip


@pytest.mark.parametrize("place", LANGUAGE_MODELS)
def test_a_language_model_is_found_alone_and_inside_larger_models(place, write):
    config, kind, renamed = LANGUAGE_MODELS[place]
    piece = language_model_of(write(config))
    assert (piece.config.model_type, piece.config.hidden_size, piece.renamed) == (kind, 32, renamed)
    if kind == "mistral":
        assert isinstance(piece.config, MistralConfig) and not hasattr(piece.config, "mm_hidden_size")


def test_a_larger_model_without_a_causal_one_is_refused(write):
    config = Blip2Config(vision_config=Blip2VisionConfig(**VISION), text_config=UMT5Config(d_model=32))
    with pytest.raises(UserError, match=r"^stack\.language_model\.pretrained: a 'umt5' checkpoint is no causal"):
        language_model_of(write(config))


def test_the_sizes_of_an_unknown_layout_cannot_be_told(tmp_path):
    save_file({"左边": torch.zeros(2)}, tmp_path / "weights.safetensors")
    for find, kind in ((tower_of, "vision_tower"), (resampler_of, "qformer")):
        with pytest.raises(UserError, match=rf"holds no {kind} in a layout that is known here, so its sizes cannot"):
            find(str(tmp_path / "weights.safetensors"))


def test_an_existing_model_is_its_whole_checkpoint(write):
    piece = find_model(PretrainedModel(pretrained=write(TOWERS["in LLaVA"])))
    assert piece.config is piece.whole and piece.config.model_type == "llava" and piece.key == "model.pretrained"


def test_the_pieces_of_a_recipe_come_in_the_order_an_image_passes_them(stack_recipe):
    pieces = find_pieces(stack_recipe("blip2", resampler="blip2"))
    assert list(pieces) == ["vision_tower", "resampler", "language_model"]
    assert [piece.config.hidden_size for piece in pieces.values()] == [24, 16, 32]
