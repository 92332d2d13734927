"""The answers that an encoder chooses from, and how right each is for what annotators gave."""

from __future__ import annotations

import json

import pytest

from vlm_sft import load_recipe
from vlm_sft.base.errors import UserError
from vlm_sft.encoders.answers import AnswerList, answers_of_rows, read_answer_list


@pytest.mark.parametrize(("given", "scores"), [
    (["red"], {0: 1.0}),
    (["red"] * 10, {0: 1.0}),
    (["red"] * 2 + ["blue"] * 8, {0: 2 / 3, 1: 1.0}),
    (["red", "blue"], {0: 0.5, 1: 0.5}),  # fewer than three annotators
    (["red", "blue", "一只猫"], {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}),
    (["red"] + ["mauve"] * 9, {0: 1 / 3}),
    (["mauve"], {}),
    (["Red!", "the red", "RED"], {0: 1.0}),  # as VQA's metric sees them
])  # fmt: skip
def test_an_answer_is_as_right_as_annotators_gave_it(given, scores):
    assert AnswerList(["red", "blue", "一只猫"]).scores(given) == pytest.approx(scores)


def test_letters_that_are_articles_stay_themselves():
    letters = AnswerList(["A", "B", "the"])
    assert [letters.number_of(each) for each in ("A", "B", "the", "a.")] == [0, 1, 2, None]


@pytest.mark.parametrize("text", ['["红", "blue", "红"]', "红\n\nblue \n红\n"])
def test_a_file_is_a_list_or_lines(tmp_path, text):
    (tmp_path / "list").write_text(text, encoding="utf-8")
    assert read_answer_list(str(tmp_path / "list"), "here") == ["红", "blue"]


@pytest.mark.parametrize(("text", "says"), [("[1]", "no text"), ("[]", "no answers"), ("[", "cannot be read")])
def test_a_file_that_is_none_is_one_sentence(tmp_path, text, says):
    (tmp_path / "list").write_text(text)
    with pytest.raises(UserError, match=f"^here .*{says}"):
        read_answer_list(str(tmp_path / "list"), "here")


def test_those_of_rows_come_by_how_many_rows_have_them(tmp_path, recipe_file):
    said = ["red", "Red", "red", "blue", ["一只猫", "一只猫", "狗"], "一只猫"]
    rows = [{"image": "a.png", "question": "?", "answers" if isinstance(s, list) else "answer": s} for s in said]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    recipe = load_recipe(recipe_file(data={"train": [{"path": str(path), "format": "vqa"}]}))
    assert answers_of_rows(recipe, 1) == ["red", "一只猫", "blue"] and answers_of_rows(recipe, 2) == ["red", "一只猫"]
    with pytest.raises(UserError, match="min_count"):
        answers_of_rows(recipe, 4)
