"""Exact match in two languages, and GQA's rule against its upstream values."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.paths import GOLDENS
from vlm_sft.metrics.exact_match import contains, exact_match, gqa_exact_match, normalise_answer


def golden(name: str):
    return json.loads((GOLDENS / "metrics" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (" A  red\n3. ", "a red 3"),
        ("红色。", "红色"),
        ("左上角是红色的３，右下角是蓝色的７。", "左上角是红色的3,右下角是蓝色的7"),
        ("Ｙｅｓ！", "yes!"),
        ("3.5", "3.5"),
        ("“stop”", '"stop"'),
        ("yes .", "yes"),
        ("", ""),
    ],
)
def test_normalise_answer(text, normal):
    assert normalise_answer(text) == normal


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    assert normalise_answer(normalise_answer(text)) == normalise_answer(text)


def test_exact_match_takes_any_reference():
    assert exact_match("红色的3。", ["a red 3", "红色的3"])
    assert exact_match("Yes", "yes")
    assert not exact_match("a red 3", ["a red 8", "红色的8"])
    assert not exact_match("", "yes")
    with pytest.raises(ValueError, match="at least one reference"):
        exact_match("yes", [])


def test_gqa_exact_match_equals_lmms_eval():
    for case in golden("gqa_exact_match.json"):
        assert gqa_exact_match(case["prediction"], case["answer"]) == bool(case["exact_match"]), case


@pytest.mark.parametrize(
    ("said", "right", "stands"),
    [
        ("It is a red bus.", ["bus"], True),
        ("the category", ["cat"], False),
        ("cats", ["cat"], False),
        ("A CAT!", ["cat"], True),
        ("一只黑色的猫在睡觉。", ["猫"], True),
        ("３个人", ["3"], True),
        ("13 people", ["3"], False),
        ("t-shirt, blue", ["blue", "green"], True),
        ("", ["cat"], False),
        ("anything", [""], False),
        ("a+b (c)", ["+b (c)"], True),
        ("猫cat", ["cat"], True),
    ],
)
def test_a_right_answer_stands_in_what_was_said_as_whole_words(said, right, stands):
    assert contains(said, right) == stands
