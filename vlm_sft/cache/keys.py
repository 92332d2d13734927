"""What a picture is known by: the bytes of its file, so that it need not be decoded to be found.

Hashing a file takes a fiftieth of decoding it, and a file that was hashed once is known by its name, size, times and
inode, so that the next time it is not even read. What makes pixels of the bytes (sizes that a row asks for) counts
along; how all pictures are prepared stands in the name of the store. A frame of a film is known by its pixels: its file
is the whole film.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..base.limits import bounded
from ..base.names import ImageEntry
from ..base.whole_files import open_regular, read_text, write_json
from ..pieces.checkpoints import Checkpoint
from ..reading.image_refs import SIZES, TIME, is_url
from .records import Records, new_writer
from .store import KEY

FILES, WEIGHTS, SEEN = "files", "weights.json", ".seen"
SETTLED = 2 * 10**9  # nanoseconds after which a file that is written again shows another time


def digest(*parts: bytes) -> bytes:
    """Sixteen bytes that are the same for the same parts alone."""
    hashed = hashlib.blake2b(digest_size=KEY)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.digest()


class Keys:
    """Keys of pictures, and which files are known already.

    Args:
        root: The cache's folder.
        fetch: Gives the file of a picture that is a URL; None where none is asked for.
    """

    def __init__(self, root: Path, fetch: Callable[[str], str] | None = None) -> None:
        self.fetch = fetch
        self._records = Records(root / FILES, SEEN, KEY, KEY)
        self._writer: tuple[str, Any] | None = None
        self._known = {file: content for _, _, file, content in self._records.new()}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_writer": None}

    def of(self, image: ImageEntry) -> tuple[bytes | None, bytes | None]:
        """(key, what is new of its file: name and content, 32 bytes) of a row's picture.

        The key is None where the picture must be decoded to be known, or its file cannot be read; the second is None
        where nothing is new.
        """
        if TIME in image:
            return None, None
        asked = json.dumps([image.get(name) for name in SIZES]).encode()
        encoded = image.get("bytes")
        if encoded is not None:
            return digest(digest(bytes(encoded)), asked), None
        path, new = str(image.get("path") or ""), None
        try:
            if is_url(path):
                if self.fetch is None:
                    return None, None
                path = self.fetch(path)
            found = os.stat(path)
            times = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)
            file = digest(os.path.abspath(path).encode(errors="surrogateescape"), json.dumps(times).encode())
            content = self._known.get(file)
            if content is None:
                with open_regular(path) as opened:
                    content = digest(opened.read())
                if time.time_ns() - max(times[1], times[2]) > SETTLED:
                    self._known[file], new = content, file + content
        except (OSError, ValueError):
            return None, None  # whoever decodes it says what is wrong
        return digest(content, asked), new

    def note(self, new: Iterable[bytes]) -> None:
        """Writes down files that were met for the first time, for this and other runs."""
        if not (records := b"".join(dict.fromkeys(new))):
            return
        try:
            if self._writer is None:
                self._writer = new_writer(self._records.folder)
            self._records.append(self._writer[0], records)
        except OSError:
            return  # they are hashed once more next time
        self._known |= {records[n : n + KEY]: records[n + KEY : n + 2 * KEY] for n in range(0, len(records), 2 * KEY)}


def key_of_pixels(image: Image.Image) -> bytes:
    """The key of a picture that is decoded."""
    return digest(repr(image.size).encode(), image.tobytes())


def digest_of_weights(checkpoint: Checkpoint, names: Iterable[str] | None, root: Path) -> str:
    """Hash over all bytes of these tensors (default: of all), with their names, shapes and types.

    It reads them once for each state of their files, and notes what it found in the cache's folder.

    Args:
        checkpoint: Where they are.
        names: Which.
        root: The cache's folder.
    """
    wanted = sorted(checkpoint.files if names is None else set(names))
    lines = []
    for path in sorted(set(checkpoint.paths_of(wanted))):
        found = os.stat(path)
        lines.append(f"{os.path.realpath(path)}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}:{found.st_ino}")
    state = digest(*(line.encode() for line in lines), *(name.encode() for name in wanted)).hex()
    file = root / WEIGHTS
    known: dict[str, str] = {}
    with suppress(OSError, ValueError, TypeError, RecursionError):
        known = dict(json.loads(bounded(read_text(file))))
    if state not in known:
        hashed = hashlib.blake2b(digest_size=KEY)
        for name in wanted:
            tensor = checkpoint.read([name])[name].contiguous()
            hashed.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:".encode())
            hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        known[state] = hashed.hexdigest()
        with suppress(OSError):
            write_json(file, known)
    return known[state]
