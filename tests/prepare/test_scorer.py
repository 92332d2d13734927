"""Scores are the models' own, whatever else is in the batch."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

from support.vle import save_vle
from vlm_sft.base.errors import UserError
from vlm_sft.encoders.ask import match
from vlm_sft.encoders.vle import load_vle
from vlm_sft.prepare.scorer import Scorer

VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 7}  # fmt: skip
TEXT = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2}  # fmt: skip
WORDS = ["a red 3", "这是一只猫", "two dogs " * 30]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer_files):
    """Folders `clip`, `siglip` and `itm`: tiny random models with their processors; `captioner` has no such head."""
    from transformers import (
        AutoTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipForImageTextRetrieval,
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        SiglipConfig,
        SiglipModel,
    )

    root = tmp_path_factory.mktemp("matchers")
    torch.manual_seed(0)
    blip = BlipConfig(text_config={**TEXT, "encoder_hidden_size": 16}, vision_config=VISION,
                      image_text_hidden_size=8)  # fmt: skip
    made = {
        "clip": CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)),
        "siglip": SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)),
        "itm": BlipForImageTextRetrieval(blip),
        "captioner": BlipForConditionalGeneration(blip),
    }
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_files)
    tokenizer.pad_token = "</s>"
    for name, model in made.items():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(root / name)
        processor_of(name, CLIPImageProcessorPil, tokenizer).save_pretrained(root / name)
    return {folder.name: folder for folder in root.iterdir()}


def processor_of(name, image_processor, tokenizer):
    from transformers import BlipProcessor, CLIPProcessor, SiglipProcessor

    kind = {"clip": CLIPProcessor, "siglip": SiglipProcessor}.get(name, BlipProcessor)
    return kind(image_processor(size={"height": 28, "width": 28}, do_center_crop=False), tokenizer)


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (40, 30), (80 * i, 255 - 80 * i, 90)) for i in range(count)]


def test_clip_gives_the_cosine_that_its_logits_are_made_of(models):
    scorer = Scorer(str(models["clip"]))
    images = pictures(3)
    outputs = scorer.model(**scorer.pixels(images), **scorer.tokens(WORDS, padding=True))
    expected = outputs.logits_per_image.diag() / scorer.model.logit_scale.exp()
    assert torch.allclose(torch.tensor(scorer(images, WORDS)), expected, atol=1e-5)


def test_siglip_gives_the_cosine_that_its_logits_are_made_of(models):
    scorer = Scorer(str(models["siglip"]))
    images = pictures(3)
    tokens = scorer.tokens(WORDS, padding="max_length")
    outputs = scorer.model(**scorer.pixels(images), **tokens)
    expected = (outputs.logits_per_image.diag() - scorer.model.logit_bias) / scorer.model.logit_scale.exp()
    assert torch.allclose(torch.tensor(scorer(images, WORDS)), expected, atol=1e-5)


def test_blip_gives_the_probability_of_its_matching_head(models):
    scorer = Scorer(str(models["itm"]))
    images = pictures(3)
    logits = scorer.model(**scorer.pixels(images), **scorer.tokens(WORDS, padding=True)).itm_score
    assert torch.allclose(torch.tensor(scorer(images, WORDS)), logits.softmax(-1)[:, 1], atol=1e-5)


def test_a_pair_has_the_same_score_in_any_batch(models):
    scorer = Scorer(str(models["itm"]))
    together = scorer(pictures(3), WORDS)
    alone = [scorer([image], [words])[0] for image, words in zip(pictures(3), WORDS, strict=True)]
    assert together == pytest.approx(alone, abs=1e-5)


def test_other_models_are_refused_by_name(models, pieces, tmp_path):
    with pytest.raises(UserError, match="is a 'llama' model: give one that matches images and texts"):
        Scorer(pieces["llama"])
    with pytest.raises(UserError, match="has no matching head: give a BLIP-ITM model"):
        Scorer(str(models["captioner"]))
    with pytest.raises(UserError, match=r"--model: the folder .* has no config\.json that"):
        Scorer(str(tmp_path))
    shutil.copytree(models["clip"], tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no weights that can be read here \(model\.safetensors, "):
        Scorer(str(tmp_path / "pickled"))


STRANGE = {
    "config.json": (
        {"text_config": {**TEXT, "vocab_size": 90_000_000}},
        "describes .* parameters, but its weights have",
    ),
    "config.json ": ({"_attn_implementation": "me/kernel"}, "makes transformers fetch or read something else"),
    "adapter_config.json": ({}, "has an adapter_config.json beside its weights"),
    "tokenizer_config.json": ({"mecab_kwargs": {"mecab_dic": "/etc"}}, "says mecab_kwargs: .*; it is refused"),
    "processor_config.json": ({"image_processor": {"size": {"height": 99999, "width": 28}}}, "says height: 99,999"),
}


@pytest.mark.parametrize("file", STRANGE)
def test_a_strangers_model_is_looked_at_before_it_is_read(file, models, tmp_path, monkeypatch):
    values, said = STRANGE[file]
    base = shutil.copytree(models["clip"], tmp_path / "clip")
    path = base / file.strip()
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", pytest.fail)
    with pytest.raises(UserError, match=said) as refused:
        Scorer(str(base))
    assert "\n" not in str(refused.value)


def test_a_vle_scores_by_its_matching_head(tmp_path):
    folder = save_vle(tmp_path / "vle", "itm_score")
    images = [Image.effect_noise((40, 30), 70).convert("RGB")] * 3
    texts = ["two dogs", "一只猫", "how many dogs " * 30]
    found = Scorer(str(folder))(images, texts)
    encoder = load_vle(str(folder), "itm")
    assert found[:2] == pytest.approx(match(encoder, images[:2], texts[:2]), abs=1e-6)
    assert 0 < found[2] < 1  # cut, as every scorer does it
    with pytest.raises(UserError, match=r"--model: .*no head that says whether"):
        Scorer(str(save_vle(tmp_path / "other", "vqa_classifier")))
