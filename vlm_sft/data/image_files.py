"""Images that are in the training rows and in rows that are kept for evaluation: byte for byte the same files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ..reading.image_refs import is_url

WORKERS = 16  # network file systems answer many at once


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
        for digest, (_, row) in zip(pool.map(_digest, (i for i, _ in held.values())), held.values(), strict=True):
            if digest is not None:
                owners.setdefault(digest, row)
        digests = pool.map(_digest, (image for image, _ in likely.values()))
        pairs = zip(digests, likely.values(), strict=True)
        return [Leak(row, owners[digest]) for digest, (_, row) in pairs if digest in owners]


def image_key(image: Mapping[str, Any]) -> bytes:
    """A digest of an image as a row names it: equal for the same path, or for the same bytes; no file is opened."""
    data = image["bytes"] if image["bytes"] is not None else image["path"].encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, digest_size=16).digest()


def _by_key(rows: Iterable[dict[str, Any]]) -> dict[Any, tuple[dict[str, Any], str]]:
    """Path or bytes of each different image → the image and the first row that shows it."""
    found: dict[Any, tuple[dict[str, Any], str]] = {}
    for image, row in _images(rows):
        found.setdefault(image["path"] if image["bytes"] is None else image["bytes"], (image, row))
    return found


def _images(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    for row in rows:
        for image in row["images"]:
            if image["bytes"] is not None or not is_url(image["path"]):
                yield image, row["id"]


def _size(image: dict[str, Any]) -> int | None:
    if image["bytes"] is not None:
        return len(image["bytes"])
    try:
        return os.stat(image["path"]).st_size
    except OSError:
        return None


def _digest(image: dict[str, Any]) -> bytes | None:
    if image["bytes"] is not None:
        return hashlib.blake2b(image["bytes"], digest_size=16).digest()
    try:
        with open(image["path"], "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError:
        return None
