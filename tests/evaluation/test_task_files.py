"""Where a benchmark's rows lie: folders as they were fetched, files of authors, the Hub."""

from __future__ import annotations

import datasets
import pytest

from support.benchmark_files import document, inside, parquet
from support.benchmarks import PUBLISHED
from vlm_sft.base.errors import UserError
from vlm_sft.evaluation.benchmark import read_benchmarks
from vlm_sft.evaluation.task_files import at, literal, place_of
from vlm_sft.evaluation.tasks import load_task


def test_a_folder_of_the_hub_may_hold_other_splits_and_languages(tmp_path):
    PUBLISHED["mmbench_en"](tmp_path)
    PUBLISHED["mmbench_cn"](tmp_path)
    parquet(
        tmp_path / "cn" / "test-00000-of-00001.parquet", [{"index": 1, "question": "no answer", "image": inside(0)}]
    )
    english, chinese = (one.asked for one in read_benchmarks(["mmbench_en", "mmbench_cn"], str(tmp_path)))
    assert len(english) == len(chinese) == 4 and "哪个首府" in chinese[0].text


def test_the_hub_is_asked_for_configuration_and_split(tmp_path, monkeypatch):
    PUBLISHED["gqa"](tmp_path)
    seen = []

    def load_dataset(path, name=None, split=None, revision=None):
        seen.append((path, name, split))
        return datasets.Dataset.from_parquet(str(tmp_path / name / f"{split}-00000-of-00001.parquet"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    asked = read_benchmarks(["gqa"], None)[0].asked
    assert seen == [("lmms-lab/GQA", f"testdev_balanced_{what}", "testdev") for what in ("images", "instructions")]
    assert len(asked) == 4 and asked[0].images[0]["digest"] == asked[2].images[0]["digest"]


def test_a_folder_of_its_name_is_taken_where_there_is_one(tmp_path):
    _, task = load_task("pope")
    assert place_of("pope", task, str(tmp_path)) == tmp_path
    (tmp_path / "pope").mkdir()
    assert place_of("pope", task, str(tmp_path)) == tmp_path / "pope"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"data": {}}, 'no list of rows under "data"'),
        ([1], 'no list of rows under "data"'),
        ({"data": [3]}, "data 1: the entry is no object"),
        ({"data": []}, "holds no rows"),
    ],
)
def test_documents_of_another_shape_are_refused(tmp_path, value, said):
    document(tmp_path / "val_v1.0.json", value)
    with pytest.raises(UserError, match=said):
        read_benchmarks(["docvqa"], str(tmp_path))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no data file"):
        read_benchmarks(["docvqa"], str(tmp_path))


def test_columns_are_found_in_objects_and_lists():
    row = {"a": {"b": [{"c": 1}, {}]}, "a.b": 5, "text": "['x', 'y']"}
    assert at(row, "a.b") == 5 and at(row, "a.b[].c") == [1, None]
    assert at(row, "text[]") == ["x", "y"] and at(row, "gone.b") is None


@pytest.mark.parametrize(
    "text",
    ["{[]}", "{[]: 1}", "{(1, 2): 3}", "[{(1, 2): 3}]", "{1, 2}", "[{1}]", "b'x'", "[b'x']", "[...]", "1j", "[1j]",
     "-" * 90_000 + "1", "[" * 50_000, "1" + "+1" * 40_000, "9" * 50_000, "x if y else " * 8000 + "1", "\0",
     "'\\ud800"],
    ids=range(18),
)  # fmt: skip
def test_what_no_row_holds_stays_the_text_that_it_is(text):
    assert literal(text) == text


def test_lists_that_were_written_as_text_are_lists():
    assert literal("['猫', \"dog's\", 3, None, 1.5, ['x'], {'a': 1}]") == ["猫", "dog's", 3, None, 1.5, ["x"], {"a": 1}]
