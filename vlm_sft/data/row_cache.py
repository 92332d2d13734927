"""Rows of large text files, kept in the cache of `datasets` once they were read: the next start maps them into memory.

One file a source, named by what the source says; in it stands what the rows were read from (the bytes of the data files
and of this package), and it is read anew and overwritten where that has changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, config, is_caching_enabled

from ..base.errors import RowError, UserError
from ..base.whole_files import digest, file_digest, read_bytes, written_beside
from ..reading.files import TEXT_FILES, about_rows
from ..reading.locations import list_files, text_files

if TYPE_CHECKING:
    from ..recipe.sections import Source

FEWEST = 20_000  # rows; fewer are read within a second or two
BYTES = 16  # of a row at least
MOST_REJECTED = 10_000
LANGUAGE = "language"
_NOTE = b"vlm_sft"
# What decides which rows a file gives.
_ROOMS = tuple(Path(__file__).parents[1] / room for room in ("reading", "rows", "vcr", "data"))
# What decides how rows are mixed and merged, not which they are.
_OF_THE_MIXTURE = {"weight", "repeat", "merge_by_image", "independent"}


class Kept(NamedTuple):
    """What was read of a source: its rows, in a last column their languages where these were asked for, errors, and
    in how many rows each key was not used."""

    rows: Dataset
    rejected: list[RowError]
    unused: Mapping[str, int]


class Keeper:
    """Where the rows of one source are kept.

    Args:
        source: a `recipe.Source` of text files; see `keeper_of`.
        files: the files it reads.
        seed: as `load_source`.
        languages: whether the languages of the rows are kept along.
    """

    def __init__(self, source: Source, files: list[Path], seed: int, languages: bool) -> None:
        said = [source.model_dump(exclude=_OF_THE_MIXTURE), source.frames_shown.model_dump()]
        images = None if source.images is None else os.path.abspath(os.path.expanduser(source.images))
        paths = [os.path.abspath(file) for file in files]
        drawn = seed if source.prompts else None
        text = json.dumps([said, images, paths, drawn, languages], sort_keys=True, default=str)
        name = digest(text.encode("utf-8", "replace")).hex()
        self.path = Path(config.HF_DATASETS_CACHE) / "vlm_sft" / f"{name}.arrow"
        self.files = files
        self._read_from = ""

    def about_rows(self) -> int | None:
        """About how many rows the files hold; None where that cannot be told."""
        counts = [about_rows(file) for file in self.files]
        return None if None in counts else sum(count or 0 for count in counts)

    @property
    def read_from(self) -> str:
        """A digest of the data files' bytes, as they are when it is first asked for, and of this package's."""
        if not self._read_from:
            self._read_from = " ".join([_code(), *(file_digest(file).hex() for file in self.files)])
        return self._read_from

    def load(self) -> Kept | None:
        """What was kept, if it was read from what is there now."""
        read_from = self.read_from  # now, before anything is read that may change meanwhile
        try:
            with pa.memory_map(str(self.path)) as file:
                note = json.loads((pa.ipc.open_stream(file).schema.metadata or {}).get(_NOTE, b"{}"))
            if note.get("read_from") != read_from:
                return None
            rejected = [RowError(text, where=where, reason=reason) for text, where, reason in note["rejected"]]
            return Kept(Dataset.from_file(str(self.path)), rejected, note["unused"])
        except (OSError, pa.ArrowException, ValueError, KeyError):
            return None

    def save(self, table: pa.Table, rejected: Iterable[RowError], unused: Mapping[str, int]) -> Kept | None:
        """Keeps what was read; None where it is not worth it, or cannot be written."""
        errors = [(str(error), error.where, error.reason) for error in rejected]
        chunks = (chunk.flatten() for chunk in table.column("images").chunks)
        embedded = any(len(images) > pc.struct_field(images, "bytes").null_count for images in chunks)
        if len(table) < FEWEST or len(errors) > MOST_REJECTED or embedded:
            return None
        note = json.dumps({"read_from": self.read_from, "rejected": errors, "unused": unused}).encode()
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), _NOTE: note})
        try:
            with written_beside(self.path) as beside, pa.ipc.new_stream(str(beside), table.schema) as stream:
                stream.write_table(table)
        except OSError:  # a full or read-only disk: the rows stay in memory
            return None
        return self.load()


def keeper_of(source: Source, *, seed: int, languages: bool) -> Keeper | None:
    """Where a source's rows are kept; None for what is never kept.

    That is what does not come out of text files (parquet, Arrow and tar files and saved datasets mostly hold images,
    which are not copied), a source of few rows, and all where `datasets.disable_caching()` was called.
    """
    if not _may_be_kept(source):
        return None
    try:
        files = text_files(source.path, source.split) or []
        if sum(file.stat().st_size for file in files) < FEWEST * BYTES:
            return None
        files += list_files(source.annotations) if source.annotations else []
        return Keeper(source, files, seed, languages)
    except (UserError, OSError):  # whoever reads the source says what is wrong
        return None


def worth_waiting_for(source: Source) -> bool:
    """Whether processes had better let one read first. No file is looked at: all must give the same answer."""
    return _may_be_kept(source) and Path(source.path).suffix.lower() in TEXT_FILES


def _may_be_kept(source: Source) -> bool:
    return is_caching_enabled() and (source.max_rows is None or source.max_rows >= FEWEST)


@cache
def _code() -> str:
    """Rows that an older or edited package has read are not taken for those of this one."""
    return digest(b"".join(read_bytes(path) for room in _ROOMS for path in sorted(room.glob("*.py")))).hex()
