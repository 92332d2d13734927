"""Rows of benchmarks as their authors and the Hub write them → questions."""

from __future__ import annotations

import json
from datetime import date

import pytest

from support.benchmark_files import inside, lines, own_task, parquet, png
from support.benchmarks import AUTHORS, PUBLISHED
from vlm_sft.base.errors import UserError
from vlm_sft.base.limits import READERS
from vlm_sft.evaluation.benchmark import read_benchmarks
from vlm_sft.evaluation.task_files import literal
from vlm_sft.evaluation.task_rows import Asked, turned


@pytest.mark.parametrize("name", AUTHORS)
def test_the_files_of_its_authors_are_read_too(name, tmp_path):
    AUTHORS[name](tmp_path)
    made = read_benchmarks([name], str(tmp_path))[0]
    assert 3 <= len(made.asked) <= 6 and all(asked.answers and asked.images for asked in made.asked)
    if name == "mmbench_cn":  # a table without rotations has them made
        assert [(asked.id, asked.group, asked.answers) for asked in made.asked[:3]] == [
            ("3", "3", ["B"]), ("1000003", "3", ["A"]), ("2000003", "3", ["C"])
        ]  # fmt: skip
        assert "A. 狗\nB. 鸟\nC. 猫\n请直接回答选项字母。" in made.asked[1].text
    if name == "mmbench_en":  # a rotation names the picture of its question
        assert made.asked[1].id == "1000003" and made.asked[1].images == made.asked[0].images


def test_an_answer_that_is_no_option_is_named(tmp_path):
    rows = [{"question": "Which?", "options": ["a", "b"], "answer": "2", "image": inside(0)}]
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    with pytest.raises(UserError, match='row 1: the right answer "2" is none of its 2 options'):
        read_benchmarks(["ai2d"], str(tmp_path))


def test_a_rotation_moves_options_and_answer_together():
    one = Asked("7", "哪个？\nA. 猫\nB. 狗\nC. 鸟\n请回答。", [], ["A"], {"A": "猫", "B": "狗", "C": "鸟"})
    two = turned(one, 2)
    assert (two.id, two.group, two.answers) == ("2000007", "7", ["B"])
    assert two.choices == {"A": "鸟", "B": "猫", "C": "狗"} and two.text == "哪个？\nA. 鸟\nB. 猫\nC. 狗\n请回答。"
    assert turned(one, 0).text == one.text and two.choices[two.answers[0]] == one.choices[one.answers[0]]


def test_rows_of_mmmu_have_several_pictures_and_open_questions(tmp_path):
    PUBLISHED["mmmu"](tmp_path)
    one, two, three = read_benchmarks(["mmmu"], str(tmp_path))[0].asked
    assert [len(asked.images) for asked in (one, two, three)] == [1, 2, 1]
    assert three.answers == ["24/7", "3.429"] and not three.choices
    assert three.text.endswith("Answer the question using a single word or phrase.")


def test_only_so_many_rows_are_read(tmp_path):
    path = own_task(tmp_path, count=5, max_rows=3)
    assert [len(read_benchmarks([path], None, most)[0].asked) for most in (None, 2, 4)] == [3, 2, 3]


def test_data_may_be_one_file_and_columns_lie_deep(tmp_path):
    rows = [{"deep": {"q": "什么?", "all": [{"text": "一"}, {"text": "二"}]}, "image": inside(3)} for _ in range(2)]
    parquet(tmp_path / "mine.parquet", rows)
    path = own_task(tmp_path, path="mine.parquet", id=None, question="deep.q", answers="deep.all[].text")
    found = read_benchmarks([path], None)[0]
    assert found.asked[1].answers == ["一", "二"] and found.asked[1].id == "2" and found.asked[1].text == "什么?"
    # A picture that two rows hold is kept once, and given back whole.
    assert found.asked[0].images == found.asked[1].images
    assert found.pictures.whole(found.asked[0].images[0])["bytes"] == png(3)


