"""Measures of benchmarks: what they make of all answers."""

from __future__ import annotations

import json
import math

import pytest

from support.paths import GOLDENS, SCORERS
from vlm_sft.metrics.measures import MEASURES, Answered


def test_the_totals_of_pope_and_mme_equal_llava_s_and_lmms_eval_s():
    pope = json.loads((SCORERS / "pope.json").read_text(encoding="utf-8"))
    names = {
        "accuracy": "Accuracy",
        "precision": "Precision",
        "recall": "Recall",
        "F1": "F1 score",
        "yes_share": "Yes ratio",
    }
    for part in [{"from": 0, "to": len(pope["cases"]), "totals": pope["totals"]}, *pope["sets"]]:
        asked = [Answered(case["answer"], [case["label"]]) for case in pope["cases"][part["from"] : part["to"]]]
        totals = MEASURES["pope"](asked).totals
        assert {theirs: totals[ours].score() for ours, theirs in names.items()} == pytest.approx(part["totals"])
    mme = json.loads((SCORERS / "mme.json").read_text(encoding="utf-8"))
    found = MEASURES["mme"](
        [
            Answered(case["prediction"], [case["answer"]], kind=case["category"], group=case["question_id"])
            for case in mme["cases"]
        ]
    )
    assert found.each == [case["score"] for case in mme["cases"]]
    for name, total in mme["totals"].items():
        assert found.totals[name.split("_")[1]].score() == pytest.approx(total)


def test_circular_evaluation_equals_vlmevalkit():
    case = json.loads((GOLDENS / "metrics" / "circular_eval.json").read_text(encoding="utf-8"))
    asked = [
        Answered(str(row["prediction"]), [row["answer"]],
                 {letter: row[letter] for letter in "ABCDE" if row.get(letter) is not None},
                 group=str(int(row["index"] % 1e6)))
        for row in case["rows"]
    ]  # fmt: skip
    found = MEASURES["choice_circular"](asked)
    assert found.each == [float(row["hit"]) for row in case["vanilla"]]
    assert found.totals["circular_accuracy"].score() == pytest.approx(case["circular_accuracy"])
    assert found.totals["accuracy"].score() == pytest.approx(case["vanilla_accuracy"])


def test_pope_counts_as_its_authors_do():
    said = ["yes", "no", "Yes, there is.", "No.", "There is not", "是"]
    right = ["yes", "yes", "no", "no", "yes", "yes"]
    found = MEASURES["pope"]([Answered(a, [b]) for a, b in zip(said, right, strict=True)])
    scores = {name: total.score() for name, total in found.totals.items()}
    # Said yes where it is so: 2; where it is not: 1; missed: 2.
    assert scores == pytest.approx({
        "accuracy": 3 / 6, "F1": 4 / 7, "precision": 2 / 3, "recall": 2 / 4, "yes_share": 3 / 6,
        "accuracy_strict": 1 / 6,
    })  # fmt: skip
    assert found.each == [1, 0, 0, 1, 0, 1]


def test_mme_adds_what_pictures_are_wholly_right_by_subtask():
    def pair(kind, picture, *hits):
        return [Answered("Yes" if hit else "No", ["Yes"], kind=kind, group=picture) for hit in hits]

    asked = [*pair("count", "a", 1, 1), *pair("count", "b", 1, 0), *pair("OCR", "c", 1, 1),
             *pair("code_reasoning", "d", 0, 0)]  # fmt: skip
    totals = MEASURES["mme"](asked).totals
    assert totals["perception"].score() == pytest.approx((200 + 50) / 2 + 200)
    assert totals["cognition"].score() == 0
    assert totals["accuracy"].score() == pytest.approx(5 / 8)
    low, high = totals["perception"].interval()
    assert low < 325 <= high


@pytest.mark.parametrize(
    ("measure", "one", "score"),
    [
        ("exact_match", Answered("红色。", ["红色"]), 1),
        ("gqa", Answered("Yes.", ["yes"]), 1),
        ("vqa", Answered("t-shirt", ["t-shirt"] * 10), 0),  # the official script loses the mark
        ("vqa_evalai", Answered("t-shirt", ["t-shirt"] * 10), 1),
        ("choice", Answered("它是狗", ["B"], {"A": "猫", "B": "狗"}), 1),
        ("choice_llava", Answered("B. dog", ["B"], {"A": "cat", "B": "dog"}), 1),
        ("choice_seed", Answered("Because", ["B"], {"A": "cat", "B": "dog"}), 1),
        ("choice_ai2d", Answered("B. dog", ["B"], {"A": "cat", "B": "dog"}), 1),
        ("mmmu", Answered("(B)", ["B"], {"A": "$1", "B": "$2"}), 1),
        ("mmmu", Answered("so it is 5", ["5", "6"]), 1),
        ("mmmu", Answered("？", ["B"], {"A": "$1", "B": "$2"}), 0),
        ("anls", Answered("helo", ["hello"]), 0.8),
        ("relaxed", Answered("104", ["100"]), 1),
        ("ocrbench", Answered("It says STOP", ["stop"], kind="Regular Text Recognition"), 1),
        ("ocrbench", Answered("X", ["x"], kind="Handwritten Mathematical Expression Recognition"), 0),
        ("captions", Answered("a dog runs", ["a dog runs"]), None),
        ("captions_characters", Answered("一只狗", ["一只狗"]), None),
        ("chinese", Answered("一只狗在跑", ["一只狗在跑"]), pytest.approx(1)),
    ],
)
def test_each_measure(measure, one, score):
    found = MEASURES[measure]([one])
    assert score is None or found.each == [score]
    assert len(found.each) == 1 and all(0 <= total.score() <= 10.001 for total in found.totals.values())


def test_a_judge_is_summed_up_as_llava_does():
    """`summarize_gpt_review.py`: the mean of the answers' scores over that of the references', of all and by kind."""
    verdicts = [[(8, 4), (6, 6)], [(9, 9), None], [None, None], [(10, 5), (10, 7)]]
    kinds = ["conv", "conv", "detail", "complex"]
    asked = [Answered("", ["r"], kind=kind, verdicts=each) for kind, each in zip(kinds, verdicts, strict=True)]
    found = MEASURES["judge"](asked)
    pairs = [pair for each in verdicts for pair in each if pair]
    scores = {name: total.score() for name, total in found.totals.items()}
    assert scores["relative_score"] == pytest.approx(100 * (31 / 5) / (43 / 5)) and len(pairs) == 5
    assert scores["relative_conv"] == pytest.approx(100 * 19 / 23) and scores["relative_complex"] == pytest.approx(60)
    assert scores["relative_detail"] == 0 and scores["answer_score"] == 6.2 and scores["reference_score"] == 8.6
    assert scores["relative_reference_first"] == pytest.approx(100 * 18 / 27)
    # Of the two questions with both orders: what was shown first over the same shown second.
    assert scores["gain_of_first"] == pytest.approx((8 + 6 + 10 + 7) / (6 + 4 + 10 + 5) - 1)
    assert found.each[:2] == [pytest.approx(10 / 14), 1] and math.isnan(found.each[2]) and found.each[3] == 0.6
    low, high = found.totals["relative_score"].interval()
    assert low < scores["relative_score"] < high
    nothing = MEASURES["judge"]([Answered("", ["r"], verdicts=[None, None])])
    assert nothing.totals["relative_score"].interval() == (0, 0) and math.isnan(nothing.each[0])
