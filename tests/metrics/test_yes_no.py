"""How POPE and MME read yes and no."""

from __future__ import annotations

import json

import pytest

from support.paths import SCORERS
from vlm_sft.metrics.yes_no import mme_says, pope_says_yes


@pytest.mark.parametrize(
    ("answer", "pope", "mme"),
    [
        ("yes", True, "yes"),
        ("No", False, "no"),
        ("No, there is none.", False, "no"),
        ("There is a dog. It is not brown.", True, "other"),
        ("There is not.", False, "other"),
        ("Nothing here", True, "no"),
        ("NO", True, "no"),
        ("Y", True, "yes"),
        ("n.", True, "no"),
        ("x", True, "other"),
        ("是", True, "other"),
        ("", True, "other"),
    ],
)
def test_yes_and_no(answer, pope, mme):
    assert (pope_says_yes(answer), mme_says(answer)) == (pope, mme)


def test_each_answer_is_taken_for_what_llava_and_lmms_eval_take_it_for():
    pope, mme = (
        json.loads((SCORERS / f"{name}.json").read_text(encoding="utf-8"))["cases"] for name in ("pope", "mme")
    )
    assert len(pope) == 300 and len(mme) == 340
    for case in pope:
        assert pope_says_yes(case["answer"]) == (case["says"] == "yes"), case
    for case in mme:
        assert mme_says(case["prediction"]) == case["says"], case
