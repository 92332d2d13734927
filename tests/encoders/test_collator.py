"""Rows become batches of an encoder: questions, pictures, and how right each answer is."""

from __future__ import annotations

import pytest
import torch

from support.conversations import make_row, turn
from support.vle import ANSWERS, save_vle
from vlm_sft.base.errors import RowError
from vlm_sft.encoders.collator import EncoderCollator
from vlm_sft.encoders.encoder import piece_of
from vlm_sft.encoders.vle import VLESystem
from vlm_sft.systems.vle import VLEConfig


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    piece = piece_of(str(save_vle(tmp_path_factory.mktemp("vle") / "it", "vqa_classifier")), None, "it")
    config = piece.whole
    assert isinstance(config, VLEConfig)
    config.num_vqa_labels = len(ANSWERS)
    return VLESystem.processor(piece, config)


def row(photo, question="how many dogs", answer="yes", answers=None):
    made = make_row(turn(question, answer, images=1), [photo])
    if answers:
        made["messages"][-1]["answers"] = answers
    return made


def test_a_batch_has_questions_pictures_and_scores(processor, shared_photos):
    rows = [row(shared_photos[0], answers=["yes"] * 2 + ["no"] * 8), row(shared_photos[1], "狗?", "两只")]
    batch = EncoderCollator(processor)(rows)
    assert batch["pixel_values"].shape == (2, 3, 28, 28) and batch["labels"].shape == (2, len(ANSWERS))
    wanted = torch.zeros(2, len(ANSWERS))
    wanted[0, :2], wanted[1, 3] = torch.tensor([2 / 3, 1.0]), 1.0
    torch.testing.assert_close(batch["labels"], wanted)
    lengths = batch["attention_mask"].sum(1).tolist()
    for number, text in enumerate(["how many dogs", "狗?"]):
        assert batch["input_ids"][number, : lengths[number]].tolist() == processor.tokenizer(text)["input_ids"]


def test_a_question_that_is_too_long_is_cut_and_counted(processor, shared_photos):
    sample = EncoderCollator(processor, max_length=6).sample(row(shared_photos[0], "how many dogs " * 9))
    assert sample.turns_lost == 1 and sum(label == -100 for label in sample.chat.labels) == 6
    assert sample.chat.input_ids[5] == processor.tokenizer.sep_token_id
    batch = EncoderCollator(processor)([row(shared_photos[0], "how many dogs " * 90)])
    assert batch["input_ids"].shape[1] == processor.longest


@pytest.mark.parametrize(("made", "says"), [
    (lambda photo: row(photo, answer="mauve"), "no answer 'mauve'; add it"),
    (lambda photo: make_row(turn("q", "yes"), []), "one image with a question, and here are 0"),
    (lambda photo: make_row(turn("", "yes", images=1), [photo]), "question is empty"),
    (lambda photo: make_row(turn("q", "yes", images=1) + turn("r", "no"), [photo]), "one question, and here are 2"),
    (lambda photo: row(photo + "x"), "x"),
])  # fmt: skip
def test_a_row_that_is_none_of_its_own_is_one_sentence(processor, shared_photos, made, says):
    with pytest.raises(RowError, match=says) as raised:
        EncoderCollator(processor)([made(shared_photos[0])])
    assert "\n" not in str(raised.value) and str(raised.value).startswith("row ")
