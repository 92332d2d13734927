"""UTF-8 text and JSON out of files, with the sentence for what is neither."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..base.errors import RowError, UserError, row_error
from ..base.names import Json
from ..base.whole_files import read_bytes

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


def parse_json(
    text: str | bytes,
    where: str,
    mend: str = "correct the file",
    one_line: bool = False,
    decoder: json.JSONDecoder | None = None,
) -> Any:
    """The value of a JSON text.

    Raises:
        RowError: it is not JSON, or an object in it has a key twice (unless another `decoder` marks that), of which
            Python would keep the last one.
    """
    decoder = decoder or _STRICT
    try:
        return decoder.decode(text if isinstance(text, str) else text.decode(json.detect_encoding(text)))
    except json.JSONDecodeError as error:
        line = "" if one_line else f"line {error.lineno}, "
        what = f"not JSON at {line}column {error.colno} ({error.msg})"
    except _KeyTwiceError as error:
        raise row_error(where, str(error), "keep one of them", "key twice") from None
    except UnicodeDecodeError as error:
        what = f"not JSON (byte 0x{error.object[error.start]:02x} is not UTF-8)"
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets thousands deep
        what = f"the JSON cannot be read ({str(error).split(':')[0]})"
    raise row_error(where, what, mend, "not JSON")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without its byte order mark."""
    return _decode(read_bytes(path).removeprefix(BOM), path)


class _KeyTwiceError(ValueError):
    """An object has a key twice."""


class _Doubled(dict[str, Any]):
    """An object that has `key` twice; its last value is there."""

    key = ""


def _once(pairs: list[tuple[str, Any]]) -> Json:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _KeyTwiceError(_twice(_first_twice(pairs)))
    return values


def _marked(pairs: list[tuple[str, Any]]) -> Json:
    values = dict(pairs)
    if len(values) != len(pairs):
        values = _Doubled(values)
        values.key = _first_twice(pairs)
    return values


def _first_twice(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    return next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def _twice(key: str) -> str:
    return f"the key {key[:40]!a} stands twice in one object, with a value each"


_STRICT = json.JSONDecoder(object_pairs_hook=_once)


def key_twice(value: object) -> str | None:
    """What is wrong with a value out of `parse_rows` that has a key twice somewhere; None where nothing is."""
    if isinstance(value, _Doubled):
        return _twice(value.key)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for each in inner if (found := key_twice(each)) is not None), None)


def parse_document(text: str, path: Path) -> Any:
    """The value of a file that is one JSON text.

    Raises:
        UserError: it is not JSON, or has a key twice.
    """
    try:
        return parse_json(text, str(path))
    except RowError as error:
        raise UserError(str(error)) from None


def parse_rows(text: str, path: Path) -> tuple[Any, bool]:
    """As `parse_document`, and whether a key stands twice somewhere, for which `key_twice` finds the row to blame."""
    try:
        return parse_json(text, str(path)), False
    except RowError as error:
        if error.reason != "key twice":
            raise UserError(str(error)) from None
    try:
        return parse_json(text, str(path), decoder=json.JSONDecoder(object_pairs_hook=_marked)), True
    except RowError as error:  # behind the key that stands twice
        raise UserError(str(error)) from None


def is_json(line: str) -> bool:
    """Whether a line is a JSON value by itself."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
