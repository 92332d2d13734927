"""Rows → training, validation and test, so that no picture stands on two sides, nor one that looks like it.

Rows that share a picture, byte for byte or by look, in however many steps, stay together. Which side a group goes to is
drawn with a seed.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.errors import UserError
from ..base.names import ImageEntry
from ..data.image_files import digest_of
from ..data.looks import read_looks
from ..data.near_images import near_pairs, pairs_within
from ..reading.image_refs import TIME, image_key, is_url

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SIDES = (TRAIN, VALIDATION, TEST)
SHARE, MOST = 0.1, 1000
"""Of all groups on each held-out side, and groups there at most."""
Tick = Callable[[str, int, int | None, str], None]


class Shown(NamedTuple):
    """What a row shows.

    Attributes:
        images: As rows of the contract have them.
        said: Its messages.
        label: Its class, or "".
        side: The side that its file names, or None.
        where: Its place in words.
    """

    images: Sequence[ImageEntry]
    said: str
    label: str = ""
    side: str | None = None
    where: str = ""


class Sides(NamedTuple):
    """The side of every row.

    Attributes:
        of: A key of `SIDES` for each row; "" for one that is left out.
        groups: How many groups of rows there are that share no picture.
        alike: Pictures that look like another one, with other bytes.
        unreadable: Row → why a picture of it cannot be read.
        moved: Rows of a given split that show what another side of it holds out, and are left out.
        searched: Share of the pictures for which others were looked for.
    """

    of: list[str]
    groups: int
    alike: int
    unreadable: dict[int, str]
    moved: int
    searched: float


class _Groups:
    """Numbers that belong together."""

    def __init__(self, count: int) -> None:
        self._above = list(range(count))

    def of(self, number: int) -> int:
        while self._above[number] != number:
            self._above[number] = self._above[self._above[number]]
            number = self._above[number]
        return number

    def join(self, one: int, other: int) -> bool:
        """Whether they were apart until now."""
        one, other = self.of(one), self.of(other)
        self._above[max(one, other)] = min(one, other)
        return one != other


def share_out(rows: Sequence[Shown], seed: int = 0, tick: Tick = lambda doing, done, of, what: None) -> Sides:
    """Gives every row its side.

    A side that a row has already is kept; where its pictures are held out on another side, the row is left out.

    Args:
        rows: What they show.
        seed: Draws who is held out.
        tick: Told now and then how far it is.

    Raises:
        UserError: There are fewer than three groups that share nothing.
    """
    numbers: dict[bytes, int] = {}
    entries: list[tuple[ImageEntry, str]] = []
    users: list[list[int]] = []
    for row in rows:
        mine = []
        for image in row.images:
            if image["bytes"] is None and is_url(image["path"]):
                continue
            # All frames of a video are one thing to see.
            key = image_key({"path": image["path"], "bytes": None} if TIME in image else image)
            if key not in numbers:
                numbers[key] = len(numbers)
                entries.append((image, row.where))
            mine.append(numbers[key])
        users.append(mine)
    seen = read_looks(iter(entries), len(entries), lambda done, of: tick("looked at", done, of, "pictures"))
    broken = np.flatnonzero(~seen.readable).tolist()
    why = dict(zip(broken, seen.problems, strict=True))
    unreadable = {n: why[p] for n, mine in enumerate(users) for p in mine if p in why}
    groups = _Groups(len(entries) + len(rows))
    _join_rows(rows, users, groups, len(entries))
    same: dict[bytes | None, int] = {}
    for number, (image, _) in enumerate(entries):
        if number not in why and TIME not in image and (found := digest_of(image)) is not None:
            groups.join(same.setdefault(found, number), number)
    near = pairs_within(seen.looks, lambda done, of: tick("compared", done, of, "ways to look"))
    alike = {pair.first for pair in near.pairs if groups.join(pair.first, pair.second)}
    while True:
        of = _drawn(rows, groups, len(entries), unreadable, seed)
        if not _join_across(seen.looks, users, of, groups, alike):
            break
    moved = sum(side == "" and number not in unreadable for number, side in enumerate(of))
    count = len({groups.of(len(entries) + n) for n in range(len(rows)) if n not in unreadable})
    return Sides(of, count, len(alike), unreadable, moved, near.compared)


def _join_rows(rows: Sequence[Shown], users: Sequence[Sequence[int]], groups: _Groups, offset: int) -> None:
    """Each row with its pictures, and rows without any with those that say the same."""
    said: dict[str, int] = {}
    for number, (row, mine) in enumerate(zip(rows, users, strict=True)):
        for picture in mine:
            groups.join(offset + number, picture)
        if not mine:
            groups.join(said.setdefault(row.said, offset + number), offset + number)


def _join_across(
    looks: NDArray[np.uint8], users: Sequence[Sequence[int]], of: Sequence[str], groups: _Groups, alike: set[int]
) -> bool:
    """Joins what preflight would find alike on two sides; whether there was any."""
    sides: dict[str, set[int]] = defaultdict(set)
    for mine, side in zip(users, of, strict=True):
        sides[side] |= set(mine)
    joined = False
    for one, others in ((TEST, (TRAIN, VALIDATION)), (VALIDATION, (TRAIN,))):
        held = sorted(sides[one])
        rest = sorted(set().union(*(sides[other] for other in others)) - set(held))
        for pair in near_pairs(looks[rest], looks[held]).pairs if rest and held else ():
            if groups.join(rest[pair.first], held[pair.second]):
                alike.add(rest[pair.first])
                joined = True
    return joined


def _drawn(rows: Sequence[Shown], groups: _Groups, offset: int, unreadable: Mapping[int, str], seed: int) -> list[str]:
    """The side of each row, as its group was drawn; every so many-th of the groups of each class."""
    members: dict[int, list[int]] = defaultdict(list)
    for number in range(len(rows)):
        if number not in unreadable:
            members[groups.of(offset + number)].append(number)
    if len(members) < 3:
        raise UserError(
            f"There are {len(members)} different pictures with a text that can be used, and training, validation and "
            f"test need one each; bring more, that do not look alike."
        )
    order = sorted(members)
    random.Random(f"{seed}/sides").shuffle(order)  # the same for the same seed and rows, on every machine
    order.sort(key=lambda group: rows[members[group][0]].label)
    given: dict[int, str] = {}
    for group in order:
        own = {rows[number].side for number in members[group]}
        if side := next((side for side in (TEST, VALIDATION) if side in own), None):
            given[group] = side
    free = [group for group in order if group not in given]
    sides = dict.fromkeys(free, TRAIN) | given
    wanted = max(1, min(MOST, round(len(members) * SHARE)))
    # A crowd of rows that look alike (frames of one film) would be most of a held-out side: it is trained on.
    usual = sorted(len(members[group]) for group in order)[len(order) // 2]
    small = [group for group in free if len(members[group]) <= 4 * usual + 4]
    open_sides = [side for side in (TEST, VALIDATION) if side not in given.values()]
    picked = _spread(small if len(small) > len(open_sides) * wanted else free, wanted * len(open_sides))
    for place, group in enumerate(picked):
        sides[group] = open_sides[place % len(open_sides)]
    of = [""] * len(rows)
    for group, numbers in members.items():
        for number in numbers:
            of[number] = "" if group in given and rows[number].side not in (None, given[group]) else sides[group]
    if TRAIN not in of:
        raise UserError(
            "Every row belongs to a validation or test set by the name of its file, so none is left to learn."
        )
    return of


def _spread(groups: Sequence[int], count: int) -> list[int]:
    """So many, spread evenly."""
    count = min(count, max(0, len(groups) - 1))
    return [groups[(2 * k + 1) * len(groups) // (2 * count)] for k in range(count)]
