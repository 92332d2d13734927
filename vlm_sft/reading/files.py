"""One data file → its rows: JSON, JSON lines, CSV, TSV, parquet, Arrow and tar shards, each one of `FILE_READERS`.

A reader yields the rows as they are written, each with the words that name its place (`captions.jsonl, line 3`). In
place of a row that cannot be read, while those behind it can, it yields the error that says so.
"""

from __future__ import annotations

import csv
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from json import JSONDecoder
from pathlib import Path
from typing import Any

from ..base.errors import RowError, UserError, row_error
from ..base.names import Json
from ..base.whole_files import check_regular, open_regular
from ..base.words import closest, first_line, reason_of, short
from .json_text import BOM, is_json, key_twice, lines_of, parse_json, parse_rows, read_text
from .table_rows import batch_size, check_count, check_messages, table_rows
from .tar_shards import read_tar

Found = Iterator[tuple[str, Any]]
"""(place in words, row as it is written or the `RowError` that it is)."""

HEAD = 2**20  # bytes that `about_rows` looks at


def read_file(path: Path) -> Iterator[tuple[str, Json | RowError]]:
    """Yield the rows of a file, or the error of each row that is wrong by itself.

    Raises:
        UserError: the file is missing, empty, no regular file, of an unknown ending or damaged. Raised while iterating.
    """
    reader = FILE_READERS.get(path.suffix.lower())
    if reader is None:
        endings = ", ".join(FILE_READERS)
        raise UserError(f'The data file {path} ends in "{path.suffix}", but only {endings} can be read: convert it.')
    try:
        check_file(path)
        for where, values in reader(path):
            if not isinstance(values, dict | RowError):
                values = row_error(where, "the row is not an object with named values", "correct it", "wrong type")
            yield where, values
    except FileNotFoundError:
        raise no_such_file(path) from None
    except OSError as error:
        raise UserError(f"The data file {path} cannot be read ({reason_of(error)}): check it.") from None


def check_file(path: Path) -> None:
    """Look that a path is a file with something in it; a named pipe would be waited for without end.

    Raises:
        UserError: it is empty, or no regular file.
        OSError: it cannot be looked at.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"The data file {path} is not a regular file (a pipe or a device?): write the rows to a file.")
    if status.st_size == 0:
        raise UserError(f"The data file {path} is empty (0 bytes): write it again or remove the source.")


def no_such_file(path: Path) -> UserError:
    """The sentence for a file that is not there, naming the one beside it that is most like it."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return UserError(f"The data file {path} was not found (there is no folder {path.parent}): correct the path.")
    near = closest(path.name, names)
    hint = f"; did you mean {path.parent / near}" if near else ""
    return UserError(f"The data file {path} was not found{hint}: correct the path (relative to the working directory).")


