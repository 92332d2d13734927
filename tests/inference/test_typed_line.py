"""Paths as people type them, and what the tab key makes of them."""

from __future__ import annotations

from functools import partial

from vlm_sft.inference.typed_line import _complete, split_paths


def test_paths_are_read_as_people_write_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a b.png", "it's.png", "c.png", "d.png"):
        (tmp_path / name).touch()
    assert split_paths("a b.png") == ["a b.png"]
    assert split_paths("it's.png") == ["it's.png"]
    assert split_paths("'a b.png' c.png") == ["a b.png", "c.png"]
    assert split_paths(r"a\ b.png") == ["a b.png"]
    assert split_paths("~/c.png d.png") == [f"{tmp_path}/c.png", "d.png"]
    assert split_paths("no such.png") == ["no such.png"], "meant as one path, so that the error names it"
    assert split_paths("it's gone.png") == ["it's gone.png"]


def test_tab_completes_commands_and_paths(tmp_path):
    (tmp_path / "图 1.png").touch()
    (tmp_path / "图片").mkdir()
    complete = partial(_complete, ["/image", "/video", "/reset"])
    assert [complete("/re", state) for state in range(2)] == ["/reset ", None]
    found = [complete(f"/image {tmp_path}/图", state) for state in range(3)]
    assert found == [f"/image {tmp_path}/图 1.png", f"/image {tmp_path}/图片/", None]
    assert complete(f"/video {tmp_path}/图片", 0) == f"/video {tmp_path}/图片/"
    assert complete("", 0) is None
