"""Records of a benchmark: what they depend on, and what a damaged file of them is."""

from __future__ import annotations

import json

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.evaluation.records import Records, fingerprint
from vlm_sft.evaluation.task_rows import Asked
from vlm_sft.pages.records import read_records


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
    records.finish(records.collect(["1"]), {"fingerprint": "a" * 64})
    assert {path.name for path in tmp_path.iterdir()} == {"a.aaaaaaaaaaaa.part-0.jsonl", "[ab]*.json", "[ab]*.jsonl"}


def test_half_a_character_is_written_and_read(tmp_path):
    records = Records(tmp_path, "x", "a" * 64)
    with records.adding(0) as write:
        write([{"id": "1", "answer": "\ud83d", "question": "谁？", "answers": ["猫"], "score": 0.0}])
    assert records.done() == {"1"} and records.collect(["1"])[0]["answer"] == "\ud83d"
    records.finish(records.collect(["1"]), {"fingerprint": "a" * 64})
    assert records.finished() == {"fingerprint": "a" * 64} and records.done() == {"1"}
    assert not list(tmp_path.glob("*.part-*")) and records.collect(["1"])[0]["answer"] == "\ud83d"
    assert Records(tmp_path, "x", "b" * 64).finished() == {}


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(UserError, match="cannot be written"), Records(tmp_path / "file", "x", "a" * 64).adding(0):
        pass
