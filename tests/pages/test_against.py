"""Two bundles on the same questions: where the other's answers are looked for, and what is compared."""

from __future__ import annotations

import json

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.pages.against import against, earlier_answers
from vlm_sft.pages.records import sheet_of

SCORES = {"scores": {"exact_match": {"value": 0.5, "low": 0.4, "high": 0.6}}}


def records(scores, **changes):
    return [
        {"id": f"q{i}", "question": "颜色?", "answers": ["red"], "answer": "red" if score else "blue", "score": score}
        | changes
        for i, score in enumerate(scores)
    ]


def test_what_got_better_and_worse_is_counted_and_tested():
    sheet = sheet_of("gqa", records([1, 1, 0, 0, 1]), SCORES)
    against(sheet, records([0, 1, 0, 1, 0]), "old")
    assert [entry.change for entry in sheet.entries] == ["better", "", "", "worse", "better"]
    assert sheet.entries[3].other.answer == "red"
    assert (sheet.paired.better, sheet.paired.worse, sheet.paired.test) == (2, 1, "McNemar") and sheet.notes == []


def test_questions_that_one_was_not_asked_are_left_out_and_said():
    sheet = sheet_of("gqa", records([1, 1, 0]), SCORES)
    against(sheet, records([0, 1, 0, 1, 0])[1:], "old")
    assert sheet.paired.questions == 2 and sheet.entries[0].other is None
    assert sheet.notes == [
        "1 of 3 questions were not asked of the other bundle.",
        "The other bundle was asked 2 more, which are not compared.",
    ]


def test_other_questions_are_refused():
    sheet = sheet_of("gqa", records([1, 1, 0]), SCORES)
    for changes in ({"question": "other?"}, {"answers": ["green"]}):
        with pytest.raises(UserError, match=r'old: its question "q0" is not that of gqa here'):
            against(sheet, records([0, 1], **changes), "old")
    strangers = [{**record, "id": f"x{record['id']}"} for record in records([1])]
    with pytest.raises(UserError, match="old and gqa have no question in common"):
        against(sheet, strangers, "old")


def test_answers_lie_in_a_bundle_a_folder_or_a_file(tmp_path):
    text = "".join(json.dumps(record) + "\n" for record in records([1, 0]))
    (tmp_path / "old" / "evaluation").mkdir(parents=True)
    (tmp_path / "old" / "evaluation" / "gqa.jsonl").write_text(text)
    for other in (tmp_path / "old", tmp_path / "old" / "evaluation", tmp_path / "old" / "evaluation" / "gqa.jsonl"):
        assert earlier_answers(str(other), ["gqa"], "run {}") == {"gqa": records([1, 0])}
    with pytest.raises(UserError, match=r"--against \S+old has no answers to pope: run `run \S+old` first\."):
        earlier_answers(str(tmp_path / "old"), ["gqa", "pope"], "run {}")
    with pytest.raises(UserError, match=r"--against nowhere is no folder or file with answers to gqa"):
        earlier_answers("nowhere", ["gqa"], "run {}")
    with pytest.raises(UserError, match="is one file of answers to 2 benchmarks; give the folder"):
        earlier_answers(str(tmp_path / "old" / "evaluation" / "gqa.jsonl"), ["gqa", "pope"], "run {}")
