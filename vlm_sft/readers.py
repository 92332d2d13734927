"""Files → raw rows: JSON, JSON lines, CSV, TSV, parquet, image folders, saved datasets and the Hub.

A reader knows nothing of messages or images. It yields the rows as they are written, each with the words that name its
place (`captions.jsonl, line 3`) and the folder that its relative paths start from.
"""

from __future__ import annotations

import csv
import difflib
import glob
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from .errors import UserError

_BATCH = 256  # rows of a parquet file or dataset held as Python objects at a time
_BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One row as it is in the file.

    Attributes:
        where: its place in words, for errors.
        folder: where its relative image paths start; None for rows from the Hub.
        values: column name to value, not yet checked in any way.
    """

    where: str
    folder: Path | None
    values: dict[str, Any]


def read_rows(path: str, *, split: str = "train", revision: str | None = None) -> Iterator[Row]:
    """Yield the rows of a file, a glob pattern, a folder or a dataset of the Hub, in order.

    Args:
        path: a `.json`, `.jsonl`, `.csv`, `.tsv` or `.parquet` file; a pattern such as ``data/part-*.jsonl`` (files in
            the order of their names); a folder written by ``Dataset.save_to_disk``, with ``metadata.jsonl`` (or csv,
            parquet) beside images, or with data files; else a Hub dataset id (``owner/name``).
        split: which split of a folder or Hub dataset.
        revision: branch, tag or commit of a Hub dataset.

    Raises:
        UserError: nothing is there, or it cannot be read as what its name says. Raised while iterating.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        yield from _read_folder(Path(path), split)
    elif os.path.lexists(path):
        yield from _read_file(Path(path))
    elif any(mark in path for mark in "*?["):
        files = sorted(glob.glob(path, recursive=True))
        if not files:
            raise UserError(f"The pattern {path} matches no file: correct it (** searches folders within folders).")
        for file in files:
            yield from _read_file(Path(file))
    elif os.path.splitext(path)[1].lower() in _FILE_READERS:
        raise _no_such_file(Path(path))
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path, re.ASCII):
        yield from _read_hub(path, split, revision)
    else:
        raise _no_such_file(Path(path))


# --------------------------------------------------------------------------------------------------------- one file


def _read_file(path: Path) -> Iterator[Row]:
    reader = _FILE_READERS.get(path.suffix.lower())
    if reader is None:
        endings = ", ".join(_FILE_READERS)
        raise UserError(f'The data file {path} ends in "{path.suffix}", but only {endings} can be read: convert it.')
    try:
        if path.stat().st_size == 0:
            raise UserError(f"The data file {path} is empty (0 bytes): write it again or remove the source.")
        for where, values in reader(path):
            if not isinstance(values, dict):
                raise UserError(f"{where}: the row is not an object with named values: correct it.")
            yield Row(where, path.parent, values)
    except FileNotFoundError:
        raise _no_such_file(path) from None
    except OSError as error:
        raise UserError(f"The data file {path} cannot be read ({error.strerror or error}): check it.") from None


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


def _parse(text: str, where: str, mend: str = "correct the file") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "line" not in where else ""
        raise UserError(f"{where}: not JSON at {line}column {error.colno} ({error.msg}): {mend}.") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets thousands deep
        raise UserError(f"{where}: the JSON cannot be read ({str(error).split(':')[0]}): {mend}.") from None


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
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
                yield where, _parse(line, where, "write one JSON object a line")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    text = _decode(path.read_bytes().removeprefix(_BOM), path)
    first_line = text.lstrip().partition("\n")[0]
    if text.lstrip()[:1] == "{" and text.strip() != first_line.strip() and _is_json(first_line):
        yield from _read_jsonl(path)  # JSON lines under the name .json, as many datasets are published
        return
    rows = _parse(text, str(path))
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


def _read_table(path: Path) -> Iterator[tuple[str, Any]]:
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
            if "\0more" in values or None in values.values():
                more = "more" if "\0more" in values else "fewer"
                raise UserError(
                    f"{path}, line {line}: the row has {more} fields than the header: put text that contains the "
                    "delimiter in quotation marks."
                )
            yield f"{path}, line {line}", values


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", values
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{path}: not a parquet file, or a damaged one ({reason}): write it again.") from None


_FILE_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}


