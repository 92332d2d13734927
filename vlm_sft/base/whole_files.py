"""Files that are there whole or not at all: written beside their place, and renamed when nothing is missing."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def write_json(path: Path, content: Any, indent: int = 2) -> None:
    """Writes a JSON file whole, Chinese as it is.

    Raises:
        OSError: It cannot be written; what stood there is as before.
    """
    write_whole(path, (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode())
