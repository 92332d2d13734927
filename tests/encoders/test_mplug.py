"""A published mPLUG is read out of its files; it writes answers or ranks those that it is given."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from support.golden import assert_close
from support.mplug import GOLDENS, config, model, save_modelscope, save_words
from vlm_sft.base.errors import UserError
from vlm_sft.encoders.encoder import piece_of
from vlm_sft.encoders.load import load_answerer
from vlm_sft.encoders.mplug import load_mplug

PICTURES = [Image.effect_noise((40, 60), 70).convert("RGB"), Image.new("RGB", (30, 30), "red")]
QUESTIONS = ["what is it ?", "a red dog ?"]
HEADS = {"vision_heads": 4}  # published ones are of 64 numbers each, of which these tiny towers have fewer


def load(folder, **sizes):
    return load_mplug(piece_of(str(folder), None, "MODEL"), sizes={**HEADS, **sizes})


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize(("wrapped", "prefix"), [("module", ""), ("model", ""), (None, "model.")])
def test_its_numbers_are_upstreams(tmp_path, size, wrapped, prefix):
    made, golden = load(save_modelscope(tmp_path / "it", size, wrapped, prefix)), GOLDENS[size]
    inputs = golden.inputs
    found = made.model(
        inputs["question_ids"], inputs["image"], inputs["answer_ids"], inputs["question_mask"], inputs["answer_mask"],
        inputs["k"], inputs["weights"],
    )  # fmt: skip
    assert_close(found.loss, golden.outputs["loss"])
    assert made.image_inputs(PICTURES)["pixel_values"].shape == (2, 3, 28, 28)


def test_a_weight_file_needs_its_tokenizer_named(tmp_path):
    torch.save({"model": GOLDENS["large"].tensors()}, tmp_path / "mplug_large.pth")
    piece = piece_of(str(tmp_path / "mplug_large.pth"), None, "MODEL")
    sizes = {**HEADS, "num_attention_heads": 4, "fusion_layers": 3, "stride_layer": 3}
    with pytest.raises(UserError, match=r"without a tokenizer: give --tokenizer"):
        load_mplug(piece, sizes=sizes)
    (tmp_path / "words").mkdir()
    with pytest.raises(UserError, match=r"--tokenizer: .*has no tokenizer"):
        load_mplug(piece, str(tmp_path / "words"), sizes=sizes)
    save_words(tmp_path / "words")
    made = load_mplug(piece, str(tmp_path / "words"), sizes=sizes)
    assert made.model.config.text_encoder_layers == 2 and made.model.config.stride_layer == 3


def test_published_sizes_are_told_by_the_tensors(tmp_path):
    folder = save_modelscope(tmp_path / "it", "base")
    found, wanted = load(folder).model.config.to_dict(), config("base").to_dict()
    assert {n: found[n] for n in wanted if n not in ("architectures", "dtype")} == {
        n: value for n, value in wanted.items() if n not in ("architectures", "dtype")
    }


def test_our_own_folder_is_read_too(tmp_path):
    model("large").save_pretrained(tmp_path)
    save_words(tmp_path)
    made = load_answerer(str(tmp_path))
    (found,) = made.answers(PICTURES[:1], QUESTIONS[:1], 1)
    (again,) = load(save_modelscope(tmp_path / "it", "large")).answers(PICTURES[:1], QUESTIONS[:1], 1)
    assert found[0].answer == again[0].answer and found[0].score == pytest.approx(again[0].score, rel=1e-4)


def test_written_answers_have_their_probability_and_do_not_change_each_other(tmp_path):
    made = load(save_modelscope(tmp_path / "it", "base"))
    both = made.answers(PICTURES, QUESTIONS, 3)
    for number in range(2):
        (alone,) = made.answers(PICTURES[number : number + 1], QUESTIONS[number : number + 1], 3)
        assert [each.answer for each in alone] == [each.answer for each in both[number]]
        for one, other in zip(alone, both[number], strict=True):
            assert 0 < one.score <= 1 and one.score == pytest.approx(other.score, rel=1e-4)
    assert all("[" not in each.answer for row in both for each in row)


def test_candidates_are_ranked(tmp_path):
    made = load(save_modelscope(tmp_path / "it", "large"))
    rows = made.answers(PICTURES, QUESTIONS, 2, ["dog", "a red dog", "猫"])
    for row in rows:
        assert len({each.answer for each in row}) == 2 and row[0].score >= row[1].score
        assert sum(each.score for each in row) == pytest.approx(1)


@pytest.mark.parametrize(("file", "text", "says"), [
    ("config_bert.json", "[1", "cannot be read"), ("config_bert.json", json.dumps({"num_attention_heads": 10**9}), "."),
    ("config_bert.json", json.dumps({"num_attention_heads": "many"}), "."), ("vocab.txt", None, "has no tokenizer"),
    ("pytorch_model.bin", None, "no weights"), ("vocab.txt", "\n".join(map(str, range(200))), "200 tokens|tokenizer"),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence(tmp_path, file, text, says):
    folder = save_modelscope(tmp_path / "it", "base")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says) as raised:
        load(folder)
    assert "\n" not in str(raised.value)


def test_another_model_is_named(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds no mPLUG for VQA"):
        load_answerer(str(tmp_path))


@pytest.mark.parametrize("heads", [0, 5])
def test_sizes_that_do_not_go_together_are_one_sentence(tmp_path, heads):
    with pytest.raises(UserError, match=r"of its tensors do not go together|no model can"):
        load(save_modelscope(tmp_path / "it", "base"), vision_heads=heads)
