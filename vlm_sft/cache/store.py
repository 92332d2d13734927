"""Features of pictures on disk: rows of one size in shards that are mapped into memory, each with its checksum.

| file of a folder | what it holds |
|---|---|
| `about.json` | shape and type of a row, and what it was made from and with |
| `<writer>.features` | rows, one after the other, as raw numbers |
| `<writer>.index` | for each row its picture's key and its checksum, written after the row |

A row counts once its record is there, so a process that is killed leaves at most one that nobody sees. Nothing is
unpickled, and no file is believed further than its size: a folder may be a stranger's.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import torch
from filelock import FileLock

from ..base.errors import UserError
from ..base.limits import READERS
from ..base.names import Json
from ..base.whole_files import open_regular, read_text, write_json
from ..base.words import reason_of
from .records import LOCK, Records, append_whole, new_writer

ABOUT, FEATURES, INDEX = "about.json", ".features", ".index"
KEY, SUM = 16, 4  # bytes of a picture's key and of a checksum
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
GB = 1_000_000_000


class Store:
    """The features of one frozen prefix.

    Args:
        folder: Where they lie; it need not be there yet.
        about: What they are made from and with, written beside the first; None to look at what is there.
        shape: (T, W) of a picture's features; None: as the folder says.
        max_gb: Largest size of all that lies beside the folder, in 10⁹ bytes; None for no limit.

    Attributes:
        full: Why no more is written: a sentence, or None.

    Raises:
        UserError: What lies in the folder is not what it should be.
    """

    full: str | None = None

    def __init__(
        self,
        folder: Path,
        about: Json | None = None,
        shape: tuple[int, int] | None = None,
        max_gb: float | None = None,
    ) -> None:
        self.folder, self.about, self.shape, self.max_gb = folder, about, shape, max_gb
        self.dtype: torch.dtype | None = None
        self.damaged = 0
        self._index = Records(folder, INDEX, KEY, SUM)
        self._places: dict[bytes, tuple[str, int, int]] = {}  # key → writer, number, checksum
        self._maps: dict[str, np.ndarray] = {}
        self._writer: tuple[str, FileLock] | None = None
        self._shard: IO[bytes] | None = None
        self.refresh()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_maps": {}, "_writer": None, "_shard": None}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    @property
    def known(self) -> list[bytes]:
        """Keys of the pictures that are there."""
        return list(self._places)

    @property
    def row_bytes(self) -> int:
        """Bytes of a picture's features; 0 where nobody has written any."""
        if self.shape is None or self.dtype is None:
            return 0
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def refresh(self) -> None:
        """Looks for what this and other processes have written."""
        if self.dtype is None:
            self._read_about()
        if self.dtype is not None:
            for writer, number, key, value in self._index.new():
                self._places[key] = (writer, number, int.from_bytes(value, "little"))

    def _read_about(self) -> None:
        path = self.folder / ABOUT
        if not path.exists():
            return
        try:
            if path.stat().st_size > READERS.cache_about:
                raise ValueError("it is too long")
            about = json.loads(read_text(path))
            shape, dtype = tuple(about["shape"]), DTYPES[about["dtype"]]
            if len(shape) != 2 or not all(type(n) is int and 0 < n < 1_000_000 for n in shape):
                raise ValueError("its shape is none")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"cache: {str(path)!r} is no description of features ({error}): remove its folder."
            ) from error
        if self.shape is not None and shape != self.shape:
            raise UserError(
                f"cache: {str(self.folder)!r} says that a picture has features of {shape[0]} x {shape[1]}, but this "
                f"stack makes {self.shape[0]} x {self.shape[1]}: remove that folder."
            )
        self.shape, self.dtype = shape, dtype
        self.about = self.about or about.get("of", {})

    def get(self, key: bytes) -> torch.Tensor | None:
        """(T, W) features of a picture; None where there are none, or they are damaged and so to be made again."""
        if key not in self._places:
            self.refresh()
        if (place := self._places.get(key)) is None:
            return None
        writer, number, checksum = place
        row = self._row(writer, number)
        if row is None or zlib.crc32(row.tobytes()) != checksum:
            del self._places[key]
            self.damaged += 1
            return None
        assert self.shape is not None and self.dtype is not None
        return torch.frombuffer(bytearray(row), dtype=self.dtype).view(self.shape)

    def _row(self, writer: str, number: int) -> np.ndarray | None:
        end = (number + 1) * self.row_bytes
        if writer not in self._maps or len(self._maps[writer]) < end:
            try:
                with open_regular(self.folder / f"{writer}{FEATURES}") as file:
                    if os.fstat(file.fileno()).st_size < end:
                        return None
                    self._maps[writer] = np.memmap(file, dtype=np.uint8, mode="r")
            except (OSError, ValueError):
                return None
        return self._maps[writer][end - self.row_bytes : end]

    def add(self, keys: Sequence[bytes], features: torch.Tensor) -> None:
        """Writes features of pictures, as long as there is room; `full` says when there is none.

        Args:
            keys: Of each picture.
            features: (N, T, W), in the type in which they shall lie there if none lie there yet.
        """
        fresh = [number for number, key in enumerate(keys) if key not in self._places]
        fresh = [number for number in fresh if keys.index(keys[number]) == number]
        if not fresh or self.full:
            return
        try:
            self._begin(features)
            assert features.shape[1:] == self.shape, f"features of {features.shape[1:]} are none of {self.shape}"
            assert self._writer is not None and self._shard is not None
            rows = features[fresh].to(self.dtype).contiguous().cpu().view(torch.uint8).reshape(len(fresh), -1).numpy()
            if self.max_gb is not None and size_of(self.folder.parent) + rows.nbytes > self.max_gb * GB:
                self.full = (
                    f"cache.max_gb is {self.max_gb:g} and {str(self.folder.parent)!r} is as large, with {len(self):,} "
                    f"pictures of this stack: further ones are not kept; raise it, or run `vlm-sft cache prune`."
                )
                return
            writer, number = self._writer[0], os.fstat(self._shard.fileno()).st_size // self.row_bytes
            sums = [zlib.crc32(row.tobytes()) for row in rows]
            append_whole(self._shard, memoryview(rows.reshape(-1)))
            records = zip(fresh, sums, strict=True)
            self._index.append(
                writer, b"".join(keys[each] + checksum.to_bytes(SUM, "little") for each, checksum in records)
            )
        except OSError as error:
            self.full = (
                f"cache: {str(self.folder)!r} cannot be written ({reason_of(error)}), so further pictures are not "
                f"kept; make room, or name another folder under cache.path."
            )
            return
        for offset, (each, checksum) in enumerate(zip(fresh, sums, strict=True)):
            self._places[keys[each]] = (writer, number + offset, checksum)

    def _begin(self, features: torch.Tensor) -> None:
        """Opens files of this process's own, and says beside the first what they hold."""
        if self.dtype is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = str(features.dtype).removeprefix("torch.")
            if not (self.folder / ABOUT).exists():  # several processes may write it, all the same
                about = {"shape": list(features.shape[1:]), "dtype": name, "of": self.about}
                write_json(self.folder / ABOUT, about)
            self._read_about()
        if self._writer is None:
            self._writer = new_writer(self.folder)
            self._shard = open(self.folder / f"{self._writer[0]}{FEATURES}", "ab", buffering=0)  # noqa: SIM115

    def forget(self) -> None:
        """Takes nothing for written, so that it is written once more."""
        self._places = {}

    def close(self) -> None:
        """Ends this process's own files."""
        if self._writer is not None:
            writer, lock = self._writer
            lock.release()
            (self.folder / f"{writer}{LOCK}").unlink(missing_ok=True)
            self._writer = None

    def touch(self) -> None:
        """Notes that it was used: what was not for long is removed first."""
        with suppress(OSError):
            os.utime(self.folder / ABOUT)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total
