"""What pictures look like, in about a thousand bytes each, kept in the cache of `datasets` once they were seen."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import config, is_caching_enabled
from numpy.typing import NDArray
from PIL import Image

from ..base.errors import RowError
from ..base.names import ImageEntry
from ..base.processes import cores
from ..base.whole_files import digest
from ..reading.images import load_image

SIDE, COLOUR = 32, 8  # pixels of a side of the grey levels, and of the two channels of colour
BYTES = SIDE * SIDE + COLOUR * COLOUR * 2
VERSION = 1  # of what a look is; others are thrown away
MOST_KEPT = 1_000_000  # looks in the cache: about 1.2 GB; the oldest go
MOST_THREADS = 16
CHUNK = 256  # pictures at a time


def look_of(image: Image.Image) -> NDArray[np.uint8]:
    """An RGB picture → (BYTES,): its grey levels at SIDE x SIDE and its colours at COLOUR x COLOUR."""
    small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0).convert("YCbCr")
    colours = np.asarray(small.resize((COLOUR, COLOUR), Image.Resampling.BOX))[:, :, 1:]
    return np.concatenate([np.asarray(small)[:, :, 0].ravel(), colours.ravel()])


Entry = tuple[ImageEntry, str]
"""An image as a row has it, and the row's id."""


class Looks(NamedTuple):
    """Looks of n images.

    Attributes:
        looks: (n, BYTES), in a file without a name; zeros for what cannot be read.
        stamps: what `stamp_of` says of each.
        readable: (n,) whether it could be read.
        problems: a sentence on each that could not.
    """

    looks: NDArray[np.uint8]
    stamps: list[bytes]
    readable: NDArray[np.bool_]
    problems: list[str]


def read_looks(images: Iterable[Entry], count: int, tick: Callable[[int, int], None] = lambda done, of: None) -> Looks:
    """Looks at every image: in threads, since what decodes and scales them lets others work meanwhile.

    Args:
        images: of files, or embedded.
        count: how many there are.
        tick: told now and then how many are done, and of how many.
    """
    with tempfile.TemporaryFile() as file:  # its pages need not stay in memory, and it goes with the array
        file.truncate(max(1, count * BYTES))
        looks = np.memmap(file, np.uint8, "r+", shape=(count, BYTES)) if count else np.zeros((0, BYTES), np.uint8)
    found = Looks(looks, [], np.ones(count, bool), [])
    todo = iter(images)
    with ThreadPoolExecutor(min(cores(), MOST_THREADS)) as pool, closing(LookCache.open()) as kept:
        for start in range(0, count, CHUNK):
            chunk = list(islice(todo, CHUNK))
            stamps = list(pool.map(stamp_of, [image for image, _ in chunk]))
            known = kept.get(stamps)
            new = [k for k, stamp in enumerate(stamps) if stamp not in known]
            seen = dict(zip(new, pool.map(_seen, [chunk[k] for k in new]), strict=True))
            for k, stamp in enumerate(stamps):
                look = seen[k] if k in seen else np.frombuffer(known[stamp], np.uint8)
                if isinstance(look, str):
                    found.readable[start + k] = False
                    found.problems.append(look)
                else:
                    looks[start + k] = look
            kept.put({stamps[k]: look.tobytes() for k, look in seen.items() if stamps[k] and not isinstance(look, str)})
            found.stamps.extend(stamps)
            tick(start + len(chunk), count)
    return found


def _seen(entry: Entry) -> NDArray[np.uint8] | str:
    image, row = entry
    try:
        return look_of(load_image(image, where=f"row {row}", side=SIDE))
    except RowError as error:
        return str(error)


def stamp_of(image: ImageEntry) -> bytes:
    """What stands for an image as it is now: its bytes, or a file's path, size and time; b"" for a file not there."""
    if image["bytes"] is not None:
        return digest(image["bytes"])
    try:
        status = os.stat(image["path"])
    except (OSError, ValueError):
        return b""
    said = f"{os.path.abspath(image['path'])}\0{status.st_size}\0{status.st_mtime_ns}"
    return digest(said.encode("utf-8", "surrogateescape"))


class LookCache:
    """Looks by the stamps of their images in one file beside the rows that are kept; without a disk to write to, none.

    Args:
        connection: to the file, or None.
    """

    def __init__(self, connection: sqlite3.Connection | None) -> None:
        self._connection = connection

    @classmethod
    def open(cls) -> LookCache:
        """The cache of this user; none where `datasets.disable_caching()` was called or the disk refuses."""
        path = Path(config.HF_DATASETS_CACHE) / "vlm_sft" / "looks.sqlite"
        if not is_caching_enabled():
            return cls(None)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, timeout=10)
            if connection.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                connection.execute("DROP TABLE IF EXISTS looks")
                connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("CREATE TABLE IF NOT EXISTS looks (stamp BLOB PRIMARY KEY, look BLOB)")
        except (OSError, sqlite3.Error):
            return cls(None)
        return cls(connection)

    def get(self, stamps: Sequence[bytes]) -> dict[bytes, bytes]:
        """The looks that are there."""
        if self._connection is None:
            return {}
        places = ", ".join("?" * len(stamps))
        question = f"SELECT stamp, look FROM looks WHERE stamp IN ({places})"  # noqa: S608  # question marks alone
        try:
            return {stamp: look for stamp, look in self._connection.execute(question, stamps) if len(look) == BYTES}
        except sqlite3.Error:  # a damaged file: all is seen anew
            self.close()
            return {}

    def put(self, looks: Mapping[bytes, bytes]) -> None:
        """Keeps looks."""
        if self._connection is None or not looks:
            return
        try:
            with self._connection as connection:
                connection.executemany("INSERT OR REPLACE INTO looks VALUES (?, ?)", looks.items())
        except sqlite3.Error:  # a full disk
            self.close()

    def close(self) -> None:
        """Lets the oldest looks go where there are too many, and the file."""
        if self._connection is None:
            return
        oldest = "DELETE FROM looks WHERE rowid <= (SELECT max(rowid) FROM looks) - ?"
        with suppress(sqlite3.Error):
            with self._connection as connection:
                connection.execute(oldest, [MOST_KEPT])
            self._connection.close()
        self._connection = None
