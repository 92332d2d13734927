"""Which pictures look alike, of many: candidates by their bits, then the pictures themselves laid over each other.

What is known of a picture is its look, see `looks.look_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .look_index import CUTS, PAIRS, Floats, Index, Numbers, View, hashes, seen_through, views, window
from .looks import COLOUR, SIDE

FLAT = 5.0  # spread of grey levels below which a picture shows nothing that could be compared
LIKELY = 0.88  # correlation at half the resolution from which a candidate is laid over its partner
# Correlation from which two pictures are alike: of such as are plain but for a quarter, and of such as are full of
# detail. What differs in a plain picture (a digit, the eyes of a face) may be all that it shows.
BUSY, ALIKE = (0.25, 0.6), (0.96, 0.9)
BUSY_BLOCK = 0.2  # least spread of grey levels in a block of 4 x 4 with detail, in that of the picture
GAIN = 0.35  # least contrast of one in that of the other
# Pictures with colours have like ones where these point the same way. A grey copy of a picture in colour, one with less
# than a quarter of its colour, is taken for one where it is busy enough: grey hearts are no copies of red ones.
COLOURED, SAME_COLOURS, PALE, BUSY_GREY = 1.5, 0.9, 0.25, 0.4
PARTNERS = 4  # likeliest candidates of a picture that are laid over it
BLOCK = 8192  # pictures at a time
PAIRS_LAID = 256  # pairs that are laid over each other at a time
MOST_PAIRS = 1_000_000_000  # candidates whose bits are counted: within a minute
_HALF = SIDE // 2


class NearPair(NamedTuple):
    """Two pictures that look alike: their numbers, the correlation of grey levels, whether one is mirrored."""

    first: int
    second: int
    likeness: float
    mirrored: bool


def is_flat(looks: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which pictures show next to nothing. Args: looks: (n, look) bytes."""
    return np.concatenate(
        [_grey(looks[part]).std((1, 2)) < FLAT for part in _slices(len(looks), BLOCK)] or [np.zeros(0, bool)]
    )


class Near(NamedTuple):
    """What was found: pairs by their first, and the share of the pictures for which others were looked for."""

    pairs: list[NearPair]
    compared: float


def near_pairs(
    first: NDArray[np.uint8], second: NDArray[np.uint8], tick: Callable[[int, int], None] = lambda done, of: None
) -> Near:
    """For each picture of `first` that looks like one of `second`, the likest.

    Flat pictures look like none. Where pictures are so alike that the bits of more than MOST_PAIRS would have to be
    counted, others are looked for to an even part of them.

    Args:
        first: (n, look) bytes.
        second: (m, look) bytes.
        tick: told how many ways of looking are done, and of how many.
    """
    ways = views()
    of = 2 * len(ways) - 2
    ours, share = _likely(first, second, ways, lambda done: tick(done, of))
    theirs, other = _likely(second, first, ways[2:], lambda done: tick(len(ways) + done, of))
    turned = [(found, query, score, mirrored) for query, found, score, mirrored in theirs]
    return Near(_best(first, second, ours + turned), min(share, other))


def repeated(looks: NDArray[np.uint8]) -> int:
    """How many of these pictures look like one before them, as they are or with their sides cut evenly."""
    found, _ = _likely(looks, looks, views(CUTS[:2], False), lambda done: None)
    return len(_best(looks, looks, _of_two(found)))


def pairs_within(looks: NDArray[np.uint8], tick: Callable[[int, int], None] = lambda done, of: None) -> Near:
    """Pairs among these pictures that look alike, the later one first; of each picture, those with its likeliest ones.

    Args:
        looks: (n, look) bytes.
        tick: told how many ways of looking are done, and of how many.
    """
    ways = views()
    found, share = _likely(looks, looks, ways, lambda done: tick(done, len(ways)))
    return Near(_best(looks, looks, _of_two(found), every=True), share)


Likely = tuple[Numbers, Numbers, Floats, bool]


def _of_two(found: list[Likely]) -> list[Likely]:
    """Pairs of one set without those of a picture and itself, the later picture first."""
    return [
        (np.maximum(a, b)[other], np.minimum(a, b)[other], score[other], mirrored)
        for a, b, score, mirrored in found
        for other in [a != b]
    ]


