"""Files that are there whole or not at all, written beside their place and renamed; and files that are files, to read.

A named pipe in the place of a file is waited for without end, and a device gives what it likes: every path that is read
is opened by `open_regular`, or looked at by `check_regular` before a library opens it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from .errors import UserError

UNFINISHED = ".unfinished-"
"""How the name of what is not whole begins, beside the place where it will stand."""


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A place beside `path` for a file or folder, which gets its name at the end; nothing is left of one that fails.

    Several processes may write the same at a time: each has a place of its own, and the last one stays.

    Args:
        path: What is to be written; folders above it are made, and a file there is replaced.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{UNFINISHED}{path.name}-", dir=path.parent) as folder:
        beside = Path(folder) / path.name
        yield beside
        os.replace(beside, path)


def remove_unfinished(path: Path) -> None:
    """Removes what a process that was killed left of `written_beside(path)`; no other may be writing it."""
    for left in path.parent.glob(f"{glob.escape(UNFINISHED + path.name)}-*"):
        shutil.rmtree(left, ignore_errors=True)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that a reader sees whole or not at all.

    Raises:
        OSError: It cannot be written; what stood there is as before.
    """
    with written_beside(path) as beside:
        beside.write_bytes(content)


def write_json(path: Path, content: object, indent: int = 2) -> None:
    """Writes a JSON file whole, Chinese as it is.

    Raises:
        OSError: It cannot be written; what stood there is as before.
    """
    write_whole(path, (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode())


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class IrregularError(UserError):
    """A path leads to a folder, a named pipe, a socket or a device, where a file belongs.

    Attributes:
        what: which of these, in words.
    """

    def __init__(self, path: str | Path, mode: int) -> None:
        self.what = _KINDS.get(stat.S_IFMT(mode), "something else")
        super().__init__(f"{str(path)!r} is {self.what}, not a regular file: give the path of a file.")


def check_regular(path: str | Path) -> None:
    """Looks that a path is a file, before a library opens it; what is not there the library says.

    Raises:
        IrregularError: It is a folder, a named pipe, a socket or a device.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    _refuse(path, mode)


def check_entries(folder: str | Path) -> None:
    """Looks that a folder holds files and folders alone, before a library reads what it likes of it.

    Raises:
        IrregularError: It holds a named pipe, a socket or a device.
    """
    try:
        with os.scandir(folder) as entries:
            odd = sorted(entry.path for entry in entries if not (entry.is_file() or entry.is_dir()))
    except OSError:
        return
    for path in odd:  # which lets a link to nowhere pass: it is as a file that is not there
        check_regular(path)


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a file to read its bytes.

    Raises:
        IrregularError: It is a folder, a named pipe, a socket or a device, which is never waited for.
        OSError: It cannot be opened.
    """
    _refuse(path, os.stat(path).st_mode)  # first, for a device may act when it is opened
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse(path, os.fstat(handle).st_mode)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _refuse(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise IrregularError(path, mode)


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file; raises as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def digest(content: bytes) -> bytes:
    """16 bytes that stand for some content."""
    return hashlib.blake2b(content, digest_size=16).digest()


def file_digest(path: str | Path) -> bytes:
    """What `digest` gives of a file's content; raises as `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()


def read_text(path: str | Path, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text of a file with the line breaks of Python; raises as `open_regular`, and UnicodeDecodeError."""
    return read_bytes(path).decode(encoding, errors).replace("\r\n", "\n").replace("\r", "\n")
