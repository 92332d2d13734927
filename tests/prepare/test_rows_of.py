"""The rows a command is given: of a recipe or of options, each time anew, and the wrong ones said at the end."""

from __future__ import annotations

import json

import pytest

from vlm_sft.base.errors import UserError
from vlm_sft.prepare.rows_of import RowsOf


def test_rows_of_a_file_are_read_each_time_anew(tmp_path, photos):
    path = tmp_path / "rows.jsonl"
    lines = [{"image": photo, "text": f"第{n}张"} for n, photo in enumerate(photos[:3])]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    rows = RowsOf(str(path), "caption", None, ["caption=text"], 0.0)
    assert [row["id"] for row in rows] == [row["id"] for row in rows] == ["rows/1", "rows/2", "rows/3"]
    (described,) = rows.describe()
    assert (described["path"], described["format"], described["columns"]) == (str(path), "caption", {"caption": "text"})


def test_a_recipe_says_itself_what_its_sources_hold(recipe_file):
    assert len(list(RowsOf(str(recipe_file()), None, None, None, 0.0))) == 8
    with pytest.raises(UserError, match="is a recipe, which says itself what its sources hold"):
        RowsOf(str(recipe_file()), None, None, ["caption=text"], 0.0)


def test_wrong_rows_are_passed_over_up_to_the_share_and_said(tmp_path, photos, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"image": photos[0], "caption": text}) for text in ("猫", " ", "狗")))
    rows = RowsOf(str(path), "caption", None, None, 0.5)
    assert [row["id"] for row in rows] == ["rows/1", "rows/3"]
    assert "no answer" in capsys.readouterr().err
    rows.max_rejected = 0.1
    with pytest.raises(UserError, match='line 2: "caption" is empty'):
        list(rows)
