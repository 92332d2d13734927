"""Rows of parquet and Arrow tables, counted before they become Python objects.

Both formats can say one large value for many rows, or rows without any bytes; Python would hold each of them whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..base.errors import UserError, row_error

BATCH = 256  # rows of a parquet file or dataset held as Python objects at a time
LARGEST_ROW = 256 * 2**20
"""Bytes of one row, and of the rows that are Python objects at a time."""
# Rows that a file of so many bytes may have: eight a byte are true or false alone, well packed.
FREE_ROWS, ROWS_A_BYTE = 1_000_000, 8
DICTIONARY_PAGE = 2


def check_count(path: Path, rows: int) -> None:
    """Refuses a file that says it has more rows than its bytes can hold anything of.

    Raises:
        UserError: It does.
    """
    if rows > FREE_ROWS + ROWS_A_BYTE * (size := path.stat().st_size):
        raise UserError(f"{path} says that it has {rows:,} rows in {size:,} bytes; it is refused.")


def batch_size(opened: BinaryIO, metadata: Any) -> int:
    """Rows of a parquet file that may be read at a time: each may be a value of its dictionaries, whole.

    Args:
        opened: The file.
        metadata: pyarrow's.
    """
    largest = 0
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            start = column.data_page_offset
            if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
                start = column.dictionary_page_offset
            largest = max(largest, _dictionary_bytes(opened, start))
    return max(1, min(BATCH, LARGEST_ROW // max(largest, 1)))


def _dictionary_bytes(opened: BinaryIO, start: int) -> int:
    """Bytes, unpacked, of the dictionary page that a column begins with; 0 where it begins with another one.

    The header of a page is Thrift's compact protocol: field 1 is the kind of page, field 2 the size, both as zigzag
    numbers of seven bits a byte.
    """
    opened.seek(max(start, 0))
    head = opened.read(16)
    numbers: list[int] = []
    place = 0
    while len(numbers) < 2 and place < len(head) and head[place] == 0x15:
        value, shift, place = 0, 0, place + 1
        while place < len(head):
            value |= (head[place] & 0x7F) << shift
            shift, place = shift + 7, place + 1
            if not head[place - 1] & 0x80:
                break
        numbers.append(value >> 1)
    return numbers[1] if len(numbers) == 2 and numbers[0] == DICTIONARY_PAGE else 0


def table_rows(path: Path, batches: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """(place in words, row or the error that it is) of the record batches of a table, whatever their sizes.

    Raises:
        UserError: A batch has more rows than its file can hold, or shares a large value among entries of lists.
    """
    number = 0
    for batch in batches:
        batch.validate(full=True)
        check_count(path, number + len(batch))
        shared = sum(_shared(column, path) for column in batch.columns)
        for start in range(0, len(batch), BATCH):
            part = batch.slice(start, BATCH)
            alone = shared * len(part) > LARGEST_ROW or part.nbytes > LARGEST_ROW
            for piece in (part.slice(i, 1) for i in range(len(part))) if alone else (part,):
                if alone and (size := sum(map(_bytes_of_row, piece.columns))) > LARGEST_ROW:
                    number += 1
                    where = f"{path}, row {number}"
                    sentence = f"the row has {size:,} bytes, more than the {LARGEST_ROW:,} that one may have"
                    yield where, row_error(where, sentence, "cut it or remove it", "row too large")
                    continue
                for values in piece.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", values


def _shared(array: Any, path: Path) -> int:
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
    if inner and sum(_shared(each, path) for each in inner) > LARGEST_ROW // BATCH:
        raise UserError(f"{path} shares a large value among the entries of lists, each of which would be whole.")
    return 0


def _bytes_of_row(column: Any) -> int:
    """Bytes of the one row of a column."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        return sum(int(column.dictionary.slice(i, 1).nbytes) for i in column.indices.to_pylist() if i is not None)
    if pa.types.is_struct(column.type):
        return sum(_bytes_of_row(each) for each in column.flatten())
    if str(column.type) in ("string_view", "binary_view"):
        return int(column.cast(pa.large_binary() if "binary" in str(column.type) else pa.large_string()).nbytes)
    return int(column.values.nbytes if pa.types.is_run_end_encoded(column.type) else column.nbytes)
