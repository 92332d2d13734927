"""Captions are those of transformers' own classes, and what cannot write them is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from support.tiny_families import tiny
from support.tiny_pieces import make_tokenizer
from vlm_sft.base.errors import RowError, UserError
from vlm_sft.batch.pictures import Pictures
from vlm_sft.captions.captioner import PROMPTS, load_captioner


def pictures(folder: Path) -> list[Pictures]:
    paths = sorted(folder.glob("[0-9].png"))
    return [Pictures([Image.open(path).convert("RGB")], [""], path.name, [str(path)]) for path in paths]


def own(model, rows, prompt: str | None, **settings) -> list[str]:
    """What transformers' processor and class write, without the prompt."""
    from transformers import AutoProcessor, BlipForConditionalGeneration

    processor = AutoProcessor.from_pretrained(model, use_fast=False)
    found = BlipForConditionalGeneration.from_pretrained(model).eval()
    texts = {} if prompt is None else {"text": [prompt] * len(rows)}
    inputs = processor(images=[row.images[0] for row in rows], return_tensors="pt", **texts)
    written = [processor.decode(ids, skip_special_tokens=True) for ids in found.generate(**inputs, **settings)]
    return [text.removeprefix(prompt or "").strip() for text in written]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 1, "max_new_tokens": 12}, {"num_beams": 2, "max_length": 14}])
def test_a_blip_writes_what_transformers_own_class_writes(blip, album, settings):
    rows = pictures(album)
    captioner = load_captioner(blip["captioner"], settings)
    (found,) = captioner.captions(rows, captioner.prompts["en"], 1)
    usual = {"num_beams": 3, "do_sample": False, "max_length": 30, "min_length": 10}
    if "max_new_tokens" in settings:
        usual = {"num_beams": 3, "do_sample": False}
    assert found == own(blip["captioner"], rows, "a picture of", **{**usual, **settings})
    assert len(set(found)) > 1, "the model looks at its pictures"
    assert not any("picture of" in text or "[" in text for text in found)


def test_a_blip_writes_without_a_prompt_too(blip, album):
    rows = pictures(album)
    (found,) = load_captioner(blip["captioner"], {"num_beams": 1, "max_new_tokens": 9}).captions(rows, "", 1)
    assert found == own(blip["captioner"], rows, None, num_beams=1, max_new_tokens=9, do_sample=False)


def test_several_captions_are_drawn_and_again_the_same_by_the_same_seed(blip, album):
    rows = pictures(album)
    captioner = load_captioner(blip["captioner"], {})
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(list(captioner.captions(rows, "a picture of", 3)))
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(said) for said in drawn[0]] == [6, 6, 6]
    assert all(len(set(said)) > 1 for said in zip(*drawn[0], strict=True))


def test_a_blip2_is_asked_as_transformers_own_class(blip, album):
    from transformers import Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessorPil

    rows = pictures(album)
    captioner = load_captioner(blip["blip2"], {"max_new_tokens": 8})
    (found,) = captioner.captions(rows, "a red 3 at", 1)
    images = BlipImageProcessorPil.from_pretrained(blip["blip2"])
    processor = Blip2Processor(images, make_tokenizer(), num_query_tokens=4)
    model = Blip2ForConditionalGeneration.from_pretrained(blip["blip2"], dtype=torch.float32).eval()
    inputs = processor(images=[row.images[0] for row in rows], text=["a red 3 at"] * len(rows), return_tensors="pt")
    # Here no model writes the token that stands for an image.
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False, suppress_tokens=[300])
    new = written[:, inputs["input_ids"].shape[1] :]
    texts = [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]
    assert found == [text.split("\n")[0].strip() for text in texts]
    assert len(set(found)) > 1


def test_an_existing_vlm_is_asked_in_both_languages(album):
    captioner = load_captioner(str(tiny("smolvlm")), {"max_new_tokens": 4})
    assert captioner.prompts == PROMPTS
    rows = pictures(album)[:2]
    english, chinese = (next(iter(captioner.captions(rows, captioner.prompts[name], 1))) for name in ("en", "zh"))
    assert all(isinstance(text, str) for text in english + chinese)


def test_a_picture_that_its_processor_refuses_is_named(blip, album, monkeypatch):
    captioner = load_captioner(blip["captioner"], {})
    real = captioner.image_inputs

    def choosy(images, instructions=()):
        if any(image.size == (41, 30) for image in images):
            raise ZeroDivisionError("no side")
        return real(images)

    monkeypatch.setattr(captioner, "image_inputs", choosy)
    odd = Pictures([Image.new("RGB", (41, 30))], [""], "s/9", ["线.png"])
    with pytest.raises(RowError, match=r"s/9: the image 线\.png of 41 x 30 pixels is refused"):
        list(captioner.captions([*pictures(album), odd], "a picture of", 1))


def test_what_cannot_write_captions_is_one_sentence(blip, pieces, tmp_path):
    with pytest.raises(UserError, match=r"--captioner .* is a BLIP that writes no captions \(BlipForImageText"):
        load_captioner(blip["matcher"], {})
    with pytest.raises(UserError, match=r"--captioner .* is a 'llama' model: give a bundle, or a model of the types"):
        load_captioner(pieces["llama"], {})
    with pytest.raises(UserError, match=r"--captioner"):
        load_captioner(str(tmp_path / "nowhere"), {})
    with pytest.raises(UserError, match='no generation setting "top_q"; did you mean'):
        load_captioner(blip["captioner"], {"top_q": 0.9})
    whole = shutil.copytree(blip["captioner"], tmp_path / "half")
    (whole / "config.json").write_text(
        json.dumps(json.loads((whole / "config.json").read_text()) | {"architectures": None})
    )
    from safetensors.torch import load_file, save_file

    tensors = load_file(whole / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if "crossattention.self.query" not in name}
    save_file(left, whole / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--captioner.*lacks \d+ tensors of this model"):
        load_captioner(str(whole), {})
    captioner = load_captioner(blip["captioner"], {})
    with pytest.raises(UserError, match="does not know the words of the prompt '一张照片'"):
        captioner.check(["a picture of", "一张照片"])
    with pytest.raises(UserError, match=r"may have 101 tokens, and .* has 40 positions: shorten it"):
        captioner.check(["dog " * 100])
