"""The metrics of VQA-v2 against their upstream values."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.paths import GOLDENS, SCORERS
from vlm_sft.metrics.vqa import vqa_accuracy


def golden(name: str):
    return json.loads((GOLDENS / "metrics" / name).read_text(encoding="utf-8"))


def test_vqa_accuracy_equals_evalai_as_llava_has_it():
    golden = json.loads((SCORERS / "evalai.json").read_text(encoding="utf-8"))
    scores = [vqa_accuracy(case["answer"], case["answers"], "evalai") for case in golden["cases"]]
    for case, score in zip(golden["cases"], scores, strict=True):
        assert score == pytest.approx(case["accuracy"], abs=1e-12), case
    assert len(scores) == 320 and sum(scores) / len(scores) == pytest.approx(golden["overall"])


def test_vqa_accuracy_equals_the_official_script():
    cases = golden("vqa_accuracy.json")
    scores = [vqa_accuracy(case["answer"], case["human_answers"]) for case in cases["cases"]]
    for case, score in zip(cases["cases"], scores, strict=True):
        assert round(100 * score, 2) == pytest.approx(case["accuracy"]), case
    assert round(100 * sum(scores) / len(scores), 2) == pytest.approx(cases["overall"])


@pytest.mark.parametrize(
    ("prediction", "answers", "official", "evalai"),
    [
        ("t-shirt", ["t-shirt"] * 10, 0.0, 1.0),  # the official script keeps the mark on the unanimous side only
        ("yes", ["Yes"] * 10, 0.0, 1.0),
        ("dont know", ["dont know"] * 10, 0.0, 1.0),
        ("couldntve", ["couldn't've"] * 10, 0.0, 0.0),
        ("couldn'tve", ["couldn't've"] * 10, 1.0, 1.0),
        ("two", ["2"] * 3 + ["3"] * 7, 0.9, 0.9),
        ("猫", ["猫"] * 10, 1.0, 1.0),
    ],
)
def test_the_two_vqa_accuracies_by_name(prediction, answers, official, evalai):
    assert vqa_accuracy(prediction, answers) == pytest.approx(official)
    assert vqa_accuracy(prediction, answers, "evalai") == pytest.approx(evalai)


def test_vqa_accuracy_refuses_what_it_cannot_score():
    with pytest.raises(ValueError, match="at least one human answer"):
        vqa_accuracy("yes", [])
    with pytest.raises(ValueError, match='"official" or "evalai"'):
        vqa_accuracy("yes", ["yes"], "other")  # type: ignore[arg-type]


@given(st.text(), st.lists(st.text(), min_size=1, max_size=10))
def test_vqa_accuracy_is_a_share(prediction, answers):
    assert 0.0 <= vqa_accuracy(prediction, answers) <= 1.0
    assert 0.0 <= vqa_accuracy(prediction, answers, "evalai") <= 1.0
