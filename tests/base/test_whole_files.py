"""A file is there whole or not at all."""

from __future__ import annotations

import json
import stat

import pytest

from vlm_sft.base.whole_files import remove_unfinished, write_json, write_whole, written_beside


def test_a_file_gets_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "新" / "答案.txt"
    with written_beside(path) as beside:
        beside.write_text("half", encoding="utf-8")
        assert not path.exists() and beside.parent.parent == path.parent, "a rename cannot leave the disk"
        beside.write_text("whole", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"猫": 1})

    def half() -> None:
        with written_beside(path) as beside:
            beside.write_text("half", encoding="utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert json.loads(path.read_text(encoding="utf-8")) == {"猫": 1} and "猫" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_written_in_the_same_way(tmp_path):
    with written_beside(tmp_path / "out") as beside:
        beside.mkdir()
        (beside / "a").write_text("1", encoding="utf-8")
    assert (tmp_path / "out" / "a").is_file() and len(list(tmp_path.iterdir())) == 1


def test_others_may_read_it_as_any_file_of_the_user(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_whole(tmp_path / "a", b"x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_two_may_write_the_same_at_a_time(tmp_path):
    path = tmp_path / "a"
    with written_beside(path) as first:
        first.write_bytes(b"first")
        write_whole(path, b"second")
    assert path.read_bytes() == b"first"


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".unfinished-[a]-x1" / "b").mkdir(parents=True)
    (tmp_path / ".unfinished-a-x1").mkdir()
    remove_unfinished(tmp_path / "[a]")
    assert [path.name for path in tmp_path.iterdir()] == [".unfinished-a-x1"]