# ---------------------------------------------------------------------------------------------------------- folders


def _read_folder(folder: Path, split: str) -> Iterator[Row]:
    try:
        names = {entry.name for entry in folder.iterdir()}
        files = _data_files(folder, split) if not names & {"state.json", "dataset_dict.json"} else []
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read ({error.strerror}): check it.") from None
    if not files:
        yield from _read_saved(folder, split)
    for file in files:
        for row in _read_file(file):
            yield row._replace(values=_with_image(row.values)) if file.stem == "metadata" else row


def _with_image(values: dict[str, Any]) -> dict[str, Any]:
    """In the metadata file of an image folder the image's column is called `file_name` (or `file_names`)."""
    name = values.get("file_name", values.get("file_names"))
    return values if name is None or "image" in values else values | {"image": name}


def _data_files(folder: Path, split: str) -> list[Path]:
    # Only these places are looked at: a recursive search would list millions of images.
    for pattern in ("metadata.*", "*/metadata.*", "*", "data/*"):
        found = (path for path in folder.glob(pattern) if path.suffix.lower() in _FILE_READERS)
        files = sorted(path for path in found if path.name not in ("dataset_infos.json", "dataset_info.json"))
        if not files:
            continue
        files = _of_split(folder, files, split, depth=2 if pattern == "data/*" else 1)
        endings = sorted({path.suffix.lower() for path in files})
        if len(endings) > 1:
            raise UserError(
                f"The folder {folder} has data files of several kinds ({', '.join(endings)}): give a pattern that "
                f"names one kind, such as {folder}/*{endings[0]}."
            )
        return files
    raise UserError(
        f"The folder {folder} holds no data file ({', '.join(_FILE_READERS)}): a folder of images needs a "
        'metadata.jsonl with a line {"file_name": ..., "caption": ...} for each.'
    )


def _of_split(folder: Path, files: list[Path], split: str, depth: int) -> list[Path]:
    """The files whose name starts with the split; all files when no name starts with that of any split."""

    def belongs(path: Path, name: str) -> bool:
        first = path.relative_to(folder).parts[depth - 1]
        return re.match(rf"{re.escape(name)}(?![A-Za-z0-9])", first) is not None

    chosen = [path for path in files if belongs(path, split)]
    if chosen:
        return chosen
    splits = ("train", "validation", "valid", "val", "dev", "eval", "test")
    if split == "train" and not any(belongs(path, name) for path in files for name in splits):
        return files
    there = ", ".join(str(path.relative_to(folder)) for path in files[:8])
    raise UserError(f'The folder {folder} has no split "{split}" (it holds {there}): set the source\'s `split`.')


def _read_saved(folder: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever half a folder makes datasets raise
        raise UserError(
            f"The folder {folder} is not a whole saved dataset ({_first_line(error)}): save it again."
        ) from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(
                f'The dataset {folder} has no split "{split}", only {", ".join(map(str, saved))}: '
                "set the source's `split`."
            )
        saved = saved[split]
    yield from _dataset_rows(saved, str(folder), folder)


# -------------------------------------------------------------------------------------------------------------- Hub


def _read_hub(name: str, split: str, revision: str | None) -> Iterator[Row]:
    import datasets

    try:
        data = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # connection, authorisation, unknown id, split or revision: each has its own class
        raise UserError(
            f'There is no file or folder "{name}" here, and as a dataset of the Hub (split "{split}") it could not be '
            f"loaded ({_first_line(error)}): correct the path, or download the dataset first."
        ) from None
    yield from _dataset_rows(data, f"{name} ({split})", None)


def _dataset_rows(data: Any, label: str, folder: Path | None) -> Iterator[Row]:
    number = 0
    # The arrow format hands out what is stored: images stay paths and bytes, nothing is decoded.
    for table in data.with_format("arrow").iter(batch_size=_BATCH):
        for values in table.to_pylist():
            number += 1
            yield Row(f"{label}, row {number}", folder, values)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _no_such_file(path: Path) -> UserError:
    try:
        names = os.listdir(path.parent)
    except OSError:
        return UserError(f"The data file {path} was not found (there is no folder {path.parent}): correct the path.")
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"; did you mean {path.parent / near[0]}" if near else ""
    return UserError(f"The data file {path} was not found{hint}: correct the path (relative to the working directory).")
