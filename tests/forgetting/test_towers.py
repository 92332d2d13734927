"""A tuned tower beside the texts that it was pretrained with: as its own checkpoint would do with the tuned weights."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image

from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.forgetting.towers import TowerTest, read_pictures, was_tuned, weights_of

TEXT = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2}  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory, tokenizer_files):
    """A tiny CLIP with its processor, as published."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 7}  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_files)
    tokenizer.pad_token = "</s>"
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(recipe_file, caption_file):
    source = {"path": caption_file, "format": "caption"}
    return load_recipe(recipe_file(data={"train": [source], "eval": [source]}))


def tower_of(folder):
    from transformers import CLIPVisionModel

    return CLIPVisionModel.from_pretrained(folder)


def test_the_tuned_weights_are_measured_as_a_checkpoint_of_them_would_be(clip, recipe, tmp_path):
    from transformers import CLIPModel

    pictures = read_pictures(None, recipe)
    assert len(pictures.labelled) == 60 and len(pictures.captioned) == 8
    same = TowerTest(str(clip), pictures, "cpu").compare(tower_of(clip))
    assert all(one["before"] == one["after"] for one in same.values()) and set(same) == {"zero_shot", "ranking"}
    assert same["zero_shot"]["of"] == 60 and same["ranking"]["of"] == 8
    tower = tower_of(clip)
    model = CLIPModel.from_pretrained(clip)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for own, other in zip(tower.parameters(), model.vision_model.parameters(), strict=True):
            own.add_(torch.randn(own.shape, generator=generator))
            other.copy_(own)
    shutil.copytree(clip, tmp_path / "tuned")
    model.save_pretrained(tmp_path / "tuned")
    wanted = TowerTest(str(tmp_path / "tuned"), pictures, "cpu").compare(tower_of(tmp_path / "tuned"))
    found = TowerTest(str(clip), pictures, "cpu").compare(tower)
    assert {name: one["after"] for name, one in found.items()} == {name: one["before"] for name, one in wanted.items()}
    assert found != same


def test_lora_in_a_tower_is_merged_into_a_copy(clip):
    tower = tower_of(clip)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), tower)
    assert was_tuned(tower, []) and not was_tuned(tower_of(clip), []) and was_tuned(tower_of(clip), ["vision_tower"])
    before = {name: value.clone() for name, value in tower_of(clip).state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in weights_of(tower).items())
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    found = weights_of(tower)
    assert found.keys() == before.keys()
    assert {name for name in found if not torch.equal(found[name], before[name])} == {
        name for name in before if name.endswith("q_proj.weight")
    }


def test_pictures_of_one_s_own_lie_in_folders_named_by_what_they_show(recipe, tmp_path, photos):
    for kind in ("red_bus", "猫"):
        (tmp_path / "kinds" / kind).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "kinds" / kind / "1.PNG")
    (tmp_path / "kinds" / "notes.txt").write_text("x")
    assert [label for _, label in read_pictures(str(tmp_path / "kinds"), recipe).labelled] == ["red bus", "猫"]
    for wrong in (tmp_path / "gone", tmp_path / "photos"):
        with pytest.raises(UserError, match="has no pictures of two kinds"):
            read_pictures(str(wrong), recipe)


def test_another_tower_is_not_compared(clip, recipe, pieces):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    test = TowerTest(str(clip), read_pictures(None, recipe), "cpu")
    other = CLIPVisionModel(CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                             num_attention_heads=2, image_size=56, patch_size=7))  # fmt: skip
    with pytest.raises(UserError, match="is not that of its piece"):
        test.compare(other)
    with pytest.raises(UserError, match="llama"):
        TowerTest(pieces["llama"], read_pictures(None, recipe), "cpu")
