"""Records of one size in files that only grow, one a process: nobody waits for another, and a kill loses nothing.

A record counts when all its bytes are there. Each writer has files of its own, named by machine, process and chance,
and holds a lock beside them as long as it lives, so that who tidies up leaves them alone.
"""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from ..base.whole_files import open_regular

LOCK = ".lock"


def new_writer(folder: Path) -> tuple[str, FileLock]:
    """A name that no other process has, and the lock that says that its files are being written.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{platform.node()[:40] or 'host'}-{os.getpid()}-{secrets.token_hex(4)}"
    lock = FileLock(folder / f"{name}{LOCK}", timeout=0)
    lock.acquire()
    return name, lock


def is_written(folder: Path, writer: str) -> bool:
    """Whether a process that lives writes the files of this name; a lock that a dead one left is removed."""
    path = folder / f"{writer}{LOCK}"
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            pass
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return True
    with suppress(OSError):
        path.unlink()
    return False


class Records:
    """Key → value of bytes, over all `*<suffix>` files of a folder; of two records of a key the later found one counts.

    Args:
        folder: Where they lie; it need not be there yet.
        suffix: Ending of their names, such as ``.index``.
        key: Bytes of a key.
        value: Bytes of a value.
    """

    def __init__(self, folder: Path, suffix: str, key: int, value: int) -> None:
        self.folder, self.suffix, self._key, self._size = folder, suffix, key, key + value
        self._read: dict[str, int] = {}  # writer → how many of its records are known
        self._file: IO[bytes] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def new(self) -> Iterator[tuple[str, int, bytes, bytes]]:
        """(writer, number of the record in its file, key, value) of what was written since the last call."""
        try:
            with os.scandir(self.folder) as entries:
                found = sorted(
                    (entry.name.removesuffix(self.suffix), entry.stat().st_size)
                    for entry in entries
                    if entry.name.endswith(self.suffix) and entry.is_file()
                )
        except OSError:
            return
        for writer, size in found:
            known, there = self._read.get(writer, 0), size // self._size
            if there <= known:
                continue
            try:
                with open_regular(self.folder / f"{writer}{self.suffix}") as file:
                    file.seek(known * self._size)
                    content = file.read((there - known) * self._size)
            except OSError:
                continue  # another process tidied it away meanwhile
            self._read[writer] = known + len(content) // self._size
            for number in range(len(content) // self._size):
                record = content[number * self._size : (number + 1) * self._size]
                yield writer, known + number, record[: self._key], record[self._key :]

    def append(self, writer: str, records: bytes) -> None:
        """Adds whole records to the file of a writer.

        Raises:
            OSError: They cannot be written; the file is as it was.
        """
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.folder / f"{writer}{self.suffix}", "ab", buffering=0)  # noqa: SIM115
        append_whole(self._file, records)
        self._read[writer] = self._read.get(writer, 0) + len(records) // self._size


def append_whole(file: IO[bytes], content: bytes | memoryview) -> None:
    """Appends to a file that is not buffered; what could not be written whole is cut off again.

    Raises:
        OSError: The disk is full, or the file cannot be written.
    """
    before, view = os.fstat(file.fileno()).st_size, memoryview(content)
    try:
        while len(view):
            view = view[file.write(view) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(file.fileno(), before)
        raise
