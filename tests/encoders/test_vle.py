"""A published VLE is read out of its own files, and what is none is named in one sentence."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

from support.golden import assert_close
from support.vle import ANSWERS, GOLDEN, save_vle
from vlm_sft.base.errors import UserError
from vlm_sft.encoders.vle import load_vle
from vlm_sft.systems.vle_heads import TASKS

HEADS = ("vqa_classifier", "itm_score", "pbc_classifier")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_vle(tmp_path_factory.mktemp("vle") / "whole", *HEADS)


def changed(folder, tmp_path, **values):
    copy = tmp_path / "changed"
    copy.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            (copy / file.name).symlink_to(file)
        else:
            shutil.copy(file, copy)
    (copy / "config.json").unlink()
    told = {**json.loads((folder / "config.json").read_text(encoding="utf-8")), **values}
    (copy / "config.json").write_text(json.dumps(told))
    return str(copy)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("task", ["vqa", "itm", "pbc"])
def test_its_numbers_are_upstreams(tmp_path, task, weights):
    encoder = load_vle(str(save_vle(tmp_path / "it", TASKS[task].model.head, weights=weights)), task)
    asked = {name: GOLDEN.inputs[name] for name in ("input_ids", "pixel_values", "attention_mask")}
    assert_close(encoder.model(**asked).logits, GOLDEN.outputs[f"{task}_logits"])
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())


def test_texts_and_images_of_a_batch_do_not_change_each_other(folder):
    encoder = load_vle(str(folder), "vqa")
    images = [Image.new("RGB", (40, 60), "red"), Image.effect_noise((90, 30), 60).convert("RGB")]
    texts = ["how many dogs", "这是一只猫 and a dog, two dogs"]
    both = encoder(images, texts)
    for number in range(2):
        assert_close(both[number : number + 1], encoder(images[number : number + 1], texts[number : number + 1]))
    assert both.shape == (2, len(ANSWERS)) and both.dtype == torch.float32


def test_texts_are_read_as_deberta_reads_them(folder):
    encoder = load_vle(str(folder), "vqa")
    ids = encoder.text_inputs(["how many dogs"])["input_ids"][0].tolist()
    words = encoder.tokenizer.convert_ids_to_tokens(ids)
    assert (words[0], words[-1]) == ("[CLS]", "[SEP]") and "".join(words[1:-1]).replace("▁", " ") == " how many dogs"
    with pytest.raises(UserError, match=r"reads at most 32.*shorten"):
        encoder.text_inputs(["how many dogs " * 40])


@pytest.mark.parametrize(("values", "task", "says"), [
    ({"model_type": "llama"}, "vqa", "is a 'llama' model; name a VLE"),
    ({}, "vcr_q2a", "no head that chooses answers: it answers questions and says whether"),
    ({"id2label": {"0": "yes", "1": "no"}}, "vqa", "7 answers and its config.json names 2"),
    ({"hidden_size": 10**9}, "itm", "."),
    ({"hidden_size": 32}, "itm", "."),
    ({"num_hidden_layers": 3}, "itm", "are missing"),
    ({"text_config": 3}, "itm", "config.json"),
    ({"vision_config": {"image_size": -7}}, "itm", "."),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence(folder, tmp_path, values, task, says):
    with pytest.raises(UserError, match=says) as raised:
        load_vle(changed(folder, tmp_path, **values), task)
    assert "MODEL" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(("lost", "says"), [
    ("config.json", "MODEL"), ("spm.model", "tokenizer"), ("preprocessor_config.json", "image processor"),
    ("pytorch_model.bin", "no weights"),
])  # fmt: skip
def test_a_file_that_is_missing_is_named(folder, tmp_path, lost, says):
    copy = changed(folder, tmp_path)
    (tmp_path / "changed" / lost).unlink()
    with pytest.raises(UserError, match=says):
        load_vle(copy, "itm")


def test_an_encoder_without_heads_says_so(tmp_path):
    with pytest.raises(UserError, match=r"no head that answers questions: it is an encoder alone"):
        load_vle(str(save_vle(tmp_path / "bare")), "vqa")


def test_answers_are_those_of_the_head_by_their_share(folder):
    encoder = load_vle(str(folder), "vqa")
    picture = Image.effect_noise((56, 42), 70).convert("RGB")
    first, second = encoder.answers([picture] * 2, ["how many dogs", "红色"], 3)
    shares = encoder([picture], ["how many dogs"])[0].softmax(-1)
    assert [each.answer for each in first] == [ANSWERS[number] for number in shares.topk(3).indices]
    assert_close(torch.tensor([each.score for each in first]), shares.topk(3).values)
    assert len(second) == 3
    (all_of_them,) = encoder.answers([picture], ["?"], 50)
    assert sorted(each.answer for each in all_of_them) == sorted(ANSWERS)
    (few,) = encoder.answers([picture], ["how many dogs"], 5, ["两只", "red"])
    assert {each.answer for each in few} == {"两只", "red"} and sum(each.score for each in few) == pytest.approx(1)
    one, other = (shares[ANSWERS.index(each.answer)] for each in few)
    assert few[0].score / few[1].score == pytest.approx(float(one / other), rel=1e-4)
    with pytest.raises(UserError, match="does not know the answer 'blue'"):
        encoder.answers([picture], ["what"], 1, ["red", "blue"])
