"""One data file → its rows: JSON, JSON lines, CSV, TSV and parquet, each a function in `FILE_READERS`.

A reader yields the rows as they are written, each with the words that name its place (`captions.jsonl, line 3`). In
place of a row that cannot be read, while those behind it can, it yields the error that says so.
"""

from __future__ import annotations

import csv
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from .assets import closest
from .errors import RowError, UserError

Found = Iterator[tuple[str, Any]]
"""(place in words, row as it is written or the `RowError` that it is)."""

BATCH = 256  # rows of a parquet file or dataset held as Python objects at a time
_BOM = b"\xef\xbb\xbf"


def read_file(path: Path) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
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
                values = wrong(where, "the row is not an object with named values", "correct it", "wrong type")
            yield where, values
    except FileNotFoundError:
        raise no_such_file(path) from None
    except OSError as error:
        raise UserError(f"The data file {path} cannot be read ({error.strerror or error}): check it.") from None


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


def wrong(where: str, what: str, mend: str, reason: str) -> RowError:
    """The error of one row."""
    return RowError(f"{where}: {what}: {mend}.", where=where, reason=reason)


def _lines(stream: IO[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(_BOM)
        yield _decode(line, path, number)


def _decode(data: bytes, path: Path, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        other = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "GB18030"
        raise UserError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8, for instance "
            f"with `iconv -f {other} -t UTF-8` if it was written as {other}."
        ) from None


def parse_json(text: str | bytes, where: str, mend: str = "correct the file", one_line: bool = False) -> Any:
    """The value of a JSON text.

    Raises:
        RowError: it is not JSON. Of a whole file `whole_file` makes a `UserError` of it.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if one_line else f"line {error.lineno}, "
        what = f"not JSON at {line}column {error.colno} ({error.msg})"
    except UnicodeDecodeError as error:
        what = f"not JSON (byte 0x{error.object[error.start]:02x} is not UTF-8)"
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets thousands deep
        what = f"the JSON cannot be read ({str(error).split(':')[0]})"
    raise wrong(where, what, mend, "not JSON")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without its byte order mark."""
    return _decode(path.read_bytes().removeprefix(_BOM), path)


def parse_document(text: str, path: Path) -> Any:
    """The value of a file that is one JSON text.

    Raises:
        UserError: it is not JSON, which no single row can be blamed for.
    """
    try:
        return parse_json(text, str(path))
    except RowError as error:
        raise UserError(str(error)) from None


def _read_jsonl(path: Path) -> Found:
    with open(path, "rb") as stream:
        first = stream.read(256).removeprefix(_BOM).lstrip()[:1]
        if first == b"[":
            stream.close()
            yield from _read_json(path)
            return
        stream.seek(0)
        for number, line in enumerate(_lines(stream, path), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    yield where, parse_json(line, where, "write one JSON object a line", one_line=True)
                except RowError as error:
                    yield where, error


def _read_json(path: Path) -> Found:
    text = read_text(path)
    first_line = text.lstrip().partition("\n")[0]
    if text.lstrip()[:1] == "{" and text.strip() != first_line.strip() and _is_json(first_line):
        yield from _read_jsonl(path)  # JSON lines under the name .json, as many datasets are published
        return
    rows = parse_document(text, path)
    if isinstance(rows, dict):
        rows = rows["data"] if isinstance(rows.get("data"), list) else [rows]
    if not isinstance(rows, list):
        raise UserError(f"{path}: the top level is neither a list nor an object: write a list of rows.")
    del text
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_table(path: Path) -> Found:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, "rb") as stream:
        # strict: a stray quotation mark is an error here; otherwise it swallows the rows up to the next one.
        table = csv.DictReader(_lines(stream, path), delimiter=delimiter, strict=True, restkey="\0more")
        while True:
            line = table.line_num + 1
            try:
                header = table.fieldnames  # read now, so that the line number is that of a row
                line = table.line_num + 1
                values = next(table, None) if header else None
            except csv.Error as error:
                mend = 'put text that contains the delimiter or " in quotation marks and write " as ""'
                kind = path.suffix[1:].upper()
                raise UserError(f"{path}, line {line}: the row is not valid {kind} ({error}): {mend}.") from None
            if values is None:
                return
            where = f"{path}, line {line}"
            if "\0more" in values or None in values.values():
                more = "more" if "\0more" in values else "fewer"
                mend = "put text that contains the delimiter in quotation marks"
                yield where, wrong(where, f"the row has {more} fields than the header", mend, "wrong number of fields")
            else:
                yield where, values


def _read_parquet(path: Path) -> Found:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", values
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path}: not a parquet file, or a damaged one ({reason}): write it again.") from None


FILE_READERS: dict[str, Callable[[Path], Found]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}
