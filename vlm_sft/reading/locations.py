"""Files → raw rows: JSON, JSON lines, CSV, TSV, parquet, image folders, saved datasets and the Hub.

A reader knows nothing of messages or images. It yields the rows as they are written, each with the words that name its
place (`captions.jsonl, line 3`) and the folder that its relative paths start from.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..base.errors import RowError, UserError
from ..base.hub import look_for_hub
from ..base.names import Json
from ..base.whole_files import check_entries, read_text
from ..base.words import first_line
from .files import FILE_READERS, TEXT_FILES, no_such_file, read_file
from .table_rows import BATCH, check_messages

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


class FileRow(NamedTuple):
    """One row as it is in the file.

    Attributes:
        where: its place in words, for errors.
        folder: where its relative image paths start; None for rows from the Hub.
        values: column name to value, not yet checked in any way.
        problem: why this row cannot be read, though those behind it can; `values` is empty then.
    """

    where: str
    folder: Path | None
    values: Json
    problem: RowError | None = None

    @classmethod
    def of(cls, where: str, folder: Path | None, found: Json | RowError) -> FileRow:
        """A row out of what a reader yields: its values, or the error that it is."""
        return cls(where, folder, {}, found) if isinstance(found, RowError) else cls(where, folder, found)


def read_rows(
    path: str,
    *,
    split: str = "train",
    revision: str | None = None,
    keep_wrong: bool = False,
    stream: bool = False,
) -> Iterator[FileRow]:
    """Yield the rows of a file, a glob pattern, a folder or a dataset of the Hub, in order.

    Args:
        path: a `.json`, `.jsonl`, `.csv`, `.tsv` or `.parquet` file; a pattern such as ``data/part-*.jsonl`` (files in
            the order of their names); a folder written by ``Dataset.save_to_disk``, with ``metadata.jsonl`` (or csv,
            parquet) beside images, or with data files; else a Hub dataset id (``owner/name``).
        split: which split of a folder or Hub dataset.
        revision: branch, tag or commit of a Hub dataset.
        keep_wrong: yield rows that cannot be read too, with their `problem`, so that the caller can record them.
        stream: read a Hub dataset over the network as it is used, instead of downloading all of it first.

    Raises:
        UserError: nothing is there, or it cannot be read as what its name says. Raised while iterating.
        RowError: a row cannot be read and `keep_wrong` is false.
    """
    for row in _all_rows(path, split, revision, stream):
        if row.problem is not None and not keep_wrong:
            raise row.problem
        yield row


def _all_rows(path: str, split: str, revision: str | None, stream: bool) -> Iterator[FileRow]:
    path = os.path.expanduser(path)
    if "\0" in path:
        raise UserError(f"The path {path!a} holds a character that no file name has: correct it.")
    if os.path.isdir(path):
        yield from _read_folder(Path(path), split)
    elif os.path.lexists(path) or _is_pattern(path):
        for file in list_files(path):
            yield from _file_rows(file)
    elif Path(path).suffix.lower() in FILE_READERS or not is_hub_id(path):
        raise no_such_file(Path(path))
    else:
        yield from _read_hub(path, split, revision, stream)


def list_files(path: str) -> list[Path]:
    """The file of a path, or those of a pattern in the order of their names.

    Raises:
        UserError: there is none.
    """
    path = os.path.expanduser(path)
    if os.path.lexists(path):
        return [Path(path)]
    if not _is_pattern(path):
        raise no_such_file(Path(path))
    if "**" in path:
        # Not glob's own: it follows links to folders, and two that point back are followed 2**40 ways.
        start = Path(path[: re.search(r"[*?\[]", path).start()] + "x").parent  # type: ignore[union-attr]
        files = sorted(str(file) for file in start.glob(os.path.relpath(path, start)) if file.name[0] != ".")
    else:
        files = sorted(glob.glob(path))
    if not files:
        raise UserError(f"The pattern {path} matches no file: correct it (** searches folders within folders).")
    return [Path(file) for file in files]


def text_files(path: str, split: str = "train") -> list[Path] | None:
    """The files that `read_rows` reads where each is text (JSON, CSV and their kin); None for anything else.

    Raises:
        UserError: as `read_rows`, of a pattern or a folder.
    """
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        files = _files_of(Path(path), split)
    else:
        files = list_files(path) if os.path.lexists(path) or _is_pattern(path) else []
    return files if files and all(file.suffix.lower() in TEXT_FILES for file in files) else None


def is_hub_id(path: str) -> bool:
    """Whether a path could be the id of a repository on the Hub."""
    return _HUB_ID.fullmatch(path) is not None


def _is_pattern(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def _file_rows(path: Path) -> Iterator[FileRow]:
    folder = path.parent
    for where, found in read_file(path):
        yield FileRow.of(where, folder, found)


def _files_of(folder: Path, split: str) -> list[Path]:
    """The data files of a folder; none where it is a saved dataset."""
    try:
        names = {entry.name for entry in folder.iterdir()}
        return _data_files(folder, split) if not names & {"state.json", "dataset_dict.json"} else []
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read ({error.strerror}): check it.") from None


def _read_folder(folder: Path, split: str) -> Iterator[FileRow]:
    files = _files_of(folder, split)
    if not files:
        yield from _read_saved(folder, split)
    for file in files:
        for row in _file_rows(file):
            yield row._replace(values=_with_image(row.values)) if file.stem == "metadata" else row


def _with_image(values: Json) -> Json:
    """In the metadata file of an image folder the image's column is called `file_name` (or `file_names`)."""
    name = values.get("file_name", values.get("file_names"))
    return values if name is None or "image" in values else values | {"image": name}


