"""What lies in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm_sft.start.folder import look_into, split_named_by


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


@pytest.mark.parametrize(
    ("path", "side"),
    [("train.jsonl", "train"),
     ("captions_val2017.json", "validation"), ("test/a.csv", "test"), ("dev.tsv", "validation"),
     ("training set/x.csv", "train"), ("valid.csv", "validation"), ("latest.csv", None), ("contest.csv", None),
     ("trained_dogs.csv", None), ("train_and_test.csv", None), ("a/b/validation/rows.csv", "validation")],
)  # fmt: skip
def test_sides_are_read_from_names(path, side, tmp_path):
    assert split_named_by(tmp_path / "train" / path, tmp_path / "train") == side


def test_folders_are_classes_where_they_say_something(tmp_path):
    pets = look_into(made(tmp_path / "p", "cat/1.jpg", "dog/2.jpg", "images/3.jpg"))
    assert set(pets.classes.values()) == {"cat", "dog"}
    for names in (["2023-01-05/1.jpg", "2023-01-06/2.jpg"], ["100CANON/1.jpg", "101CANON/2.jpg"],
                  ["train/1.jpg", "test/2.jpg"], ["cat/1.jpg", "dog/2.jpg", "3.jpg"], ["cat/1.jpg"]):  # fmt: skip
        assert look_into(made(tmp_path / names[0].replace("/", "-"), *names)).classes == {}


def test_names_are_captions_where_they_are_words(tmp_path):
    named = look_into(made(tmp_path / "n", "red_bus.jpg", "blueCar-2.png", "橘猫.webp"))
    assert list(named.named.values()) == ["blue Car", "red bus", "橘猫"]
    for number, names in enumerate((["IMG_1.jpg", "IMG_2.jpg"], ["a.jpg", "b.jpg"], ["photo one.jpg", "DSC_ab.jpg"],
                                    ["mmexport1.jpg", "wx_camera_2.jpg"])):  # fmt: skip
        assert look_into(made(tmp_path / f"x{number}", *names)).named == {}


def test_hidden_files_are_passed_over_and_texts_go_with_their_pictures(tmp_path):
    found = look_into(made(tmp_path, "a.JPG", "a.txt", "b.png", "b.json", "notes.txt", ".hidden.jpg", "__MACOSX/a.jpg",
                           ".git/x.json", "rows.csv", "c.heic"))  # fmt: skip
    assert [path.name for path in found.pictures] == ["a.JPG", "b.png"]
    assert [path.name for path in found.texts.values()] == ["a.txt"]
    assert [path.name for path in found.records.values()] == ["b.json"]
    assert [path.name for path in found.tables] == ["rows.csv"]
    assert found.sentences() == [f"1 .heic file is left out, the first {tmp_path / 'c.heic'}: convert them to JPEG."]
