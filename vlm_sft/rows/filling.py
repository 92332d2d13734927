"""Whole rows into packs of so many tokens: lengths alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], room: int) -> list[np.ndarray]:
    """Numbers of the rows of each pack: every row once, no more than `room` tokens together, in as few as may be.

    The longest rows first, each where the least room is left (best fit); where it takes fewer, into the first pack that
    has room (first fit). A row longer than `room` has a pack of its own.

    Args:
        lengths: Tokens of each row.
        room: Tokens of a pack.
    """
    sizes = np.clip(np.asarray(lengths, dtype=np.int64), 1, room)
    longest_first = np.argsort(-sizes, kind="stable")
    numbers = _best_fit(sizes[longest_first].tolist(), room)
    if max(numbers, default=-1) + 1 > math.ceil(sizes.sum() / room):
        numbers = min(numbers, _first_fit(sizes[longest_first], room), key=lambda found: max(found))
    by_pack = np.argsort(numbers, kind="stable")
    borders = np.flatnonzero(np.diff(np.asarray(numbers)[by_pack])) + 1
    return np.split(longest_first[by_pack], borders) if len(sizes) else []


def _best_fit(sizes: list[int], room: int) -> list[int]:
    """The pack of each row, of rows in falling order."""
    numbers, packs, free = [], 0, 0
    open_with: list[list[int]] = [[] for _ in range(room + 1)]  # tokens left -> packs; bit n of `free`: there are some
    for size in sizes:
        if fit := free >> size:
            left = size + (fit & -fit).bit_length() - 1
            number = open_with[left].pop()
            free ^= (not open_with[left]) << left
        else:
            left, number, packs = room, packs, packs + 1
        numbers.append(number)
        if left > size:
            open_with[left - size].append(number)
            free |= 1 << (left - size)
    return numbers


def _first_fit(sizes: np.ndarray, room: int) -> list[int]:
    """The pack of each row, of rows in falling order; those of one length at once."""
    left, numbers = np.zeros(0, dtype=np.int64), []
    for size, count in zip(*(part[::-1].tolist() for part in np.unique(sizes, return_counts=True)), strict=True):
        fit = left // size
        taken = np.clip(count - (fit.cumsum() - fit), 0, fit)
        rest, each = int(count - taken.sum()), room // size
        added = [each] * (rest // each) + [rest % each] * (rest % each > 0)
        taken = np.concatenate([taken, np.asarray(added, dtype=np.int64)])
        left = np.concatenate([left, np.full(len(added), room)]) - taken * size
        numbers.append(np.repeat(np.arange(len(left)), taken))
    return np.concatenate(numbers).tolist()
