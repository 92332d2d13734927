"""Rows of parquet and Arrow tables, counted before they become Python objects.

Both formats can say one large value for many rows, or rows without any bytes; Python would hold each of them whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from os import SEEK_END
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias

from ..base.errors import UserError, row_error
from ..base.limits import READERS, limits

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH = 256  # rows of a parquet file or dataset held as Python objects at a time
FREE_ROWS, ROWS_A_BYTE = 1_000_000, 8  # rows of any file, and for each of its bytes: eight are true or false alone
DICTIONARY_PAGE, PREFIXES = 2, 7  # parquet's numbers of that page, and of values that begin as the one before does
# Bytes of a value by its type; and times that lists may take what the pages that hold them have.
WIDTHS, REPEATED = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "BYTE_ARRAY": 8}, 16
CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
# Kinds of messages of Arrow; numbers of fields of a message, of a batch, and of the batch in a dictionary's message.
ARROW_DICTIONARY, ARROW_BATCH = "dictionary", "record batch"
HEADER, BUFFERS, COMPRESSION, DATA = 2, 2, 3, 1
OLDER = b"experimental_compression"  # before there was a field for it, a word in the message said how it is packed
HEADERS = 2**10, READERS.page_header  # bytes that are looked at for the header of a page
Struct: TypeAlias = dict[int, Any]  # of Thrift, in which parquet describes itself: fields by their numbers


def check_count(path: Path, rows: int) -> None:
    """Refuses a file that says it has more rows than its bytes can hold anything of.

    Raises:
        UserError: It does.
    """
    if rows > FREE_ROWS + ROWS_A_BYTE * (size := path.stat().st_size):
        raise UserError(f"{path} says that it has {rows:,} rows in {size:,} bytes; it is refused.")


def batch_size(opened: BinaryIO, metadata: pq.FileMetaData, path: Path) -> int:
    """Rows of a parquet file that may be read at a time: each may be a value of its dictionaries, whole.

    Args:
        opened: The file.
        metadata: pyarrow's.
        path: Named in messages.

    Raises:
        UserError: Pages that are unpacked together have more bytes than `limits.page_bytes`.
        ValueError: The header of a page cannot be read.
    """
    largest, most = 0, limits().page_bytes
    for group in _columns(opened):
        together = 0
        for number, column in enumerate(group):
            pages, kind = list(_pages(opened, column)), metadata.schema.column(number)
            if kind.max_repetition_level:
                _check_lists(opened, column, kind, pages, path)
            together += max((page.size for page in pages), default=0)
            if together > most:
                raise UserError(
                    f"{path} says that its pages unpack to {together:,} bytes, more than the {most:,} of "
                    f"`limits.page_bytes`; write it with smaller pages, or raise the limit."
                )
            largest = max(largest, *(page.size for page in pages if page.shares), 0)
    return max(1, min(BATCH, limits().row_bytes // max(largest, 1)))


def _columns(opened: BinaryIO) -> list[list[Struct]]:
    """What the end of a file says of the columns of each group of rows; pyarrow itself ends the process at some."""
    opened.seek(-8, SEEK_END)
    size = int.from_bytes(opened.read(4), "little")
    opened.seek(-8 - size, SEEK_END)
    try:
        return [[column[3] for column in group[1]] for group in thrift_struct(opened.read(size), 0)[0][4]]
    except (LookupError, TypeError):
        raise ValueError("its end says nothing of its columns") from None


class _Page(NamedTuple):
    """What the header of a page says: bytes packed and unpacked, whether values share bytes, how many; its place."""

    packed: int
    size: int
    shares: bool
    values: int
    place: int
    is_dictionary: bool


def _check_lists(opened: BinaryIO, column: Struct, kind: pq.ColumnSchema, pages: Sequence[_Page], path: Path) -> None:
    """Refuses lists of which a few bytes say that they have many entries: one row may have all that a column has.

    Raises:
        UserError: They take more than `limits.page_bytes`, and many times the bytes that hold them.
    """
    values = sum(page.values for page in pages if not page.is_dictionary)
    width = kind.length if kind.physical_type == "FIXED_LEN_BYTE_ARRAY" else WIDTHS.get(kind.physical_type, 12)
    held, most = sum(page.size for page in pages), limits().page_bytes
    if kind.physical_type == "BYTE_ARRAY":
        words = [page for page in pages if page.is_dictionary]
        if any(values * page.size > most for page in words):
            width += max(_longest_word(opened, column, page) for page in words)
    if (size := values * width) > most and size > REPEATED * held:
        raise UserError(
            f"{path}: {values:,} entries of lists in its column {kind.path!r} take {size:,} bytes, of {held:,} that it "
            f"has, more than the {most:,} of `limits.page_bytes`; write fewer rows a group, or raise the limit."
        )


def _longest_word(opened: BinaryIO, column: Struct, page: _Page) -> int:
    """Bytes of the longest text of a dictionary, each of which stands behind its length."""
    import pyarrow as pa

    opened.seek(page.place)
    data, longest, place = opened.read(page.packed), 0, 0
    if codec := _said(column, 4):
        data = pa.Codec(CODECS[codec]).decompress(data, page.size, asbytes=True) if codec in CODECS else b""
        longest = 0 if data else page.size  # of another codec, it may be all of it
    while place + 4 <= len(data):
        length = int.from_bytes(data[place : place + 4], "little")
        longest, place = max(longest, length), place + 4 + length
    return longest


def _pages(opened: BinaryIO, column: Struct) -> Iterator[_Page]:
    """Each page of a column, as its header says; the footer says it too, but is not what is obeyed."""
    place, dictionary = _said(column, 9), _said(column, 11)
    place = dictionary if 0 < dictionary < place else place
    end = place + _said(column, 7) if _said(column, 5) else place  # without values pyarrow reads no page
    while 0 <= place < end:
        header, length = _read_header(opened, place)
        if (packed := _said(header, 3)) < 0 or (size := _said(header, 2)) < 0:
            raise ValueError("a page has no size")
        is_dictionary = _said(header, 1) == DICTIONARY_PAGE
        shares = is_dictionary or PREFIXES in (_said(header, 5, 2), _said(header, 8, 4))
        values = max(_said(header, 5, 1), _said(header, 8, 1), 0)
        yield _Page(packed, size, shares, values, place + length, is_dictionary)
        place += length + packed


def _said(header: object, *path: int) -> int:
    """The number of a field, or of a field in a field; -1 where there is none."""
    for field in path:
        header = header.get(field) if isinstance(header, dict) else None
    return header if isinstance(header, int) else -1


def _read_header(opened: BinaryIO, place: int) -> tuple[Struct, int]:
    """The fields of a page's header by their numbers, and its bytes; a few, unless it has long statistics."""
    for much in HEADERS:
        opened.seek(place)
        try:
            return thrift_struct(opened.read(much), 0)
        except IndexError:
            continue
    raise ValueError("the header of a page is cut off")


