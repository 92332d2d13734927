"""The image files that rows name: whether each is there, and which stand in two sets, byte for byte."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.compute as pc

from ..base.errors import UserError
from ..base.names import ImageEntry, Row
from ..base.progress import steps
from ..base.whole_files import digest, file_digest
from ..reading.image_refs import is_url

if TYPE_CHECKING:
    from datasets import Dataset

WORKERS = 16  # network file systems answer many at once
GROUP = 512  # files that a thread looks for at a time


def check_images(dataset: Dataset) -> None:
    """Look for every image file that a dataset names, without opening any.

    Raises:
        UserError: some are missing, empty or folders; the message counts them and names the first and its row.
    """
    paths, bad = missing_images(dataset)
    if not bad:
        return
    first = next(iter(bad))
    users = (row["id"] for row in dataset if any(image["path"] == first for image in row["images"]))
    raise UserError(
        f"{len(bad):,} of {paths:,} images cannot be used; the first is {first} ({next(users, 'not drawn')}), "
        f"which {bad[first]}: correct the paths or the source's `images` folder, or remove the rows."
    )


def missing_images(
    dataset: Dataset, tick: Callable[[int, int], None] = lambda done, of: None
) -> tuple[int, dict[str, str]]:
    """Look for every image file that a dataset names.

    Args:
        dataset: rows of the contract.
        tick: told now and then how many files were looked for, and of how many.

    Returns:
        How many different files it names, and path to what is wrong with it, for those that are no file or empty.
    """
    paths: dict[str, None] = {}  # a set in the order of the rows
    for chunk in dataset.data.column("images").chunks:
        images = chunk.flatten()
        path, encoded = pc.struct_field(images, "path"), pc.struct_field(images, "bytes")
        named = path.filter(pc.and_(path.is_valid(), encoded.is_null())).to_pylist()
        paths |= dict.fromkeys(name for name in named if not is_url(name))
    todo = iter(paths)
    groups = iter(lambda: list(islice(todo, GROUP)), [])
    bad: dict[str, str] = {}
    with ThreadPoolExecutor(WORKERS) as pool:
        found = pool.map(lambda paths: [(path, _problem(path)) for path in paths], groups)
        for number, problems in enumerate(found, start=1):
            bad.update((path, problem) for path, problem in problems if problem is not None)
            tick(min(number * GROUP, len(paths)), len(paths))
    return len(paths), bad


def _problem(path: str) -> str | None:
    try:
        status = os.stat(path)
    except OSError as error:
        return "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be reached ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return "is not a file"
    return None if status.st_size else "is empty (0 bytes)"


Shown = tuple[ImageEntry, str]
"""An image, and the id of a row that shows it."""


class Leak(NamedTuple):
    """An image of a training row that an evaluation row shows as well."""

    train: str
    held_out: str


def shared_images(train: Iterable[Row], held_out: Iterable[Row]) -> list[Leak]:
    """Training images that stand among the held-out ones, each once.

    A picture that was saved anew, or at another size, has other bytes and is not found. Files are opened only where
    the sizes are equal; what cannot be read is passed over, because the ledger names it.

    Args:
        train: Rows with `images` and `id`.
        held_out: Likewise; of an image in several rows, the first is named.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        theirs = _different(held_out)
        sizes = set(pool.map(_size, theirs)) - {None}
        ours = _different(train)
        measured = steps(pool.map(_size, ours), "measured", "pictures", len(ours))
        likely = [each for each, size in zip(ours, measured, strict=True) if size in sizes]
        owners: dict[bytes | None, str] = {}
        held = steps(pool.map(_digest, theirs), "read", "held-out pictures", len(theirs))
        for found, (_, row) in zip(held, theirs, strict=True):
            owners.setdefault(found, row)
        owners.pop(None, None)
        same = steps(pool.map(_digest, likely), "read", "pictures", len(likely))
        pairs = zip(same, likely, strict=True)
        return [Leak(row, owners[found]) for found, (_, row) in pairs if found in owners]


def _different(rows: Iterable[Row]) -> list[Shown]:
    """Each different image, by its path or bytes, and the first row that shows it."""
    found: dict[Any, Shown] = {}
    for row in rows:
        for image in row["images"]:
            path, encoded = image["path"], image["bytes"]
            if encoded is not None or (path and not is_url(path)):
                found.setdefault(path if encoded is None else encoded, (image, row["id"]))
    return list(found.values())


def _size(shown: Shown) -> int | None:
    image, _ = shown
    if image["bytes"] is not None:
        return len(image["bytes"])
    try:
        return os.stat(image["path"]).st_size
    except OSError:
        return None


def _digest(shown: Shown) -> bytes | None:
    return digest_of(shown[0])


def digest_of(image: ImageEntry) -> bytes | None:
    """A digest of the bytes of an image, of a file or embedded; None for a file that cannot be read."""
    if image["bytes"] is not None:
        return digest(image["bytes"])
    try:
        return file_digest(image["path"])
    except OSError:
        return None
