"""Tables that say one large value many times, or rows without bytes, in little memory and one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft.base.errors import RowError, UserError
from vlm_sft.reading import files, table_rows
from vlm_sft.reading.files import read_file
from vlm_sft.reading.table_rows import batch_size


@pytest.fixture
def small(monkeypatch):
    """A budget of 64 kB a row."""
    monkeypatch.setenv("VLM_SFT_LIMITS", f"row_bytes={2**16}")


def write_arrow(path, table):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def test_rows_without_bytes_have_an_end(tmp_path):
    path = write_arrow(tmp_path / "a.arrow", pa.table({"nothing": pa.nulls(10**9)}))
    assert path.stat().st_size < 1000
    with pytest.raises(UserError, match=r"says that it has 1,000,000,000 rows in [\d,]+ bytes; it is refused"):
        next(iter(read_file(path)))
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([2 * 10**9], pa.int32()), pa.array(["猫"]))
    with pytest.raises(UserError, match=r"says that it has 2,000,000,000 rows"):
        next(iter(read_file(write_arrow(tmp_path / "b.arrow", pa.table({"runs": runs})))))
    pq.write_table(pa.table({"a": pa.nulls(3 * 10**6, pa.bool_())}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"says that it has 3,000,000 rows"):
        next(iter(read_file(tmp_path / "c.parquet")))


def test_one_value_for_many_rows_is_held_row_by_row(small, tmp_path, monkeypatch):
    words = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0, 2]), pa.array(["x" * 40_000, "猫", "y" * 70_000]))
    found = [values for _, values in read_file(write_arrow(tmp_path / "a.arrow", pa.table({"text": words})))]
    assert [len(each["text"]) for each in found[:3]] == [40_000, 1, 40_000]
    assert isinstance(found[3], RowError) and "row 4: the row has" in str(found[3])
    views = pa.array(["x" * 70_000, "猫"], pa.string_view())
    found = [values for _, values in read_file(write_arrow(tmp_path / "b.arrow", pa.table({"text": views})))]
    assert isinstance(found[0], RowError) and found[1] == {"text": "猫"}


def test_a_large_value_shared_in_lists_is_refused(small, tmp_path):
    words = pa.DictionaryArray.from_arrays(pa.array([0] * 1000), pa.array(["x" * 40_000]))
    lists = pa.ListArray.from_arrays(pa.array([0, 1000]), words)
    with pytest.raises(UserError, match="shares a large value among the entries of lists"):
        list(read_file(write_arrow(tmp_path / "a.arrow", pa.table({"texts": lists}))))


@pytest.mark.parametrize("codec", ["none", "zstd", "gzip"])
def test_a_large_value_of_parquet_is_read_few_rows_at_a_time(codec, tmp_path):
    for length, rows in ((3_000_000, 89), (100, 256), (300_000_000, 1)):
        if length > 10**8 and codec != "zstd":
            continue
        path = tmp_path / f"{length}.parquet"
        texts = pa.DictionaryArray.from_arrays(pa.array([0] * 4), pa.array(["x" * length]))
        pq.write_table(pa.table({"text": texts}), path, compression=codec, dictionary_pagesize_limit=2**30)
        with open(path, "rb") as opened:
            assert batch_size(opened, pq.ParquetFile(path).metadata, path) == rows
    assert len([*read_file(tmp_path / "100.parquet")]) == 4


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False, "compression": "zstd"}])
def test_a_group_without_rows_holds_none_and_is_no_damage(options, tmp_path):
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", picture), ("turns", pa.list_(pa.struct([("said", pa.string())])))])
    row = {"image": {"bytes": b"x", "path": "猫.png"}, "turns": [{"said": "喵"}]}
    for number, groups in enumerate(([], [[]], [[], []], [[], [row], []])):
        path = tmp_path / f"{number}.parquet"
        with pq.ParquetWriter(path, schema, **options) as writer:
            for rows in groups:
                writer.write_table(pa.Table.from_pylist(rows, schema))
        assert [values for _, values in read_file(path)] == [row for rows in groups for row in rows]


def test_pages_are_bounded_together_before_any_is_unpacked(tmp_path, monkeypatch):
    """Twenty columns of a megabyte each, in a few kilobytes; what a page's own header says counts, not the footer."""
    path = tmp_path / "wide.parquet"
    table = pa.table({f"c{i}": pa.array(["x" * 10**6, "猫"]) for i in range(20)})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000 and len([*read_file(path)]) == 2
    monkeypatch.setenv("VLM_SFT_LIMITS", f"page_bytes={10**7}")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *args, **options: pytest.fail("it was read"))
    with pytest.raises(
        UserError, match=r"pages unpack to 1\d,\d+,\d+ bytes, more than the 10,000,000 of `limits\.page"
    ):
        list(read_file(path))


def test_values_that_begin_as_the_one_before_are_read_few_at_a_time(tmp_path):
    path = tmp_path / "same.parquet"
    table = pa.table({"text": ["x" * 3_000_000] * 200})
    pq.write_table(table, path, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})
    assert path.stat().st_size < 10**7
    with open(path, "rb") as opened:
        assert batch_size(opened, pq.ParquetFile(path).metadata, path) < 100


@given(st.binary(max_size=40))
def test_any_bytes_of_a_pages_header_are_a_struct_or_an_error(data):
    try:
        found, end = table_rows.thrift_struct(data, 0)
    except (IndexError, ValueError):
        return
    assert isinstance(found, dict) and 0 < end <= len(data)