def thrift_struct(data: bytes, place: int, depth: int = 0) -> tuple[Struct, int]:
    """A struct of Thrift's compact protocol at a place: its fields by number, and where it ends.

    Raises:
        IndexError: It goes on behind the data.
        ValueError: It has a kind of field that is not there, or structs in structs without end.
    """
    found: Struct = {}
    field = 0
    while head := data[place]:
        place += 1
        if head >> 4:
            field += head >> 4
        else:
            field, place = _number(data, place)
        found[field], place = _value(data, place, head & 15, depth + 1)
    return found, place + 1


def _number(data: bytes, place: int, zigzag: bool = True) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte, place = data[place], place + 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return ((value >> 1) ^ -(value & 1) if zigzag else value), place
    raise ValueError("a number without end")


def _value(data: bytes, place: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true or false, which the kind itself says
        return kind == 1, place
    if kind in (3, 7):  # a byte, a float of eight
        return None, place + (1 if kind == 3 else 8)
    if kind in (4, 5, 6):
        return _number(data, place)
    if kind == 8:  # a text, passed over
        size, place = _number(data, place, zigzag=False)
        return None, place + size
    if kind in (9, 10) and depth < 16:  # a list
        head, found = data[place], []
        number, place = (head >> 4, place + 1) if head < 0xF0 else _number(data, place + 1, zigzag=False)
        for _ in range(number):
            value, after = _value(data, place, head & 15, depth)
            place = max(after, place + 1)
            found.append(value)
        return found, place
    if kind == 12 and depth < 16:
        return thrift_struct(data, place, depth + 1)
    raise ValueError("a page's header has a field that no such header has")


def check_messages(opened: pa.NativeFile, path: Path) -> int:
    """Counts what the packed buffers of each message of an Arrow file unpack to, from where it was opened.

    Of a message's header, a FlatBuffer (https://arrow.apache.org/docs/format/Columnar.html), the places of buffers are
    read; a packed buffer begins with the number of bytes that it unpacks to.

    Args:
        opened: pyarrow's memory map of the file.
        path: Named in messages.

    Returns:
        How many of them are batches of rows.

    Raises:
        UserError: Buffers that are unpacked together have more bytes than `limits.page_bytes`.
        ValueError, struct.error: A message cannot be read.
    """
    import pyarrow as pa

    batches = held = 0
    for message in pa.ipc.MessageReader.open_stream(opened):
        if message.type not in (ARROW_DICTIONARY, ARROW_BATCH):
            continue
        together = held + _unpacked(message)
        if together > (most := limits().page_bytes):
            raise UserError(
                f"{path} says that its buffers unpack to {together:,} bytes, more than the {most:,} of "
                f"`limits.page_bytes`; write it with fewer rows a batch, or raise the limit."
            )
        batches += message.type == ARROW_BATCH
        held = together if message.type == ARROW_DICTIONARY else held  # dictionaries are held until the end
    return batches


def _unpacked(message: pa.Message) -> int:
    """Bytes that the packed buffers of a message unpack to, as each says."""
    head, body = memoryview(message.metadata), message.body
    batch = _table_at(head, _field(head, _table_at(head, 0), HEADER))
    if message.type == ARROW_DICTIONARY:
        batch = _table_at(head, _field(head, batch, DATA))
    buffers = _field(head, batch, BUFFERS)
    if not buffers or not (_field(head, batch, COMPRESSION) or OLDER in bytes(head)):
        return 0
    vector = _table_at(head, buffers)
    view, total = memoryview(body), 0
    for number in range(struct.unpack_from("<I", head, vector)[0]):
        place, length = struct.unpack_from("<qq", head, vector + 4 + 16 * number)
        if length:
            if place < 0 or place + 8 > len(view):
                raise ValueError("a buffer lies outside of its message")
            size = struct.unpack_from("<q", view, place)[0]
            if size < -1:
                raise ValueError("a buffer has no size")
            total += max(size, 0)  # -1: it is as it is, and stays where it is
    return total


def _table_at(data: memoryview, place: int) -> int:
    """Where what a place refers to begins."""
    return int(place + struct.unpack_from("<I", data, place)[0])


def _field(data: memoryview, table: int, number: int) -> int:
    """The place of a table's field; 0 where it does not say it."""
    names = table - struct.unpack_from("<i", data, table)[0]
    if names < 0:
        raise ValueError("a message refers to what lies before it")
    if 4 + 2 * number >= struct.unpack_from("<H", data, names)[0]:
        return 0
    offset = struct.unpack_from("<H", data, names + 4 + 2 * number)[0]
    return table + offset if offset else 0


def table_rows(path: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[str, Any]]:
    """(place in words, row or the error that it is) of the record batches of a table, whatever their sizes.

    Raises:
        UserError: A batch has more rows than its file can hold, or shares a large value among entries of lists.
    """
    number, most = 0, limits().row_bytes
    for batch in batches:
        batch.validate(full=True)
        check_count(path, number + len(batch))
        shared = sum(_shared(column, path) for column in batch.columns)
        for start in range(0, len(batch), BATCH):
            part = batch.slice(start, BATCH)
            alone = shared * len(part) > most or part.nbytes > most
            for piece in (part.slice(i, 1) for i in range(len(part))) if alone else (part,):
                if alone and (size := sum(map(_bytes_of_row, piece.columns))) > most:
                    number += 1
                    where = f"{path}, row {number}"
                    sentence = (
                        f"the row has {size:,} bytes, more than the {most:,} that one may have (`limits.row_bytes`)"
                    )
                    yield where, row_error(where, sentence, "cut it or remove it", "row too large")
                    continue
                for values in piece.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", values


def _shared(array: pa.Array, path: Path) -> int:
    """Bytes that any row of an array may say again without a place of its own."""
    import pyarrow as pa

    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _shared(array.storage, path)
    if pa.types.is_dictionary(kind):
        return int(array.dictionary.nbytes)
    if pa.types.is_run_end_encoded(kind):
        return int(array.values.nbytes)
    if pa.types.is_struct(kind):
        return sum(_shared(array.field(i), path) for i in range(kind.num_fields))
    if "view" in str(kind):
        return int(array.get_total_buffer_size())
    inner = [array.keys, array.items] if pa.types.is_map(kind) else [array.values] if hasattr(array, "values") else []
    if inner and sum(_shared(each, path) for each in inner) > limits().row_bytes // BATCH:
        raise UserError(f"{path} shares a large value among the entries of lists, each of which would be whole.")
    return 0


def _bytes_of_row(column: pa.Array) -> int:
    """Bytes of the one row of a column."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        return sum(int(column.dictionary.slice(i, 1).nbytes) for i in column.indices.to_pylist() if i is not None)
    if pa.types.is_struct(column.type):
        return sum(_bytes_of_row(each) for each in column.flatten())
    if str(column.type) in ("string_view", "binary_view"):
        return int(column.cast(pa.large_binary() if "binary" in str(column.type) else pa.large_string()).nbytes)
    return int(column.values.nbytes if pa.types.is_run_end_encoded(column.type) else column.nbytes)