def about_rows(path: Path) -> int | None:
    """About how many rows a text file holds, by the size of its first ones; None where that cannot be told.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with open_regular(path) as stream:
        head = stream.read(HEAD)
    text = head.removeprefix(BOM).decode("utf-8", "ignore").lstrip()
    if text.startswith("["):  # a document
        rows, seen = 0, 1
        while (end := _end_of_value(text, seen)) is not None:
            rows, seen = rows + 1, end
        return round(rows * size / len(text[:seen].encode())) if rows else None
    if path.suffix.lower() == ".json" and not is_json(text.partition("\n")[0]):
        return None  # rows that lie deeper in a document
    lines = head.count(b"\n")
    return round(lines * size / (head.rindex(b"\n") + 1)) if lines else None


def _end_of_value(text: str, start: int) -> int | None:
    """Where the comma or bracket behind the next JSON value of a list ends; None where that is not there."""
    start += len(text[start : start + 100]) - len(text[start : start + 100].lstrip())
    try:
        _, end = JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return end + 1 if end < len(text) else None


def _read_jsonl(path: Path) -> Found:
    with open_regular(path) as stream:
        first = stream.read(256).removeprefix(BOM).lstrip()[:1]
        if first == b"[":
            stream.close()
            yield from _read_json(path)
            return
        stream.seek(0)
        for number, line in enumerate(lines_of(stream, path), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    yield where, parse_json(line, where, "write one JSON object a line", one_line=True)
                except RowError as error:
                    yield where, error


def _read_json(path: Path) -> Found:
    text = read_text(path)
    first_line = text.lstrip().partition("\n")[0]
    if text.lstrip()[:1] == "{" and text.strip() != first_line.strip() and is_json(first_line):
        yield from _read_jsonl(path)  # JSON lines under the name .json, as many datasets are published
        return
    rows, doubled = parse_rows(text, path)
    if isinstance(rows, dict):
        rows = rows["data"] if isinstance(rows.get("data"), list) else [rows]
    if not isinstance(rows, list):
        raise UserError(f"{path}: the top level is neither a list nor an object: write a list of rows.")
    del text
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        wrong = key_twice(row) if doubled else None
        yield where, row if wrong is None else row_error(where, wrong, "keep one of them", "key twice")


def _read_table(path: Path) -> Found:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open_regular(path) as stream:
        # strict: a stray quotation mark is an error here; otherwise it swallows the rows up to the next one.
        table = csv.DictReader(lines_of(stream, path), delimiter=delimiter, strict=True, restkey="\0more")
        while True:
            line = table.line_num + 1
            try:
                first = table.line_num == 0
                header = table.fieldnames  # read now, so that the line number is that of a row
                if first and header:
                    _check_header(path, header)
                line = table.line_num + 1
                values = next(table, None) if header else None
            except csv.Error as error:
                mend = 'put text that contains the delimiter or " in quotation marks and write " as ""'
                if "field limit" in str(error):  # most often a quotation mark that nothing closes
                    mend = "close the quotation mark that opens in this row, or bring so long a text as JSON lines"
                kind = path.suffix[1:].upper()
                raise UserError(f"{path}, line {line}: the row is not valid {kind} ({error}): {mend}.") from None
            if values is None:
                return
            where = f"{path}, line {line}"
            if "\0more" in values or None in values.values():
                more = "more" if "\0more" in values else "fewer"
                what = f"the row has {more} fields than the header"
                mend = "put text that contains the delimiter in quotation marks"
                yield where, row_error(where, what, mend, "wrong number of fields")
            else:
                yield where, values


def _check_header(path: Path, header: Sequence[str]) -> None:
    """Excel writes semicolons in many countries, and a table under the wrong name has one column, with all of it.

    Of two columns of one name the last would be taken.
    """
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise UserError(f"{path}, line 1: two columns are called {short(twice[0])!r}: give each its own name.")
    name = header[0]
    other = next((mark for mark in (";", "\t", ",", "，", "|") if mark in name), None)
    if len(header) == 1 and other is not None:
        raise UserError(
            f"{path}, line 1: the one column is called {name!r}; fields are separated by commas in a .csv and by tabs "
            f"in a .tsv, not by {other!r}: write the file again, or rename it."
        )


def _read_parquet(path: Path) -> Found:
    import pyarrow.parquet as pq

    with open_regular(path) as opened, pq.ParquetFile(opened) as file:
        check_count(path, file.metadata.num_rows)
        size = batch_size(opened, file.metadata, path)
        yield from table_rows(path, file.iter_batches(batch_size=size))


def _read_arrow(path: Path) -> Found:
    """A stream, as `datasets` writes, or a file (feather), which is a stream between two marks and a list of places.

    What is read is checked, for its offsets are addresses.
    """
    import pyarrow as pa

    check_regular(path)
    with pa.memory_map(str(path)) as mapped:
        is_file = mapped.read(6) == b"ARROW1"
        start = 8 if is_file else 0
        mapped.seek(start)
        batches = check_messages(mapped, path)
        if is_file and pa.ipc.open_file(mapped).num_record_batches != batches:
            raise ValueError("its list of places names other batches than there are")
        mapped.seek(start)
        yield from table_rows(path, pa.ipc.open_stream(mapped))


def _damaged(kind: str, reader: Callable[[Path], Found]) -> Callable[[Path], Found]:
    """The reader with pyarrow's many complaints as one sentence."""

    def read(path: Path) -> Found:
        import pyarrow as pa

        try:
            yield from reader(path)
        except (pa.ArrowException, UnicodeDecodeError, ValueError, OSError, struct.error) as error:
            if isinstance(error, UserError):
                raise
            what = f"{path}: not {kind} file, or a damaged one"
            raise UserError(f"{what} ({first_line(error)}): write it again.") from None

    return read


FILE_READERS: dict[str, Callable[[Path], Found]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _damaged("a parquet", _read_parquet),
    ".arrow": _damaged("an Arrow", _read_arrow),
    ".tar": read_tar,
}

TEXT_FILES = frozenset((".json", ".jsonl", ".ndjson", ".csv", ".tsv"))
"""Of these, the endings of files that are text."""
