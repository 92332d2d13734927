"""Which option an answer chooses, against VLMEvalKit's own values and the rules of LLaVA, SEED-Bench and AI2D."""

from __future__ import annotations

import json

import pytest

from support.paths import GOLDENS
from vlm_sft.metrics.choices import (
    can_infer,
    can_infer_option,
    can_infer_text,
    lettered,
    option_of_ai2d,
    option_of_llava,
    option_of_seed,
)


def golden(name):
    return json.loads((GOLDENS / "metrics" / name).read_text(encoding="utf-8"))


def test_can_infer_equals_vlmevalkit():
    cases = golden("can_infer.json")
    assert cases
    for case in cases:
        raw, choices = case["raw"], case["choices"]
        found = can_infer_option(raw, choices), can_infer_text(raw, choices), can_infer(raw, choices)
        assert found == tuple(case[key] or None for key in ("option_result", "text_result", "result")), case


@pytest.mark.parametrize(
    ("answer", "llava", "seed", "ai2d"),
    [
        ("B", "B", "B", "B"),
        ("B. 狗", "B", "B", "B"),
        ("The answer is B.", "B", "T", "The answer is B."),
        (" B.dog", None, "B", "B"),
        ("b", None, "B", "b"),
        ("", None, "", ""),
        ("E", None, "E", "E"),
        ("The answer is A. The answer is B.", None, "T", "The answer is A. The answer is B."),
    ],
)
def test_other_rules(answer, llava, seed, ai2d):
    choices = lettered(["猫", "狗", "a bird"])
    assert (option_of_llava(answer, choices), option_of_seed(answer), option_of_ai2d(answer)) == (llava, seed, ai2d)


def test_more_options_than_letters_are_refused():
    with pytest.raises(ValueError, match="27 options"):
        lettered([str(n) for n in range(27)])
