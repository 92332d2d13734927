"""Records of a benchmark: what they depend on, and what a damaged file of them is."""

from __future__ import annotations

import json
import os
import random

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.evaluation.contamination import seen_in_words
from vlm_sft.evaluation.records import Records, by_kind, fingerprint, score, totals_of
from vlm_sft.evaluation.task_rows import Asked
from vlm_sft.evaluation.tasks import load_task
from vlm_sft.pages.records import read_records


def asked(number, **more):
    return Asked(number, "谁？", [], **{"answers": ["猫"], **more})


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "bundle.json").write_text("{}")
    (tmp_path / "trained.safetensors").write_bytes(b"weights")
    return tmp_path


def test_weights_questions_and_settings_decide(bundle):
    asked = [Asked("1", "什么？", [{"path": "/a.png", "bytes": None}], ["猫"])]
    marks = {fingerprint(bundle, asked, {"settings": {}})}
    marks.add(fingerprint(bundle, asked, {"settings": {"max_new_tokens": 3}}))
    for change in (
        {"text": "谁？"},
        {"answers": ["狗"]},
        {"images": [{"path": "/b.png", "bytes": None}]},
        {"kind": "x"},
    ):
        marks.add(fingerprint(bundle, [Asked(**{**vars(asked[0]), **change})], {"settings": {}}))
    (bundle / "trained.safetensors").write_bytes(b"others")
    marks.add(fingerprint(bundle, asked, {"settings": {}}))
    assert len(marks) == 7


def test_a_file_that_is_none_of_ours_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    for text in ("[]\n", '{"id": 3, "answer": ""}\n', "x\n{}"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"line 1 (is no|has no).*: remove the file and evaluate again"):
            read_records(path, unfinished=True)
    with pytest.raises(UserError, match="cannot be read"):
        read_records(tmp_path / "gone.jsonl")
    path.write_text('{"id": "1", "answer": "猫"}\n{"id": "2", "ans', encoding="utf-8")
    assert [one["id"] for one in read_records(path, unfinished=True)] == ["1"]
    with pytest.raises(UserError, match='line 1 has no "question"'):
        read_records(path)


def test_a_name_with_marks_of_patterns_is_a_name(tmp_path):
    records = Records(tmp_path, "[ab]*", "a" * 64)
    (tmp_path / f"a.{'a' * 12}.part-0.jsonl").write_text("another's")
    with records.adding(0) as write:
        write([{"id": "1", "answer": "猫"}])
    records.finish(records.collect([asked("1")]), {"fingerprint": "a" * 64})
    assert {path.name for path in tmp_path.iterdir()} == {"a.aaaaaaaaaaaa.part-0.jsonl", "[ab]*.json", "[ab]*.jsonl"}


def test_half_a_character_is_written_and_read(tmp_path):
    records, one = Records(tmp_path, "x", "a" * 64), [asked("1")]
    with records.adding(0) as write:
        write([{"id": "1", "answer": "\ud83d", "question": "谁？", "answers": ["猫"], "score": 0.0}])
    assert records.done(one) == {"1"} and records.collect(one)[0]["answer"] == "\ud83d"
    records.finish(records.collect(one), {"fingerprint": "a" * 64, "seconds": 3.5, "contamination": None})
    assert records.finished() == {"seconds": 3.5, "contamination": None} and records.done(one) == {"1"}
    assert not list(tmp_path.glob("*.part-*")) and records.collect(one)[0]["answer"] == "\ud83d"
    assert Records(tmp_path, "x", "b" * 64).finished() == {}


SEEN = {"pictures": 3, "same": 1, "alike": 0, "questions": 2, "examples": ["a = b"], "left_out": 0}
ODD = (None, True, -1, 10**400, 5e-324, "x\x1b]52;c;aGk=\x07", [], [[1]], {}, {"a": 1}, float("nan"), float("inf"))


def test_of_a_summary_that_somebody_else_wrote_what_is_needed_is_read_and_checked(tmp_path):
    records = Records(tmp_path, "x", "a" * 64)
    (tmp_path / "x.jsonl").write_text("")

    def found(**said):
        (tmp_path / "x.json").write_text(json.dumps({"fingerprint": "a" * 64, **said}))
        return records.finished()

    assert found(seconds=2, contamination=SEEN) == {"seconds": 2, "contamination": SEEN}
    assert found(contamination={"unchecked": "why"})["contamination"] == {"unchecked": "why"}
    for odd in ODD:
        assert found(seconds=odd)["seconds"] in (0.0, True, 5e-324), odd
        assert found(contamination=odd)["contamination"] is None, odd
        assert found(contamination={"unchecked": odd})["contamination"] in (None, {"unchecked": odd}), odd
        for name in SEEN:
            seen = found(contamination={**SEEN, name: odd})["contamination"]
            assert seen is None or seen_in_words(seen), (name, odd)
    for text in ("[" * 100_000, "\xff", "", "3", json.dumps({"fingerprint": ["a" * 64]})):
        (tmp_path / "x.json").write_text(text, encoding="latin-1")
        assert records.finished() == {}
    (tmp_path / "x.json").unlink()
    os.mkfifo(tmp_path / "x.json")
    assert records.finished() == {}


@pytest.mark.parametrize("finished", [True, False])
def test_answers_that_somebody_else_wrote_are_answers_to_the_questions_or_asked_again(tmp_path, finished):
    rng, task = random.Random(7), load_task("mmbench_cn")[1]
    questions = [asked(str(k), choices={"A": "猫", "B": "狗"}, answers=["A"]) for k in range(3)]
    records = Records(tmp_path, "x", "a" * 64)
    path = tmp_path / ("x.jsonl" if finished else f"x.{'a' * 12}.part-0.jsonl")
    if finished:
        (tmp_path / "x.json").write_text(json.dumps({"fingerprint": "a" * 64}))
    sound = {"answer": "A", "answer_blank": "B", "confidence": [["A", 0.5]]}
    logs = {"A": [-1.0, 2], "B": [-2.5, 1]}
    kinds = [{}, {"options": logs}, {"options": logs, "options_blank": logs}, {"error": "why"}]
    names = ("answer", "answer_blank", "confidence", "options", "options_blank", "error", "answers", "choices", "kind",
             "group", "verdicts", "verdicts_blank", "score", "question", "images")  # fmt: skip
    odd = [*ODD, {"A": [1, 2]}, {"A": [1, "x"], "B": [1, 2]}, {"A": 1, "B": 2}, [["A", "x"]], [["A", 2.0]]]
    for _ in range(150):
        lines = []
        for one in questions:
            line = {"id": one.id, **sound, **rng.choice(kinds)}
            line |= {name: rng.choice(odd) for name in rng.sample(names, rng.randrange(3))}
            lines.append({key: value for key, value in line.items() if rng.random() < 0.95 or key in ("id", "answer")})
        lines = [line for line in lines if isinstance(line["answer"], str)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = records.done(questions)
        found = records.collect([one for one in questions if one.id in done])
        if found:
            measured, blank = score(task, found)
            json.dumps([totals_of(measured), totals_of(blank) if blank else None, by_kind(task, found), found])
            assert all(one["choices"] == {"A": "猫", "B": "狗"} and one["answers"] == ["A"] for one in found)
    path.write_text("".join(json.dumps({"id": one.id, **sound}) + "\n" for one in questions))
    assert records.done(questions) == {"0", "1", "2"}
    path.write_text(json.dumps({"id": "another's", **sound}) + "\n")
    assert records.done(questions) == set()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(UserError, match="cannot be written"), Records(tmp_path / "file", "x", "a" * 64).adding(0):
        pass
