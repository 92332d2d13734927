"""A tuned tower beside the texts that it was pretrained with: as its own checkpoint would do with the tuned weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from typer.testing import CliRunner

from support.bundles import trained
from vlm_sft import load, load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.cli import main as cli
from vlm_sft.forgetting.bundles import BeforeAndAfter
from vlm_sft.forgetting.texts import Wish
from vlm_sft.forgetting.towers import TowerTest, read_pictures, was_tuned, weights_of

TEXT = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2}  # fmt: skip


VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 7}  # fmt: skip


def written(folder, tokenizer_files, kind):
    """A tiny CLIP or SigLIP with its processor, as published."""
    import transformers as hf
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    if kind == "clip":
        model = hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))
        images = hf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    else:
        text = {**TEXT, "projection_size": 16}
        model = hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=VISION))
        images = hf.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_files)
    tokenizer.pad_token = "</s>"
    (hf.CLIPProcessor if kind == "clip" else hf.SiglipProcessor)(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["clip", "siglip"])
def dual(request, tmp_path_factory, tokenizer_files):
    """Both kinds of published towers in turn."""
    return written(tmp_path_factory.mktemp(request.param), tokenizer_files, request.param)


@pytest.fixture(scope="module")
def clip(tmp_path_factory, tokenizer_files):
    return written(tmp_path_factory.mktemp("one_clip"), tokenizer_files, "clip")


@pytest.fixture
def recipe(recipe_file, caption_file):
    source = {"path": caption_file, "format": "caption"}
    return load_recipe(recipe_file(data={"train": [source], "eval": [source]}))


def tower_of(folder):
    import transformers as hf

    kind = hf.AutoConfig.from_pretrained(folder).model_type
    return (hf.CLIPVisionModel if kind == "clip" else hf.SiglipVisionModel).from_pretrained(folder)


def test_the_tuned_weights_are_measured_as_a_checkpoint_of_them_would_be(dual, recipe, tmp_path):
    from transformers import AutoModel

    clip = dual
    pictures = read_pictures(None, recipe)
    assert len(pictures.labelled) == 60 and len(pictures.captioned) == 8
    same = TowerTest(str(clip), pictures, "cpu").compare(tower_of(clip))
    assert all(one["before"] == one["after"] for one in same.values()) and set(same) == {"zero_shot", "ranking"}
    assert same["zero_shot"]["of"] == 60 and same["ranking"]["of"] == 8
    tower = tower_of(clip)
    model = AutoModel.from_pretrained(clip)
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


@pytest.fixture
def bundle(dual, recipe_file, caption_file, pieces, tmp_path):
    """A bundle of a stack whose vision tower was changed so."""

    def make(**changes):
        source = {"path": caption_file, "format": "caption"}
        stack = {"vision_tower": {"pretrained": str(dual)}, "projector": {"type": "linear"},
                 "language_model": {"pretrained": pieces["llama"]}}  # fmt: skip
        data = {"train": [source], "eval": [source], "test": [{**source, "max_rows": 2}]}
        recipe = load_recipe(recipe_file(stack=stack, chat_template="ziya", data=data, generation={"max_new_tokens": 2},
                                         **changes))  # fmt: skip
        trained(recipe, tmp_path / "bundle")
        return tmp_path / "bundle"

    return make


LORA = {"r": 4, "lora_alpha": 2000, "target_modules": r".*vision_tower.*(v_proj|fc1)"}


@pytest.mark.parametrize("changes", [{"train": {"vision_tower": 1e-3, "projector": 1e-3}}, {"lora": LORA}])
def test_every_evaluation_of_a_bundle_shows_what_its_tower_lost(bundle, tmp_path, changes):
    folder = bundle(**changes)
    done = CliRunner().invoke(cli.app, ["evaluate", str(folder)])
    assert done.exit_code == 0, done.output
    assert "zero-shot, vision tower" in done.output and "captions above wrong ones" in done.output
    found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["forgetting"]["tower"]
    assert found["zero_shot"]["of"] == 60 and found["ranking"]["of"] == 10
    assert found["ranking"]["before"] != found["ranking"]["after"]
    page = (folder / "evaluation" / "evaluation.html").read_text(encoding="utf-8")
    assert "captions above wrong ones" in page
    lost = [name for name, one in found.items() if one["before"] - one["after"] > 0.05]
    assert ("The vision tower forgets" in done.output) == bool(lost)


def test_a_tower_without_texts_is_said_and_ends_no_evaluation(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file(chat_template="ziya", train={"vision_tower": 1e-3}))
    trained(recipe, tmp_path / "bundle")
    said = []
    found = BeforeAndAfter(tmp_path / "bundle", Wish(None), False, said.append)
    assert found.finish(lambda: load(tmp_path / "bundle", device="cpu")) is None
    assert len(said) == 1 and said[0].startswith("What the vision tower forgot is not measured: ")
    assert "is a 'blip-2' model" in said[0] and "--model" not in said[0]
