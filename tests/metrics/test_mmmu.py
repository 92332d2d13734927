"""MMMU's reading of answers, against lmms-eval's own values."""

from __future__ import annotations

import json
import time

import pytest

from support.paths import GOLDENS
from vlm_sft.metrics import mmmu
from vlm_sft.metrics.choices import lettered

CASES = json.loads((GOLDENS / "metrics" / "mmmu_parse.json").read_text(encoding="utf-8"))


def test_choices_equal_upstream():
    for case in CASES["multiple_choice"]:
        assert mmmu.choice(case["raw"], lettered(case["options"])) == case["parsed"], case


def test_open_answers_equal_upstream():
    for case in CASES["open"]:
        found = mmmu.open_answers(case["raw"])
        assert sorted(v for v in found if isinstance(v, str)) == sorted(case["parsed_strings"]), case
        assert sorted(v for v in found if not isinstance(v, str)) == sorted(case["parsed_numbers"]), case
        assert mmmu.normalised(case["gold"]) == case["gold_normalised"], case
        assert mmmu.open_is_right(case["raw"], case["gold"]) is case["correct"], case


@pytest.mark.parametrize(("answer", "gold", "right"), [("答案是 北京", ["北京"], True), ("3.001", ["2", "3"], True)])
def test_several_right_answers(answer, gold, right):
    assert mmmu.open_is_right(answer, gold) is right


@pytest.mark.parametrize("text", ["1" * 200_000, "1" * 200_000 + ",", "1." * 100_000, "-1" * 100_000, "1,111" * 40_000])
def test_a_long_answer_takes_no_square_of_its_length(text):
    before = time.process_time()
    mmmu.open_answers(text)
    assert time.process_time() - before < 5
