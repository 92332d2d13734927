"""UTF-8 text and JSON out of files, with the sentence for what is neither."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import RowError, UserError, row_error

BOM = b"\xef\xbb\xbf"


def lines_of(stream: IO[bytes], path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, without its byte order mark; a line that is not UTF-8 is a `UserError`."""
    for number, line in enumerate(stream, start=1):
        if number == 1:
            line = line.removeprefix(BOM)
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
    raise row_error(where, what, mend, "not JSON")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without its byte order mark."""
    return _decode(path.read_bytes().removeprefix(BOM), path)


def parse_document(text: str, path: Path) -> Any:
    """The value of a file that is one JSON text.

    Raises:
        UserError: it is not JSON, which no single row can be blamed for.
    """
    try:
        return parse_json(text, str(path))
    except RowError as error:
        raise UserError(str(error)) from None


def is_json(line: str) -> bool:
    """Whether a line is a JSON value by itself."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