def _data_files(folder: Path, split: str) -> list[Path]:
    # Only these places are looked at: a recursive search would list millions of images.
    for pattern in ("metadata.*", "*/metadata.*", "*", "data/*"):
        found = (path for path in folder.glob(pattern) if path.suffix.lower() in FILE_READERS)
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
        f"The folder {folder} holds no data file ({', '.join(FILE_READERS)}): a folder of images needs a "
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


def _check_saved(folder: Path) -> None:
    """Refuses a saved dataset that names files or splits elsewhere, which `datasets` would read."""
    for path in (folder / "dataset_dict.json", folder / "state.json", *sorted(folder.glob("*/state.json"))):
        if not path.is_file():
            continue
        try:
            content = json.loads(read_text(path))
            files = [*content.get("_data_files", ()), *(content.get("_indices_data_files") or ())]
            names = [*(file["filename"] for file in files), *content.get("splits", ())]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # half a folder, as `datasets` says
        for name in names:
            if not isinstance(name, str) or "/" in name or "\\" in name or name in ("", ".", ".."):
                raise UserError(f"{path} names {name!r}, which is nothing beside it; it is refused.")


def _read_saved(folder: Path, split: str) -> Iterator[FileRow]:
    import datasets
    import pyarrow

    for place in (folder, *(each for each in folder.iterdir() if each.is_dir())):
        check_entries(place)
    _check_saved(folder)
    try:
        for path in (*folder.glob("*.arrow"), *folder.glob("*/*.arrow")):
            with pyarrow.memory_map(str(path)) as mapped:
                check_messages(mapped, path)
        saved = datasets.load_from_disk(str(folder))
    except UserError:
        raise
    except Exception as error:  # whatever half a folder makes datasets raise
        raise UserError(
            f"The folder {folder} is not a whole saved dataset ({first_line(error)}): save it again."
        ) from None
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(
                f'The dataset {folder} has no split "{split}", only {", ".join(map(str, saved))}: '
                "set the source's `split`."
            )
        saved = saved[split]
    try:
        yield from dataset_rows(saved, str(folder), folder)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"The saved dataset {folder} is damaged ({first_line(error)}): save it again.") from None


def _read_hub(name: str, split: str, revision: str | None, stream: bool) -> Iterator[FileRow]:
    import datasets

    look_for_hub()
    try:
        data = datasets.load_dataset(name, split=split, revision=revision, streaming=stream)
    except Exception as error:  # connection, authorisation, unknown id, split or revision: each has its own class
        raise UserError(
            f'There is no file or folder "{name}" here, and as a dataset of the Hub (split "{split}") it could not be '
            f"loaded ({first_line(error)}): correct the path, or download the dataset first."
        ) from None
    yield from dataset_rows(data, f"{name} ({split})", None)


def folders_of_hub(name: str) -> list[str]:
    """Where a data set of the Hub lies on this machine once it was fetched: its own files, and what it downloads."""
    import datasets
    from huggingface_hub import constants

    repository = "--".join(["datasets", *name.split("/")])
    return [os.path.join(constants.HF_HUB_CACHE, repository), str(datasets.config.DOWNLOADED_DATASETS_PATH)]


def dataset_rows(data: Dataset | IterableDataset, label: str, folder: Path | None) -> Iterator[FileRow]:
    """The rows of a set of `datasets`, numbered from 1.

    Args:
        data: The set; its images stay as they are stored.
        label: What messages call it, before `, row 7`.
        folder: Where pictures that rows name by relative paths lie; None where they may name none.
    """
    number = 0
    # The arrow format hands out what is stored: images stay paths and bytes, nothing is decoded.
    for table in data.with_format("arrow").iter(batch_size=BATCH):
        table.validate(full=True)  # its offsets are addresses
        for values in table.to_pylist():
            number += 1
            yield FileRow(f"{label}, row {number}", folder, values)
