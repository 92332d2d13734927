"""Files of answers: what is read of them, and which files are none."""

from __future__ import annotations

import json

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.pages.records import entries_of, read_records, sheet_of

RECORD = {
    "id": "q1", "images": ["/a.jpg"], "question": "什么颜色？", "choices": None, "answers": ["red", "red", "红"],
    "kind": None, "answer": "blue", "answer_blank": "red", "score": 0.0, "score_blank": 1.0,
    "confidence": [["bl", 0.9], ["ue", 0.4]],
}  # fmt: skip


def write(tmp_path, *records):
    path = tmp_path / "gqa.jsonl"
    lines = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_record_is_shown_as_it_is():
    (entry,) = entries_of("gqa", [RECORD])
    assert entry.answers == {"red": 2, "红": 1} and entry.kind == "" and entry.choices == {}
    assert entry.wrong and entry.blind and not entry.change
    assert entry.sure == pytest.approx(0.6)
    (bare,) = entries_of("gqa", [{k: RECORD[k] for k in ("id", "question", "answers", "answer")} | {"score": 0.6}])
    assert bare.sure is None and not bare.wrong and not bare.blind and bare.images == []


def test_what_no_judge_gave_a_score_is_neither_wrong_nor_better():
    verdict = {"order": "answer first", "reference": None, "answer": None, "text": "谢谢"}
    (entry,) = entries_of("bench", [{**RECORD, "score": None, "verdicts": [verdict]}])
    assert not entry.wrong and not entry.blind and not entry.change and entry.verdicts[0].text == "谢谢"


def test_a_sheet_has_the_scores_of_its_summary(tmp_path):
    path = write(tmp_path, RECORD, {**RECORD, "id": "q2"})
    score = {"exact_match": {"value": 0.5, "low": 0.0, "high": 1.0}}
    sheet = sheet_of("gqa", read_records(path), {"scores": score, "scores_blank": None})
    assert (len(sheet.entries), sheet.scores, sheet.blank) == (2, score, {})


@pytest.mark.parametrize(
    ("line", "flaw"),
    [
        ("{", "is no JSON"),
        ("[" * 9000, "is no JSON"),
        ([1], "is no object"),
        ({**RECORD, "id": 7}, 'has no "id" as answers have it'),
        ({**RECORD, "score": None}, 'has no "score" as answers have it'),
        ({**RECORD, "score": float("nan")}, 'has no "score" as answers have it'),
        ({**RECORD, "score": 10**400}, 'has no "score" as answers have it'),
        ({**RECORD, "score_blank": 10**400}, 'has no "score_blank" as answers have it'),
        ({**RECORD, "answers": "red"}, 'has no "answers" as answers have it'),
        ({**RECORD, "confidence": [["blue"]]}, 'has no "confidence" as answers have it'),
        ({**RECORD, "confidence": [["blue", "sure"]]}, 'has no "confidence" as answers have it'),
        ({**RECORD, "choices": ["cat"]}, 'has no "choices" as answers have it'),
        ({**RECORD, "images": "/a.jpg"}, 'has no "images" as answers have it'),
        ({**RECORD, "score_blank": "0"}, 'has no "score_blank" as answers have it'),
        (
            {**RECORD, "verdicts": [{"order": "alone", "answer": "4", "text": ""}]},
            'has no "verdicts" as answers have it',
        ),
        ({**RECORD, "verdicts": [7]}, 'has no "verdicts" as answers have it'),
        ({**RECORD, "verdicts": "good"}, 'has no "verdicts" as answers have it'),
        ({**RECORD}, 'has the id "q1" again'),
    ],
)
def test_other_files_are_refused_in_a_sentence(tmp_path, line, flaw):
    path = write(tmp_path, RECORD, line)
    with pytest.raises(UserError) as error:
        read_records(path)
    assert str(error.value) == f"{path}: line 2 {flaw}: give a file that `vlm-sft evaluate` wrote."


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "odd.jsonl").write_bytes(b"\xff\xfe")
    for name, why in (("empty", "holds no answers"), ("odd", "is no JSON"), ("none", "cannot be read")):
        with pytest.raises(UserError, match=why):
            read_records(tmp_path / f"{name}.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_records(tmp_path)