def test_a_column_may_be_empty_or_begin_behind_the_rows_that_are_asked(tmp_path):
    rows = [
        {"q": "多少?", "a": "1", "more": None},
        {"q": "几个?", "a": "2", "more": []},
        {"q": "?", "a": "3", "kind": "数"},
    ]
    lines(tmp_path / "mine.jsonl", rows)
    keys = {"path": "mine.jsonl", "id": None, "question": "q", "answers": "a", "images": []}
    path = own_task(tmp_path, **keys, kind="kind", group="more[].name", max_rows=1)
    (asked,) = read_benchmarks([path], None)[0].asked
    assert (asked.kind, asked.group) == ("", "")
    lines(tmp_path / "mine.jsonl", rows[:2])
    with pytest.raises(UserError, match='no row has the column "kind" of its `kind`'):
        read_benchmarks([path], None)


def test_pictures_outside_the_folder_are_refused(tmp_path):
    (tmp_path / "inside").mkdir()
    path = own_task(tmp_path / "inside")
    row = {"id": "q", "image": "../secret.png", "question": "?", "answer": "1"}
    (tmp_path / "inside" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "secret.png").write_bytes(png(0))
    with pytest.raises(UserError, match=r"secret\.png"):
        read_benchmarks([path], None)


ODD = {
    "answer": [b"\xff", "²", "--5", "9" * 5000, {"a": [b"x"]}, float("inf"), "[" + "[" * 5000, "-" * 5000 + "1"],
    "id": ["²", "9" * 5000, ["a", "b"], {"a": 1}, -1],
    "question": [["a"], {"a": None}, 5, "\ud800"],
    "options": [["²", "1"], "[1, " * 400, "(" * 5000, {"a": 1}, [None, {"b": []}]],
    "source": ["a column called like an argument of ours"],
    "label": [1],
    "work": [None],
    "self": ["x"],
}


@pytest.mark.parametrize("keys", [{}, {"answer_is": "number"}, {"answer_is": "letter"}, {"circular": True}])
def test_odd_values_of_any_column_are_read_or_one_sentence(keys, tmp_path):
    rotates = {"metric": "choice_circular" if keys.get("circular") else "choice", "choices": "options"}
    right = {"number": 0, "letter": "A"}.get(keys.get("answer_is"), "a")
    usual = {"id": "1", "question": "什么?", "answer": right, "options": ["a", "b"]}
    join = {"join": {"files": ["other.jsonl"], "on": "question", "key": "key"}}
    (tmp_path / "other.jsonl").write_text('{"key": ["a"]}\n{"key": {"b": 1}}\n')
    read, said = 0, []
    for column, value in ((column, value) for column, values in ODD.items() for value in values):
        for more in ({"prompt": "{{ question }}{{ row|length }}"}, join):
            path = own_task(tmp_path, path=".", files=["rows.jsonl"], images=[], **{**rotates, **keys, **more})
            text = json.dumps(usual | {column: value}, default=lambda raw: raw.decode("latin-1"))
            (tmp_path / "rows.jsonl").write_text(text + "\n")
            try:
                read += len(read_benchmarks([path], None)[0].asked)
            except UserError as error:
                said.append(str(error))
    assert read > 0 and not any("\n" in sentence for sentence in said)


def test_bytes_and_dates_of_a_table_are_text(tmp_path):
    rows = [{"question": "when?", "answer": date(2024, 2, 29), "id": b"\xff"}]
    parquet(tmp_path / "rows.parquet", rows)
    (asked,) = read_benchmarks([own_task(tmp_path, path="rows.parquet", images=[])], None)[0].asked
    assert asked.answers == ['"2024-02-29"'] and asked.id == "\"b'\\\\xff'\""


def test_a_long_text_is_not_read_as_a_list():
    text = "[" + "1," * READERS.literal_characters + "]"
    assert literal(text) == text and literal("['a', '猫']") == ["a", "猫"]
