"""One data file to raw rows: what is read, and the sentence for what cannot be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.source_files import LINES, ROWS, check_rows_or_sentence, values
from support.source_files import refused_file as refused
from support.source_files import write_file as write
from vlm_sft.base.errors import RowError
from vlm_sft.reading import files as file_readers
from vlm_sft.reading.files import about_rows, read_file
from vlm_sft.reading.locations import read_rows


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", "\ufeff" + LINES + "\n"),
        ("a.ndjson", LINES.replace("\n", "\r\n\r\n")),
        ("a.jsonl", json.dumps(ROWS)),  # a list under the wrong name
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", "\ufeff" + json.dumps({"data": ROWS, "version": 1}, ensure_ascii=False)),
        ("a.json", LINES),  # JSON lines under the wrong name
        ("a.JSON", "\n\n " + json.dumps(ROWS)),
        ("a.csv", "image,caption\n1.png,a red 3\n2.png,左上角是红色的3\n"),
        ("a.csv", '\ufeffimage,caption\r\n"1.png","a red 3"\r\n2.png,左上角是红色的3'),
        ("a.tsv", "image\tcaption\n1.png\ta red 3\n2.png\t左上角是红色的3\n"),
    ],
)
def test_text_files(tmp_path, name, content):
    assert values(write(tmp_path / name, content)) == ROWS


def test_csv_fields_may_hold_anything_in_quotes(tmp_path):
    path = write(tmp_path / "a.csv", 'image,caption\n1.png,"a ""red"" 3,\nand a 7"\n2.png,猫\n')
    assert values(path) == [{"image": "1.png", "caption": 'a "red" 3,\nand a 7'}, {"image": "2.png", "caption": "猫"}]


def test_parquet_with_embedded_images_stays_encoded(tmp_path):
    rows = [{"image": {"bytes": b"not decoded", "path": None}, "caption": "猫"}] * 600
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = list(read_rows(str(tmp_path / "a.parquet")))
    assert [row.values for row in found] == rows
    assert found[599].where.endswith("a.parquet, row 600")


def test_rows_say_where_they_are_from(tmp_path):
    lines = list(read_rows(str(write(tmp_path / "a.jsonl", "\n" + LINES))))
    assert [row.where for row in lines] == [f"{tmp_path}/a.jsonl, line 2", f"{tmp_path}/a.jsonl, line 3"]
    assert lines[0].folder == tmp_path
    listed = read_rows(str(write(tmp_path / "a.json", json.dumps(ROWS))))
    assert [row.where for row in listed] == [f"{tmp_path}/a.json, row 1", f"{tmp_path}/a.json, row 2"]
    table = read_rows(str(write(tmp_path / "a.csv", 'x\n"1\n1"\n2\n')))
    assert [row.where for row in table] == [f"{tmp_path}/a.csv, line 2", f"{tmp_path}/a.csv, line 4"]


def test_nothing_is_read_ahead(tmp_path):
    rows = read_rows(str(write(tmp_path / "a.jsonl", LINES + "\nbroken")))
    assert next(rows).values == ROWS[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl is empty (0 bytes)"),
        ("a.jsonl", LINES + "\n{'image': 1}", "a.jsonl, line 3: not JSON at column 2 ("),
        ("a.json", '[{"a": 1},\n {"b": }]', "a.json: not JSON at line 2, column 8 (Expecting value)"),
        ("a.json", '{"a": 1}\n{"b": }', "a.json, line 2: not JSON at column 7"),
        ("a.json", "3", "the top level is neither a list nor an object"),
        ("a.json", '[{"a": 1}, "猫"]', "a.json, row 2: the row is not an object"),
        ("a.jsonl", "[1]", "a.jsonl, row 1: the row is not an object"),
        ("a.json", "[" * 100_000, "cannot be read"),
        ("a.json", "[" + "9" * 5000 + "]", "cannot be read"),
        ("a.jsonl", LINES.encode("gb18030"), "a.jsonl, line 2: byte 0xd7 is not UTF-8: save the file as UTF-8"),
        ("a.jsonl", LINES.encode("gb18030"), "iconv -f GB18030 -t UTF-8"),
        ("a.json", ('[{"a": 1},\n' + '{"b": "左边"}]').encode("gb18030"), "a.json, line 2: byte"),
        ("a.csv", "image,caption\n1.png,左边\n".encode("gb18030"), "a.csv, line 2: byte"),
        ("a.json", json.dumps(ROWS).encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        ("a.csv", "image,caption\n1.png,a, b\n", "a.csv, line 2: the row has more fields than the header"),
        ("a.csv", '"image\n', "a.csv, line 1: the row is not valid CSV"),
        ("a.csv", "image,caption\n1.png\n", "a.csv, line 2: the row has fewer fields than the header"),
        ("a.tsv", 'image\tcaption\n1.png\t"red" 3\n', "a.tsv, line 2: the row is not valid TSV"),
        ("a.csv", 'image,caption\n1.png,"red 3\n2.png,blue\n', "a.csv, line 2: the row is not valid CSV"),
        ("a.parquet", "PAR1 no", "not a parquet file"),
        ("a.arrow", "ARROW1 no", "not an Arrow file"),
        ("a.arrow", "no", "not an Arrow file"),
        ("a.tar", "no", "a.tar: not a whole tar archive"),
        ("a.xlsx", "x", 'ends in ".xlsx", but only .json, .jsonl'),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    assert message in refused(write(tmp_path / name, content))


def test_a_missing_file_names_the_closest(tmp_path):
    write(tmp_path / "captions_zh.jsonl", LINES)
    message = refused(tmp_path / "caption_zh.jsonl")
    assert f"caption_zh.jsonl was not found; did you mean {tmp_path}/captions_zh.jsonl" in message
    assert "there is no folder" in refused(tmp_path / "nowhere" / "a.jsonl")
    assert "was not found" in refused("./no such place/a")


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_files_of_either_kind(tmp_path, new):
    rows = [{"image": {"bytes": b"not decoded", "path": None}, "caption": f"{i} 猫"} for i in range(600)]
    table = pa.Table.from_pylist(rows)
    with new(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert values(tmp_path / "a.arrow") == rows
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(tmp_path / "saved"))
    assert values(next((tmp_path / "saved").glob("*.arrow"))) == rows


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    assert "is not a regular file" in refused(tmp_path / "a.jsonl")


def test_a_wrong_line_leaves_the_others(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES + "\n{\n3\n" + LINES)
    found = [row for _, row in read_file(path)]
    assert [row for row in found if isinstance(row, dict)] == ROWS * 2
    assert [(error.where, error.reason) for error in found if isinstance(error, RowError)] == [
        (f"{path}, line 3", "not JSON"),
        (f"{path}, line 4", "wrong type"),
    ]
    table = write(tmp_path / "a.csv", "x,y\n1,2\n1\n3,4\n1,2,3\n")
    assert [row.reason if isinstance(row, RowError) else row["x"] for _, row in read_file(table)] == [
        "1",
        "wrong number of fields",
        "3",
        "wrong number of fields",
    ]


def test_huge_text_is_read(tmp_path):
    huge = "猫" * 3_000_000
    (row,) = values(write(tmp_path / "a.jsonl", json.dumps({"caption": huge}, ensure_ascii=False)))
    assert row["caption"] == huge
    message = refused(write(tmp_path / "a.csv", f'caption\n"{huge}"\n'))
    assert "a.csv, line 2: the row is not valid CSV (field larger than field limit" in message
    assert "close the quotation mark that opens in this row" in message


def test_unreadable_and_cyclic(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert "cannot be read" in refused(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").mkdir()
    assert "holds no data file" in refused(tmp_path / "b.jsonl")


# -------------------------------------------------------------------------------------------------------------- fuzz


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".tar"]),
    st.binary(max_size=80)
    | st.text('[]{}",:\\u12\n\t ea猫\ufeff\ud83d', max_size=60).map(lambda t: t.encode("utf-8", "ignore")),
)
def test_any_bytes_are_rows_or_a_sentence(tmp_path_factory, ending, content):
    path = write(tmp_path_factory.getbasetemp() / f"fuzz{ending}", content)
    check_rows_or_sentence(path)


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict[str, bytes]:
    """One table as parquet and as both kinds of Arrow."""
    folder = tmp_path_factory.mktemp("tables")
    table = pa.Table.from_pylist(
        [{"image": {"bytes": b"x" * 40, "path": "猫"}, "texts": ["a", "b"], "n": i} for i in range(9)]
    )
    pq.write_table(table, folder / "a.parquet")
    found = {".parquet": (folder / "a.parquet").read_bytes()}
    for name, new in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with new(folder / name, table.schema) as writer:
            writer.write_table(table)
        found[name] = (folder / name).read_bytes()
    return found


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from([".parquet", "stream.arrow", "file.arrow"]), data=st.data())
def test_damaged_tables_are_rows_or_a_sentence(tables, tmp_path_factory, name, data):
    content = bytearray(tables[name])
    del content[data.draw(st.integers(0, len(content))) :]
    for place in data.draw(st.lists(st.integers(0, len(tables[name])), max_size=4)):
        if place < len(content):
            content[place] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.getbasetemp() / f"damaged{Path(name).suffix or name}", bytes(content))
    check_rows_or_sentence(path)


@pytest.mark.parametrize("indent", [None, 2])
def test_about_how_many_rows_a_file_has(tmp_path, monkeypatch, indent):
    monkeypatch.setattr(file_readers, "HEAD", 5000)
    rows = [{"id": i, "text": "a]},\n" * (i % 7)} for i in range(2000)]
    texts = {"list.json": json.dumps(rows, indent=indent), "table.csv": "a,b\n" + "1,2\n" * 1999}
    texts["lines.jsonl"] = texts["lines.json"] = "\n".join(map(json.dumps, rows))
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert about_rows(tmp_path / name) == pytest.approx(2000, rel=0.05), name
    for name, text in {"deep.json": '{"data": [\n{"a": 1},\n{"a": 2}]}', "none.jsonl": "", "empty.json": "[]"}.items():
        (tmp_path / name).write_text(text)
        assert about_rows(tmp_path / name) is None, name


TWICE = '{"image": "1.png", "caption": "a", "x": [{"b": 1, "b": 2}]}'


def test_a_key_that_stands_twice_is_a_wrong_row_not_the_last_value(tmp_path):
    lines = write(tmp_path / "a.jsonl", f"{LINES}\n{TWICE}\n{LINES}")
    document = write(tmp_path / "a.json", "[" + ",".join([*LINES.splitlines(), TWICE, *LINES.splitlines()]) + "]")
    for path, place in ((lines, "line 3"), (document, "row 3")):
        found = [values for _, values in read_file(path)]
        assert [*found[:2], *found[3:]] == ROWS * 2 and isinstance(found[2], RowError)
        assert str(found[2]).endswith(
            f"{path.name}, {place}: the key 'b' stands twice in one object, with a value each: keep one of them."
        )


def test_two_columns_of_one_name(tmp_path):
    path = write(tmp_path / "a.csv", "image,caption,caption,,\n1.png,a,b,,\n")
    assert "a.csv, line 1: two columns are called 'caption'" in refused(path)
    assert values(write(tmp_path / "b.csv", "image,caption,,\n1.png,a,,\n")) == [
        {"image": "1.png", "caption": "a", "": ""}
    ]
