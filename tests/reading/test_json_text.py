"""UTF-8 text and JSON, and the sentence for what is neither."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from vlm_sft.base.errors import RowError, UserError
from vlm_sft.reading.json_text import is_json, lines_of, parse_document, parse_json, parse_rows, read_text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "x.json: not JSON at line 1, column 2 ("),
        (b"\xff\xff\xff\xff\xff", "x.json: not JSON (byte 0xff is not UTF-8)"),
        ("[" * 100_000, "x.json: the JSON cannot be read (maximum recursion depth exceeded"),
        ("9" * 5000, "x.json: the JSON cannot be read (Exceeds the limit"),
    ],
)
def test_what_is_no_json_is_the_row_s_problem(text, message):
    with pytest.raises(RowError) as raised:
        parse_json(text, "x.json")
    assert str(raised.value).startswith(message)
    assert (raised.value.where, raised.value.reason) == ("x.json", "not JSON")
    assert not is_json(text if isinstance(text, str) else "")


def test_a_line_has_columns_only():
    with pytest.raises(RowError, match="line 7: not JSON at column 2"):
        parse_json("{", "a.jsonl, line 7", one_line=True)


def test_of_a_whole_file_it_is_the_source_s():
    with pytest.raises(UserError) as raised:
        parse_document("{", Path("a.json"))
    assert not isinstance(raised.value, RowError)
    assert parse_document('{"猫": 1}', Path("a.json")) == {"猫": 1}


def test_text_is_utf8_with_or_without_a_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff猫".encode())
    assert read_text(tmp_path / "a.txt") == "猫"
    assert list(lines_of(io.BytesIO("\ufeff左\n右".encode()), Path("a"))) == ["左\n", "右"]
    (tmp_path / "a.txt").write_bytes("好\n左边".encode("gb18030"))
    with pytest.raises(UserError, match=r"a\.txt, line 1: byte 0xba is not UTF-8: save the file as UTF-8"):
        read_text(tmp_path / "a.txt")


def test_what_is_wrong_behind_a_key_that_stands_twice_is_one_sentence_too():
    with pytest.raises(UserError, match=r"^a\.json: not JSON at line 1, column 29"):
        parse_rows('[{"a": 1, "a": 2}, {"b": 1},', Path("a.json"))
