"""Patterns, folders, saved datasets and the Hub: what is read, and the sentence for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from support.source_files import LINES, values
from support.source_files import refused_file as refused
from support.source_files import write_file as write
from vlm_sft.base.errors import UserError
from vlm_sft.reading.locations import list_files, read_rows


def test_a_pattern_reads_files_in_order(tmp_path):
    for part in ("part-1", "part-0", "nested/part-2"):
        write(tmp_path / f"{part}.jsonl", json.dumps({"id": part}))
    assert values(tmp_path / "part-*.jsonl") == [{"id": "part-0"}, {"id": "part-1"}]
    assert len(values(tmp_path / "**" / "part-[0-9].jsonl")) == 3
    assert "matches no file" in refused(tmp_path / "none-*.jsonl")


def test_patterns_follow_no_links_to_folders(tmp_path):
    """Two links that point back would be followed in 2**40 ways."""
    write(tmp_path / "a" / "b" / "x.jsonl", LINES)
    write(tmp_path / "a" / ".hidden.jsonl", "broken")
    for name in ("left", "right"):
        (tmp_path / "a" / name).symlink_to(tmp_path / "a", target_is_directory=True)
    assert list_files(str(tmp_path / "**" / "*.jsonl")) == [tmp_path / "a" / "b" / "x.jsonl"]
    assert len(values(tmp_path / "**" / "*.jsonl")) == 2
    assert list_files(str(tmp_path / "a" / "*" / "x.jsonl")) == [tmp_path / "a" / "b" / "x.jsonl"]


def test_patterns_are_relative_too(tmp_path, monkeypatch):
    write(tmp_path / "a" / "x.jsonl", LINES)
    monkeypatch.chdir(tmp_path)
    assert list_files("**/*.jsonl") == [Path("a/x.jsonl")]
    assert list_files("a/*.jsonl") == [Path("a/x.jsonl")]


@pytest.mark.parametrize("path", ["a\0b.jsonl", "", " ", "x" * 5000, "a/" * 3000, "..", "~nobody/x.jsonl", "a*\0"])
def test_paths_that_are_none(path, tmp_path, monkeypatch):
    (tmp_path / "above" / "here").mkdir(parents=True)  # the folder above tmp_path has what other tests wrote
    monkeypatch.chdir(tmp_path / "above" / "here")
    refused(path)


# ----------------------------------------------------------------------------------------------------------- folders


def test_image_folder(tmp_path):
    write(tmp_path / "photos" / "metadata.jsonl", '{"file_name": "1.png", "text": "猫"}')
    (row,) = read_rows(str(tmp_path / "photos"))
    assert row.values == {"file_name": "1.png", "text": "猫", "image": "1.png"}
    assert row.folder == tmp_path / "photos"


def test_image_folder_by_split_and_by_class(tmp_path):
    write(tmp_path / "a" / "train" / "metadata.csv", "file_name,text\n1.png,cat\n")
    write(tmp_path / "a" / "test" / "metadata.csv", "file_name,text\n2.png,dog\n")
    assert [row.folder.name for row in read_rows(str(tmp_path / "a"))] == ["train"]
    assert [row.values["text"] for row in read_rows(str(tmp_path / "a"), split="test")] == ["dog"]
    for name in ("cats", "dogs"):
        write(tmp_path / "b" / name / "metadata.csv", f"file_name,text\n1.png,{name}\n")
    assert [row.values["text"] for row in read_rows(str(tmp_path / "b"))] == ["cats", "dogs"]


def test_data_files_of_a_split(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write(tmp_path / "data" / f"{name}.jsonl", json.dumps({"id": name}))
    assert [row["id"][:11] for row in values(tmp_path)] == ["train-00000", "train-00001"]
    assert [row["id"][:4] for row in values(tmp_path, split="test")] == ["test"]
    assert 'has no split "validation" (it holds data/test-00000-of-00001.jsonl' in refused(tmp_path, split="validation")


def test_test_rows_do_not_slip_into_training(tmp_path):
    write(tmp_path / "test.jsonl", LINES)
    assert 'no split "train"' in refused(tmp_path)
    write(tmp_path / "more" / "trainings.jsonl", LINES)
    assert len(values(tmp_path / "more")) == 2


def test_folders_that_cannot_be_read(tmp_path):
    assert "a folder of images needs a metadata.jsonl" in refused(tmp_path)
    write(tmp_path / "a.csv", "x\n1\n")
    write(tmp_path / "a.json", "[]")
    assert "data files of several kinds (.csv, .json)" in refused(tmp_path)
    write(tmp_path / "half" / "state.json", "{}")
    assert "is not a whole saved dataset" in refused(tmp_path / "half")


def test_saved_datasets_are_never_decoded(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": b"not an image", "path": None}], "text": ["猫"]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.save_to_disk(str(tmp_path / "one"))
    assert values(tmp_path / "one") == [{"image": {"bytes": b"not an image", "path": None}, "text": "猫"}]
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "two"))
    assert len(values(tmp_path / "two", split="test")) == 1
    assert 'has no split "val", only train, test' in refused(tmp_path / "two", split="val")


# --------------------------------------------------------------------------------------------------------------- Hub


def test_hub(monkeypatch):
    asked = {}

    def load_dataset(name, *, split, revision, streaming):
        asked.update(name=name, split=split, revision=revision, streaming=streaming)
        return datasets.Dataset.from_dict({"text": ["猫"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (row,) = read_rows("owner/pictures", split="val", revision="v1")
    assert asked == {"name": "owner/pictures", "split": "val", "revision": "v1", "streaming": False}
    assert row == ("owner/pictures (val), row 1", None, {"text": "猫"}, None)


def test_a_hub_dataset_is_streamed_with_its_embedded_images(monkeypatch, tmp_path):
    """Through the real streaming reader, on local parquet as the Hub has it."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": b"not an image", "path": None}] * 3, "text": ["猫", "dog", "bus"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    real = datasets.load_dataset

    def load_dataset(name, *, split, revision, streaming):
        found = real("parquet", data_files={"train": str(tmp_path / "train.parquet")}, split=split, streaming=streaming)
        assert isinstance(found, datasets.IterableDataset)
        return found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = [row.values for row in read_rows("owner/pictures", stream=True)]
    assert [row["text"] for row in found] == ["猫", "dog", "bus"]
    assert found[0]["image"] == {"bytes": b"not an image", "path": None}, "not decoded"


def test_hub_without_a_network(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nwith many lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refused("data/captions")
    assert 'no file or folder "data/captions" here' in message
    assert "Couldn't reach the Hub): correct the path, or download" in message


def test_hub_offline_for_real(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "could not be loaded" in refused("owner/no-such-dataset")


def test_a_saved_dataset_names_nothing_elsewhere(tmp_path):
    saved = datasets.Dataset.from_list([{"a": 1}])
    for name in ("elsewhere", "one"):
        saved.save_to_disk(str(tmp_path / name))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "two"))
    arrow = next((tmp_path / "elsewhere").glob("*.arrow"))
    for folder, file, key in (("one", "state.json", "_data_files"), ("two", "train/state.json", "_data_files")):
        for named in (f"../{arrow.parent.name}/{arrow.name}", str(arrow), "..", 5):
            path = tmp_path / folder / file
            whole = path.read_text(encoding="utf-8")
            path.write_text(json.dumps(json.loads(whole) | {key: [{"filename": named}]}), encoding="utf-8")
            with pytest.raises(UserError, match=r"state\.json names .*, which is nothing beside it; it is refused"):
                list(read_rows(str(tmp_path / folder)))
            path.write_text(whole, encoding="utf-8")
        assert len(list(read_rows(str(tmp_path / folder)))) == 1
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["../elsewhere"]}', encoding="utf-8")
    with pytest.raises(UserError, match=r"dataset_dict\.json names '\.\./elsewhere', which is nothing beside it"):
        list(read_rows(str(tmp_path / "two"), split="../elsewhere"))