@pytest.mark.parametrize(
    "options", [{}, {"data_page_version": "2.0"}, {"use_dictionary": False}, {"compression": "gzip"}]
)
def test_every_page_of_a_file_is_seen(options, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"n": list(range(5000)), "t": [f"猫{i}" for i in range(5000)]}), path, data_page_size=500, **options
    )
    group = pq.ParquetFile(path).metadata.row_group(0)
    with open(path, "rb") as opened:
        sizes = [page.size for column in table_rows._columns(opened)[0] for page in table_rows._pages(opened, column)]
    assert len(sizes) >= 10
    headers = sum(group.column(number).total_uncompressed_size for number in range(2)) - sum(sizes)
    assert 0 < headers < 200 * len(sizes)


KINDS = {
    "plain": lambda array: array,
    "dictionary": lambda array: array.dictionary_encode(),
    "view": lambda array: array.cast(pa.string_view()),
    "struct": lambda array: pa.StructArray.from_arrays([array], ["a"]),
    "list": lambda array: pa.array([[text] for text in array.to_pylist()], pa.list_(pa.string())),
}


@given(st.lists(st.none() | st.text(max_size=5), max_size=9), st.sampled_from(sorted(KINDS)))
def test_what_is_read_is_what_pyarrow_reads(texts, kind):
    batch = pa.record_batch([KINDS[kind](pa.array(texts, pa.string()))], ["x"])
    found = [values for _, values in table_rows.table_rows(Path(__file__), [batch])]
    assert found == batch.to_pylist()


def of_zeros(count):
    """One row with a list of so many zeros."""
    return pa.table({"a": pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.array(np.zeros(count, "i8")))})


def said_of(path, monkeypatch, most=2**20):
    monkeypatch.setenv("VLM_SFT_LIMITS", f"page_bytes={most},row_bytes={2**20}")
    with pytest.raises(UserError) as refused:
        list(read_file(path))
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("kind", ["stream", "file"])
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_buffers_of_arrow_are_counted_before_any_is_unpacked(kind, codec, tmp_path, monkeypatch):
    path, table = tmp_path / "a.arrow", of_zeros(10**6)
    options = pa.ipc.IpcWriteOptions(compression=codec)
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with new(str(path), table.schema, options=options) as writer:
        writer.write_table(table)
    assert path.stat().st_size < 50_000
    monkeypatch.setattr(files, "table_rows", lambda *_: pytest.fail("it was read"))
    assert "its buffers unpack to 8,000," in said_of(path, monkeypatch)


@pytest.mark.parametrize("codec", [None, "zstd", "lz4"])
@pytest.mark.parametrize("kind", ["stream", "file"])
def test_packed_arrow_is_read_right(kind, codec, tmp_path):
    path = tmp_path / "a.arrow"
    rows = [{"n": n, "t": f"猫{n % 3}", "l": [str(n)] * (n % 4)} for n in range(700)]
    table = pa.Table.from_pylist(rows)
    table = table.set_column(1, "t", table["t"].combine_chunks().dictionary_encode())
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with new(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table, max_chunksize=300)
    assert [row for _, row in read_file(path)] == rows


def test_a_file_of_arrow_that_is_cut_off_or_names_other_batches_is_refused(tmp_path, monkeypatch):
    path, table = tmp_path / "a.arrow", pa.table({"n": list(range(9))})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        for _ in range(3):
            writer.write_table(table)
    whole = path.read_bytes()
    for wrong in (whole[:-20], whole[: len(whole) // 2], whole[:8]):
        path.write_bytes(wrong)
        assert "damaged" in said_of(path, monkeypatch)


@pytest.mark.parametrize("word", [None, "x" * 3000])
def test_lists_of_parquet_are_counted_before_they_are_made(word, tmp_path, monkeypatch):
    """A page of a few bytes says that a list has as many entries as it likes."""
    path, table = tmp_path / "a.parquet", of_zeros(10**6)
    if word:
        table = pa.table({"a": [[word] * 5000]})
    pq.write_table(table, path)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(files, "table_rows", lambda *_: pytest.fail("it was read"))
    assert "entries of lists in its column 'a.list.element' take" in said_of(path, monkeypatch)


def test_lists_that_their_pages_hold_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_SFT_LIMITS", f"page_bytes={2**21}")
    path = tmp_path / "a.parquet"
    rows = [{"a": [f"{n} {i} 猫" for i in range(30)], "b": [n] * 30} for n in range(5000)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert [row for _, row in read_file(path)] == rows


def test_what_makes_pyarrow_end_the_process_is_not_asked_of_it(tmp_path):
    """Statistics of the wrong length at the end of a file, say."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [["猫"] * 3, []]}), path)
    with open(path, "rb") as opened:
        (column,) = table_rows._columns(opened)[0]
    levels = column[16][3]
    assert len(levels) == 4, "pyarrow writes how many values have each level"
    whole = path.read_bytes()
    said = bytes([0x19, 0x46, *(2 * level for level in levels)])
    assert whole.count(said) == 1
    shorter = bytes([0x19, 0x36, *(2 * level for level in levels[1:])])
    end = int.from_bytes(whole[-8:-4], "little") - 1
    path.write_bytes(whole[:-8].replace(said, shorter) + end.to_bytes(4, "little") + b"PAR1")
    with pytest.raises(UserError, match="histogram size mismatch"):
        list(read_file(path))
