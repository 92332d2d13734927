"""The image files that rows name: whether each is there, and which stand in two sets, byte for byte."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.compute as pc

from ..base.errors import UserError
from ..base.whole_files import open_regular
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
        for number, problems in enumerate(
            pool.map(lambda paths: [(path, _problem(path)) for path in paths], groups), start=1
        ):
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


class Leak(NamedTuple):
    """An image of a training row that an evaluation row shows as well."""

    train: str
    held_out: str


def shared_images(train: Iterable[dict[str, Any]], held_out: Iterable[dict[str, Any]]) -> list[Leak]:
    """Training images that stand among the held-out ones, each once.

    A picture that was saved anew, or at another size, has other bytes and is not found. Files are opened only where
    the sizes are equal; what cannot be read is passed over, because the ledger names it.

    Args:
        train: Rows with `images` and `id`.
        held_out: Likewise; of an image in several rows, the first is named.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        held = _by_key(held_out)
        sizes = set(pool.map(_size, (image for image, _ in held.values()))) - {None}
        ours = _by_key(train)
        likely = {
            key: found
            for (key, found), size in zip(ours.items(), pool.map(_size, (i for i, _ in ours.values())), strict=True)
            if size in sizes
        }
        owners: dict[bytes, str] = {}
        for digest, (_, row) in zip(pool.map(digest_of, (i for i, _ in held.values())), held.values(), strict=True):
            if digest is not None:
                owners.setdefault(digest, row)
        digests = pool.map(digest_of, (image for image, _ in likely.values()))
        pairs = zip(digests, likely.values(), strict=True)
        return [Leak(row, owners[digest]) for digest, (_, row) in pairs if digest in owners]


def _by_key(rows: Iterable[dict[str, Any]]) -> dict[Any, tuple[dict[str, Any], str]]:
    """Path or bytes of each different image → the image and the first row that shows it."""
    found: dict[Any, tuple[dict[str, Any], str]] = {}
    for image, row in _images(rows):
        found.setdefault(image["path"] if image["bytes"] is None else image["bytes"], (image, row))
    return found


def _images(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    for row in rows:
        for image in row["images"]:
            if image["bytes"] is not None or (image["path"] and not is_url(image["path"])):
                yield image, row["id"]


def _size(image: dict[str, Any]) -> int | None:
    if image["bytes"] is not None:
        return len(image["bytes"])
    try:
        return os.stat(image["path"]).st_size
    except OSError:
        return None


def digest_of(image: Mapping[str, Any]) -> bytes | None:
    """A digest of the bytes of an image, of a file or embedded; None for a file that cannot be read."""
    if image["bytes"] is not None:
        return hashlib.blake2b(image["bytes"], digest_size=16).digest()
    try:
        with open_regular(image["path"]) as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError:
        return None
