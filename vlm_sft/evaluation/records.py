"""Records of a benchmark's questions in files: written as they come, found again after a kill, put in order at the end.

While a benchmark goes on, each process adds to a file of its own, `gqa.1f0c….part-0.jsonl`, whose name says of what:
the bundle, the task, its rows and how they are asked. Only what was asked in the same way is gone on with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from ..base.errors import UserError
from ..base.names import MANIFEST
from ..base.whole_files import file_digest, read_bytes, write_whole
from ..base.words import reason_of
from ..pages.records import read_records
from .asking import Record
from .task_rows import Asked

FORMAT = 1


def fingerprint(bundle: Path, asked: Sequence[Asked], how: Mapping[str, Any]) -> str:
    """What decides over the records: the bundle's weights, every question with its answers, and how it is asked."""
    digest = hashlib.sha256(json.dumps([FORMAT, how], sort_keys=True, default=str).encode())
    for path in (bundle / MANIFEST, *sorted(bundle.glob("*.safetensors"))):
        digest.update(path.name.encode() + file_digest(path))
    for one in asked:
        values = [one.id, one.text, one.names(), one.answers, one.choices, one.kind, one.group]
        digest.update(json.dumps(values, ensure_ascii=True).encode())
    return digest.hexdigest()


class Records:
    """The records of one benchmark.

    Args:
        folder: Where they lie.
        name: Of the benchmark.
        mark: Its fingerprint.
    """

    def __init__(self, folder: Path, name: str, mark: str) -> None:
        self.folder, self.name, self.mark = folder, name, mark
        self.path = folder / f"{name}.jsonl"
        self.summary = folder / f"{name}.json"

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"{escape(self.name)}.{self.mark[:12]}.part-*.jsonl"))

    def finished(self) -> dict[str, Any]:
        """What was found when the same was asked before; nothing where it was not, or not all of it."""
        try:
            found = json.loads(read_bytes(self.summary))
        except (OSError, ValueError):
            return {}
        same = isinstance(found, dict) and found.get("fingerprint") == self.mark and self.path.is_file()
        return found if same else {}

    def done(self) -> set[str]:
        """Ids of the questions that were answered before a kill."""
        return {record["id"] for path in self._parts() for record in read_records(path, unfinished=True)}

    @contextmanager
    def adding(self, process: int) -> Iterator[Any]:
        """Gives a function that adds records; when it returns, they are on the disk.

        Raises:
            UserError: The folder cannot be written.
        """
        path = self.folder / f"{self.name}.{self.mark[:12]}.part-{process}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = b"".join(map(dump, read_records(path, unfinished=True))) if path.exists() else b""
            write_whole(path, kept)  # without the half of a record that a kill leaves
            stream = path.open("ab")
        except OSError as error:
            raise self._failed(error) from None

        def write(records: Sequence[Record]) -> None:
            try:
                stream.write(b"".join(map(dump, records)))
                stream.flush()
                os.fsync(stream.fileno())
            except OSError as error:
                raise self._failed(error) from None

        with stream:
            yield write

    def collect(self, order: Sequence[str]) -> list[Record]:
        """All records in the order of the rows."""
        found = {record["id"]: record for path in self._parts() for record in read_records(path, unfinished=True)}
        return [found[number] for number in order]

    def finish(self, records: Sequence[Record], summary: dict[str, Any]) -> None:
        """Writes the records in order and what was found, and takes the parts away."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, b"".join(map(dump, records)))
            write_whole(self.summary, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
            for path in self._parts():
                path.unlink()
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self.folder} cannot be written ({reason_of(error)}): give another --output or make room.")


def dump(record: Record) -> bytes:
    """A record as a line."""
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a character, which JSON can only escape
        return (json.dumps(record) + "\n").encode()
