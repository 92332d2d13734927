"""What stands between rows and an encoder: what people are shown of it, and what it leaves in a bundle."""

from __future__ import annotations

import json

from support.conversations import turn
from support.vle import ANSWERS, config, save_vle
from vlm_sft.encoders.answers import AnswerList
from vlm_sft.encoders.encoder import piece_of
from vlm_sft.encoders.processor import TEMPLATE
from vlm_sft.encoders.vle import VLESystem
from vlm_sft.templates.render import render


def test_people_see_what_the_template_says(tmp_path):
    processor = VLESystem.processor(piece_of(str(save_vle(tmp_path / "it")), None, "it"), config())
    messages = turn("一只猫 <image>?", "yes", images=1)
    assert processor.render(messages) == render(messages, TEMPLATE)
    assert processor.render(messages).supervised == ["yes"] and processor.end_of_answer == ""


def test_question_and_answer_are_told_apart(tmp_path):
    processor = VLESystem.processor(piece_of(str(save_vle(tmp_path / "it")), None, "it"), config())
    chat = processor.encode_chat(turn("how many dogs", "two dogs", images=1))
    asked = processor.tokenizer("how many dogs")["input_ids"]
    assert chat.input_ids[: len(asked)] == asked and set(chat.labels[: len(asked)]) == {-100}
    assert chat.labels[len(asked) :] == processor.tokenizer("two dogs", add_special_tokens=False)["input_ids"]
    assert processor.batch([chat])["input_ids"].tolist() == [asked]


def test_answers_lie_beside_the_tokenizer(tmp_path):
    processor = VLESystem.processor(piece_of(str(save_vle(tmp_path / "it")), None, "it"), config())
    processor.known = AnswerList(ANSWERS)
    processor.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "answer_list.json").read_text(encoding="utf-8")) == ANSWERS
    again = VLESystem.processor(piece_of(str(tmp_path / "out"), None, "out"), config())
    assert again.tokenizer("两只 dogs")["input_ids"] == processor.tokenizer("两只 dogs")["input_ids"]
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
