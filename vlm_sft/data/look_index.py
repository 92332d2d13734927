"""Bits of what pictures look like, and which of many differ in few of them: nobody compares all with all.

The bits are those of a perceptual hash (the signs of low frequencies, as `imagehash.phash`) and of a difference hash
(`imagehash.dhash`), taken of a picture as it is, cut at its sides, and mirrored. Two of 64 bits that differ in seven at
most have a quarter in which they differ in one at most: these are looked up, quarter by quarter.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .looks import SIDE

Floats = NDArray[np.float32]
Numbers = NDArray[np.int64]
Bits = NDArray[np.uint64]
Cut = tuple[float, float, float, float]

# Left, top, width and height of what is looked at, in shares of the picture.
CUTS: tuple[Cut, ...] = (
    (0.0, 0.0, 1.0, 1.0), (0.025, 0.025, 0.95, 0.95), (0.05, 0.05, 0.9, 0.9),
    (0.08, 0.0, 0.92, 1.0), (0.0, 0.0, 0.92, 1.0), (0.0, 0.08, 1.0, 0.92), (0.0, 0.0, 1.0, 0.92),
)  # fmt: skip
NEAR_BITS, FAR_BITS = 7, 24  # of 64, that may differ in one of the hashes, and in the other
PAIRS = 2**19  # candidates at a time
CROWD = 64  # near ones of a hash that are told at a time: where thousands look alike, any few of them will do
_CHUNKS = 4  # of 16 bits: two pictures that differ in 7 of 64 differ in one at most of some chunk
_MASKS = np.array([0, *(1 << bit for bit in range(16))], np.uint64)


class View(NamedTuple):
    """A way to look at a picture: windows of its rows and of its columns, (SIDE, SIDE) each."""

    rows: Floats
    columns: Floats
    mirrored: bool


def views(cuts: tuple[Cut, ...] = CUTS, mirrored: bool = True) -> list[View]:
    """Every cut, as it is and, if `mirrored`, mirrored."""
    found = []
    for left, top, width, height in cuts:
        rows, columns = window(SIDE, top, height), window(SIDE, left, width)
        found.append(View(rows, columns, False))
        if mirrored:
            found.append(View(rows, columns[:, ::-1], True))
    return found


def window(size: int, start: float, length: float) -> Floats:
    """(size, size) weights that stretch a part of `size` pixels to `size` pixels, linearly.

    Args:
        size: pixels of the side.
        start: where the part begins, a share of the side.
        length: how long it is, likewise.
    """
    places = np.clip((start + (np.arange(size) + 0.5) / size * length) * size - 0.5, 0, size - 1)
    below = np.minimum(places.astype(np.int64), size - 2)
    weights = np.zeros((size, size), np.float32)
    weights[np.arange(size), below] = 1 - (places - below)
    weights[np.arange(size), below + 1] = places - below
    return weights


def hashes(grey: Floats, view: View | None = None) -> Bits:
    """(n, 2) hashes of 64 bits: of low frequencies, and of differences from left to right.

    Args:
        grey: (n, SIDE, SIDE) grey levels.
        view: how they are looked at; None: as they are.
    """
    waves, boxes, wide = _bases()
    view = view or views(CUTS[:1], False)[0]
    frequencies = seen_through(grey, waves @ view.rows, waves @ view.columns).reshape(len(grey), -1)
    steps = np.diff(seen_through(grey, boxes @ view.rows, wide @ view.columns), axis=2).reshape(len(grey), -1)
    signs = (frequencies > np.median(frequencies, axis=1, keepdims=True), steps > 0)
    return np.stack([np.packbits(bits, axis=1).view(np.uint64)[:, 0] for bits in signs], axis=1)


@cache
def _bases() -> tuple[Floats, Floats, Floats]:
    """(8, SIDE) cosines; (8, SIDE) and (9, SIDE) means of equal parts of a side."""
    n, k = np.arange(SIDE), np.arange(8)[:, None]
    waves = np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE)).astype(np.float32)

    def boxes(count: int) -> Floats:
        edges = np.arange(count + 1)[:, None] * SIDE / count
        weights = np.clip(np.minimum(edges[1:], n + 1) - np.maximum(edges[:-1], n), 0, None)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)

    return waves, boxes(8), boxes(9)


def seen_through(grey: Floats, rows: Floats, columns: Floats) -> Floats:
    """rows @ grey @ columns.T for each picture, as two products of large matrices.

    Args:
        grey: (n, side, side) grey levels.
        rows: (r, side) weights of a window.
        columns: (c, side) likewise.

    Returns:
        (n, r, c).
    """
    count, side = len(grey), grey.shape[1]
    across = (grey.reshape(-1, side) @ columns.T).reshape(count, side, -1).transpose(0, 2, 1)
    down = np.ascontiguousarray(across).reshape(-1, side) @ rows.T
    return down.reshape(count, len(columns), len(rows)).transpose(0, 2, 1)


class Index:
    """Hashes of pictures, to be asked for those that differ in few bits.

    Args:
        bits: (n, 2) as `hashes` gives them.
    """

    def __init__(self, bits: Bits) -> None:
        self.bits = bits
        self._chunks = []
        for kind in range(2):
            for chunk in range(_CHUNKS):
                keys = _chunk(bits[:, kind], chunk)
                order = np.argsort(keys, kind="stable")
                starts = np.searchsorted(keys[order], np.arange(2**16 + 1, dtype=np.uint64))
                self._chunks.append((kind, chunk, order, starts))

    def load(self, bits: Bits) -> int:
        """How many candidates would be counted bit by bit for these hashes."""
        return sum(
            int((starts[keys + 1] - starts[keys]).sum())
            for kind, chunk, _, starts in self._chunks
            for mask in _MASKS
            for keys in [(_chunk(bits[:, kind], chunk) ^ mask).astype(np.int64)]
        )

    def near(self, bits: Bits) -> Iterator[tuple[Numbers, Numbers]]:
        """Numbers of hashes and of those here that are near them, of a crowd some; a pair may come several times."""
        for kind, chunk, order, starts in self._chunks:
            for mask in _MASKS:
                keys = (_chunk(bits[:, kind], chunk) ^ mask).astype(np.int64)
                first, counts = starts[keys], starts[keys + 1] - starts[keys]
                asked = np.flatnonzero(counts)
                for part in _parts(counts[asked]):
                    some = asked[part]
                    query = np.repeat(some, counts[some])
                    before = np.cumsum(counts[some]) - counts[some]
                    place = np.arange(len(query)) + np.repeat(first[some] - before, counts[some])
                    found = order[place]
                    near = np.bitwise_count(bits[query, kind] ^ self.bits[found, kind]) <= NEAR_BITS
                    query, found = query[near], found[near]
                    other = np.bitwise_count(bits[query, 1 - kind] ^ self.bits[found, 1 - kind]) <= FAR_BITS
                    query, found = query[other], found[other]
                    few = np.arange(len(query)) - np.searchsorted(query, query) < CROWD
                    if few.any():
                        yield query[few], found[few]


def _chunk(bits: Bits, number: int) -> Bits:
    return (bits >> np.uint64(16 * number)) & np.uint64(0xFFFF)


def _parts(counts: Numbers) -> Iterator[slice]:
    """Stretches of so many that each has about PAIRS, or is one alone."""
    if not len(counts):
        return
    group = np.cumsum(counts) // PAIRS
    edges = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(counts)]
    yield from (slice(start, end) for start, end in pairwise(edges))
