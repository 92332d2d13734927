"""A file is there whole or not at all."""

from __future__ import annotations

import ast
import json
import os
import socket
import stat
from pathlib import Path

import pytest

from support.paths import ROOT
from vlm_sft.base.whole_files import (
    IrregularError,
    check_entries,
    open_regular,
    read_text,
    remove_unfinished,
    write_json,
    write_whole,
    written_beside,
)


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


# -- what is no file ---------------------------------------------------------------------------------------------------


def test_pipes_sockets_devices_and_folders_are_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "管")
    (tmp_path / "link").symlink_to(tmp_path / "管")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    named = {"管": "a named pipe", "link": "a named pipe", "socket": "a socket", ".": "a folder"}
    for path, what in [*((tmp_path / name, what) for name, what in named.items()), (Path("/dev/zero"), "a device")]:
        with pytest.raises(IrregularError, match=f"is {what}, not a regular file: give the path of a file") as error:
            open_regular(path)
        assert error.value.what == what and str(path) in str(error.value)


def test_a_folder_with_a_pipe_in_it_is_refused_and_one_with_a_dead_link_is_not(tmp_path):
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "below").mkdir()
    check_entries(tmp_path)
    check_entries(tmp_path / "not there")
    os.mkfifo(tmp_path / "merges.txt")
    with pytest.raises(IrregularError, match=r"merges\.txt"):
        check_entries(tmp_path)


def test_text_is_read_as_python_reads_it(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff猫\r\n狗\r".encode())
    assert read_text(tmp_path / "a.txt") == (tmp_path / "a.txt").read_text(encoding="utf-8")
    assert read_text(tmp_path / "a.txt", "utf-8-sig") == "猫\n狗\n"


# What is handed an open file, or looked at before; and methods of ours that are called so.
OTHERS = ("Image", "tarfile", "os", "av", "films", "self")


@pytest.mark.parametrize("path", sorted((ROOT / "vlm_sft").rglob("*.py")), ids=lambda path: path.stem)
def test_nothing_else_opens_a_file_to_read_it(path):
    """Another way to open would wait for a pipe again."""
    if path.name == "whole_files.py":
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    for call in calls:
        own = call.func.attr if isinstance(call.func, ast.Attribute) else None
        assert own not in ("read_text", "read_bytes"), f"line {call.lineno}"
        if own == "open" or getattr(call.func, "id", None) == "open":
            writes = any(getattr(each, "value", None) in ("w", "a", "ab", "ab+") for each in call.args)
            others = own == "open" and (not call.args or getattr(call.func.value, "id", "") in OTHERS)
            assert writes or others, f"line {call.lineno}: open it with base/whole_files.py"
