"""One source, row by row: what is left out and said, and sources that cannot be."""

from __future__ import annotations

import json

import pytest

from support.source_files import refused, write
from vlm_sft.base.errors import RowError
from vlm_sft.data.source import every_answer, source_rows
from vlm_sft.recipe.sections import Source


def test_wrong_rows_are_told_and_left_out(tmp_path):
    lines = [
        json.dumps({"image": "1.png", "caption": ["x", "猫"]}),
        "broken",
        json.dumps({"image": "3.png", "caption": ["x", " "]}),
        "[]",
        json.dumps({"image": "", "caption": "x"}),
        json.dumps({"image": "http://x/1.png", "caption": "x"}),
        json.dumps({"image": "7.png", "caption": "z"}),
    ]
    source = Source(path=write(tmp_path / "c.jsonl", "\n".join(lines)), format="caption")
    rejected: list[RowError] = []
    rows = list(source_rows(source, reject=rejected.append))
    assert [row["id"] for row in rows] == ["c/1#1", "c/1#2", "c/7"], "a row keeps its number, and is used whole"
    assert [(error.where.rpartition(" ")[2], error.reason) for error in rejected] == [
        ("2", "not JSON"),
        ("3", "no answer"),
        ("4", "wrong type"),
        ("5", "no image"),
        ("6", "image is a URL"),
    ]
    assert all(str(error).startswith(error.where) for error in rejected)
    with pytest.raises(RowError, match="line 2: not JSON"):
        list(source_rows(source))


def test_rows_are_read_one_by_one(tmp_path):
    source = Source(path=write(tmp_path / "c.jsonl", '{"image": "a", "caption": "x"}\nbroken'), format="caption")
    assert next(iter(source_rows(source)))["id"] == "c/1"


def test_rules_of_every_conversation_name_the_row(tmp_path):
    def chats(*messages) -> Source:
        rows = [{"messages": [{"role": role, "content": content} for role, content in messages]}]
        return Source(path=write(tmp_path / "m.jsonl", rows), format="messages")

    assert "m.jsonl, line 1: message 1 is an empty answer" in refused(chats(("user", "q"), ("assistant", " ")))
    assert "m.jsonl, line 1: message 0 has role 'tool'" in refused(chats(("tool", "q")))
    assert 'm.jsonl, line 1: message 1 has role "user"' in refused(chats(("user", "q"), ("user", "q")))
    assert "m.jsonl, line 1: there is no answer to learn from" in refused(chats(("user", "问题")))


def test_columns_that_are_nowhere(tmp_path):
    path = write(tmp_path / "m.jsonl", [{"prompt": "q", "completion": "a", "picture": "1.png"}])
    source = Source(path=path, format="messages", columns={"image": "pictures"})
    assert "No row of" in refused(source)
    assert '"pictures" that `columns` maps' in refused(source)
    source = Source(path=path, format="messages", columns={"imgae": "picture"})
    assert 'maps the column "imgae", which the format messages does not have; did you mean "image"' in refused(source)


def test_sources_that_cannot_be(tmp_path):
    path = write(tmp_path / "m.json", "[]")
    assert "holds no rows" in refused(Source(path=path, format="messages"))
    takers = "only the formats caption, vqa, coco, cc_sbu_align, vqav2, gqa take them"
    assert takers in refused(Source(path=path, format="llava", prompts=["x"]))
    assert 'the prompt "x", which lacks {question}' in refused(Source(path=path, format="vqa", prompts=["x"]))
    prompts = {"en": ["{question}"]}
    assert 'the prompt "{question}", which has' in refused(Source(path=path, format="caption", prompts=prompts))
    source = Source(path=path, format="vqa").model_copy(update={"format": "koko"})
    assert 'has the format "koko": it must be one of messages, llava, caption, vqa' in refused(source)


def test_the_answers_of_all_annotators_by_the_ids_of_the_rows(tmp_path):
    said = [{"answer": text, "answer_id": number} for number, text in enumerate(["猫", "cat", "猫"])]
    rows = [
        {"image": "1.png", "question": "什么?", "given": said, "answer": "cat", "id": 7},
        {"image": "2.png", "question": "how many?", "given": [2, " two "]},
        {"image": "3.png", "question": "where?", "answer": "here"},
    ]
    path = write(tmp_path / "q.jsonl", rows)
    source = Source(path=path, format="vqa", name="动物", columns={"answers": "given"})
    found = every_answer(source)
    assert found == {"动物/7": ["猫", "cat", "猫"], "动物/2": ["2", " two "], "动物/3": ["here"]}
    assert list(found) == [row["id"] for row in source_rows(source)]
    assert list(every_answer(source.model_copy(update={"max_rows": 1}))) == ["动物/7"]