def _likely(
    queries: NDArray[np.uint8], others: NDArray[np.uint8], ways: Sequence[View], tick: Callable[[int], None]
) -> tuple[list[Likely], float]:
    """Pairs by their bits whose correlation at half the resolution is high: numbers, correlation, whether mirrored.

    And the share of the queries for which they were looked for.
    """
    asked, there = np.flatnonzero(~is_flat(queries)), np.flatnonzero(~is_flat(others))
    if not len(asked) or not len(there):
        return [], 1.0
    index = Index(np.concatenate([hashes(_grey(others[part])) for part in _blocks(there)]))
    halves = np.concatenate([_half(_grey(others[part])).astype(np.float16) for part in _blocks(there)])
    load = sum(index.load(hashes(_grey(queries[block]))) for block in _blocks(asked)) * len(ways)
    share = min(1.0, MOST_PAIRS / max(load, 1))
    asked = asked[np.linspace(0, len(asked) - 1, max(1, int(len(asked) * share))).astype(np.int64)]
    found: list[Likely] = []
    for number, way in enumerate(ways, start=1):
        for block in _blocks(asked):
            grey = _grey(queries[block])
            seen = _half(seen_through(grey, way.rows, way.columns))
            pairs = [np.unique(query * len(there) + other) for query, other in index.near(hashes(grey, way))]
            together = np.unique(np.concatenate(pairs)) if pairs else np.zeros(0, np.int64)
            for part in _slices(len(together), PAIRS // 8):
                query, other = np.divmod(together[part], len(there))
                score = np.einsum("nij,nij->n", seen[query], halves[other].astype(np.float32))
                keep = np.flatnonzero(score >= LIKELY)
                keep = keep[_first_of_each(query[keep], score[keep])]
                if len(keep):
                    found.append((block[query[keep]], there[other[keep]], score[keep], way.mirrored))
        tick(number)
    return found, share


def _first_of_each(numbers: Numbers, scores: Floats) -> Numbers:
    """Places of the PARTNERS highest scores of each number, by number and score."""
    order = np.lexsort((-scores, numbers))
    ordered = numbers[order]
    return order[np.arange(len(order)) - np.searchsorted(ordered, ordered) < PARTNERS]


def _blocks(numbers: Numbers) -> Iterator[Numbers]:
    yield from (numbers[i : i + BLOCK] for i in range(0, len(numbers), BLOCK))


def _best(
    first: NDArray[np.uint8], second: NDArray[np.uint8], likely: list[Likely], every: bool = False
) -> list[NearPair]:
    """The likest partner of each picture, of its likeliest ones, where it is alike; or `every` one of those."""
    if not likely:
        return []
    a, b, score = (np.concatenate([each[k] for each in likely]) for k in range(3))
    mirrored = np.concatenate([np.full(len(each[0]), each[3]) for each in likely])
    order = np.lexsort((-score, mirrored, b, a))
    a, b, mirrored, score = (each[order] for each in (a, b, mirrored, score))
    new = np.diff((a * len(second) + b) * 2 + mirrored, prepend=-1) != 0  # of several ways to see a pair, the likest
    a, b, mirrored, score = (each[new] for each in (a, b, mirrored, score))
    few = _first_of_each(a, score)
    a, b, mirrored = a[few], b[few], mirrored[few]
    found: dict[tuple[int, int], NearPair] = {}
    for part in _slices(len(a), PAIRS_LAID):
        likeness, same = alike(first[a[part]], second[b[part]], mirrored[part])
        for k in np.flatnonzero(same).tolist():
            pair = NearPair(int(a[part][k]), int(b[part][k]), float(likeness[k]), bool(mirrored[part][k]))
            key = (pair.first, pair.second if every else 0)
            if key not in found or pair.likeness > found[key].likeness:
                found[key] = pair
    return [found[number] for number in sorted(found)]


def _slices(count: int, size: int) -> Iterator[slice]:
    yield from (slice(start, start + size) for start in range(0, count, size))


def alike(
    first: NDArray[np.uint8], second: NDArray[np.uint8], mirrored: NDArray[np.bool_]
) -> tuple[Floats, NDArray[np.bool_]]:
    """How like the pictures of pairs are, one laid over the other as it fits best.

    Args:
        first: (n, look) bytes.
        second: their partners.
        mirrored: which are to be mirrored first.

    Returns:
        (n,) correlations of grey levels, and (n,) whether they are so alike that one is a copy of the other.
    """
    a, b = _grey(first), _grey(second)
    a[mirrored] = a[mirrored, :, ::-1]
    best = np.full(len(a), -1.0, np.float32)
    for x, y in ((a, b), (b, a)):
        fitted = _fitted(x, y)
        spread = np.sqrt((_centred(fitted) ** 2).sum((1, 2)) / np.maximum((_centred(y) ** 2).sum((1, 2)), 1e-6))
        score = (_unit(fitted) * _unit(y)).sum((1, 2))
        score[(spread < GAIN) | (spread > 1 / GAIN)] = 0.0
        best = np.maximum(best, score)
    busy = np.minimum(_busy(a), _busy(b))
    fits = _colours_fit(_colour(first), _colour(second), mirrored, busy)
    return best, (best >= np.interp(busy, BUSY, ALIKE)) & fits


def _busy(grey: Floats) -> Floats:
    """The share of a picture's blocks that show something."""
    blocks = grey.reshape(len(grey), SIDE // 4, 4, SIDE // 4, 4).std((2, 4))
    return (blocks > BUSY_BLOCK * grey.std((1, 2))[:, None, None]).mean((1, 2))


def _colours_fit(a: Floats, b: Floats, mirrored: NDArray[np.bool_], busy: Floats) -> NDArray[np.bool_]:
    """Whether one picture's colours, stronger or weaker, are the other's."""
    a[mirrored] = a[mirrored, :, ::-1]
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    of_a, of_b = np.sqrt((a**2).mean(1)), np.sqrt((b**2).mean(1))
    weak, strong = np.minimum(of_a, of_b), np.maximum(of_a, of_b)
    same = (a * b).mean(1) >= SAME_COLOURS * weak * strong
    return (strong < COLOURED) | np.where(weak < PALE * strong, busy >= BUSY_GREY, same)


def _fitted(grey: Floats, goal: Floats) -> Floats:
    """Each picture cut so that it fits its partner best, found at half the resolution: rows, columns, rows again."""
    half, whole = _windows(_HALF), _windows(SIDE)
    small, aim = _pooled(grey), _half(goal)
    rows = columns = np.zeros(len(grey), np.int64)
    for _ in range(2):
        seen = np.matmul(small, half[columns].transpose(0, 2, 1))
        rows = _fit(np.einsum("vij,njk->nvik", half, seen, optimize=True), aim)
        seen = np.matmul(half[rows], small)
        columns = _fit(np.einsum("nij,vkj->nvik", seen, half, optimize=True), aim)
    return np.matmul(np.matmul(whole[rows], grey), whole[columns].transpose(0, 2, 1))


def _fit(tried: Floats, aim: Floats) -> Numbers:
    return np.einsum("nvij,nij->nv", _unit(tried), aim).argmax(1)


@cache
def _windows(size: int) -> Floats:
    """(13, size, size): a side whole, and 90 to 98 % of it from its start, its middle and its end."""
    parts = [(0.0, 1.0)] + [((1 - part) * at, part) for part in (0.98, 0.95, 0.925, 0.9) for at in (0.0, 0.5, 1.0)]
    return np.stack([window(size, *part) for part in parts])


def _grey(looks: NDArray[np.uint8]) -> Floats:
    return looks[:, : SIDE * SIDE].reshape(-1, SIDE, SIDE).astype(np.float32)


def _colour(looks: NDArray[np.uint8]) -> Floats:
    return looks[:, SIDE * SIDE :].reshape(-1, COLOUR, COLOUR, 2).astype(np.float32) - 128


def _pooled(grey: Floats) -> Floats:
    return (grey[:, ::2, ::2] + grey[:, 1::2, ::2] + grey[:, ::2, 1::2] + grey[:, 1::2, 1::2]) * np.float32(0.25)


def _half(grey: Floats) -> Floats:
    """At half the resolution, of mean 0 and norm 1."""
    return _unit(_pooled(grey))


def _centred(grey: Floats) -> Floats:
    return grey - grey.mean((-2, -1), keepdims=True)


def _unit(grey: Floats) -> Floats:
    centred = _centred(grey)
    return centred / np.maximum(np.sqrt((centred**2).sum((-2, -1), keepdims=True)), 1e-6)
