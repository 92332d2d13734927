"""VLE against values of its own code, and as transformers takes a model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel

from support.golden import assert_close
from support.vle import GOLDEN, boxes, config
from vlm_sft.systems.vle import Boxes, VLEConfig, VLEModel

INPUTS, OUTPUTS = GOLDEN.inputs, GOLDEN.outputs
REAL = INPUTS["attention_mask"].bool()
ASKED = {name: INPUTS[name] for name in ("input_ids", "pixel_values", "attention_mask")}


@pytest.fixture(scope="module")
def model():
    model = VLEModel(config()).eval().requires_grad_(False)
    model.load_state_dict({n.removeprefix("vle."): t for n, t in GOLDEN.tensors().items() if n.startswith("vle.")})
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("placed", [False, True])
def test_both_streams_and_the_pooled_are_upstreams(model, attention, placed):
    model.set_attn_implementation({"": attention, "text_config": "eager", "vision_config": attention})
    found = model(**ASKED, boxes=boxes(14) if placed else None)
    names = "boxes_" if placed else ""
    assert_close(found.pooler_output, OUTPUTS[f"{names}pooler_output"])
    assert_close(found.image_embeds, OUTPUTS[f"{names}image_embeds"])
    assert_close(found.text_embeds[REAL], OUTPUTS[f"{names}text_embeds"][REAL])


def test_the_towers_are_upstreams(model):
    assert_close(model.get_image_features(INPUTS["pixel_values"]), OUTPUTS["image_features"])
    text = model.get_text_features(INPUTS["input_ids"], INPUTS["attention_mask"])
    assert_close(text[REAL], OUTPUTS["text_features"][REAL])


def test_features_stand_for_pixels_and_padding_changes_nothing(model):
    features = model.get_image_features(INPUTS["pixel_values"])
    for row in range(2):
        alone = INPUTS["input_ids"][row, REAL[row]][None]
        found = model(alone, image_features=features[row : row + 1])
        assert_close(found.pooler_output, OUTPUTS["pooler_output"][row : row + 1])
    with pytest.raises(ValueError, match="either"):
        model(alone)
    with pytest.raises(ValueError, match="either"):
        model(alone, pixel_values=INPUTS["pixel_values"], image_features=features)


def test_padded_boxes_are_not_seen(model):
    two = boxes(14)
    more = Boxes(
        torch.cat([two.patches, torch.zeros(2, 3, 16, dtype=torch.bool)], dim=1),
        torch.cat([two.image_types, torch.full((2, 3), 5)], dim=1),
        two.text_types,
    )
    assert_close(model(**ASKED, boxes=more).pooler_output, OUTPUTS["boxes_pooler_output"])


def test_transformers_saves_and_loads_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(again, VLEModel) and isinstance(AutoConfig.from_pretrained(tmp_path), VLEConfig)
    assert_close(again(**ASKED).pooler_output, OUTPUTS["pooler_output"])


def test_its_towers_may_be_a_whole_clip():
    whole = {"model_type": "clip", "vision_config": {"image_size": 28, "patch_size": 7}}
    made = VLEConfig(text_config={"hidden_size": 8}, vision_config=whole)
    assert made.vision_config.image_size == 28 and made.num_patches == 16
    assert made.text_config.model_type == "deberta-v2"
