"""Pictures of training rows that look like held-out ones: copies that were resized, saved anew, cut or mirrored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..base.names import ImageEntry, Json, Row
from ..base.words import counted
from ..reading.image_refs import TIME, image_key, is_url
from ..rows.messages import unpacked
from .image_files import digest_of
from .looks import Entry, read_looks
from .near_images import is_flat, near_pairs, repeated

SAME = 0.99  # likeness from which two pictures may be the same bytes
Tick = Callable[[str, int, int, str], None]


class Place(NamedTuple):
    """Where an image stands: the id and source of the first row that shows it, and its file where it has one."""

    row: str
    source: str
    path: str | None

    def __str__(self) -> str:
        """The row, with the file if there is one."""
        return self.row if self.path is None else f"{self.row} ({self.path})"


class LookAlike(NamedTuple):
    """A training image and the held-out one that it looks like: 1 is the same picture."""

    train: Place
    held_out: Place
    likeness: float
    mirrored: bool

    def __str__(self) -> str:
        """One line."""
        return f"{self.train} ≈ {self.held_out}: {self.likeness:.2f}{' mirrored' if self.mirrored else ''}"


@dataclass
class Compared:
    """What was looked at on one side.

    Attributes:
        looked_at: Different images that were.
        of: Different images that there are, without URLs and frames of videos.
        urls: Images that are URLs, which are not fetched.
        flat: Images without anything on them that could be compared.
        unreadable: Sentences on images that cannot be read.
    """

    looked_at: int = 0
    of: int = 0
    urls: int = 0
    flat: int = 0
    unreadable: list[str] = field(default_factory=list)


@dataclass
class LookAlikes:
    """What was found.

    Attributes:
        pairs: One for each training image that looks like a held-out one; images that are the same byte for byte, which
            `image_files.shared_images` finds, are left out.
        train: The training side.
        held_out: The other.
        repeated: Training images that look like another training image.
        searched: Share of the images for which others were looked for; below 1 where very many look alike.
        pictures: For the first pairs, both images as their rows have them, with `shown`.
    """

    pairs: list[LookAlike] = field(default_factory=list)
    train: Compared = field(default_factory=Compared)
    held_out: Compared = field(default_factory=Compared)
    repeated: int = 0
    searched: float = 1.0
    pictures: Sequence[tuple[ImageEntry, ImageEntry]] = field(default_factory=list)

    @property
    def held_out_found(self) -> int:
        """How many different held-out images the pairs have."""
        return len({pair.held_out for pair in self.pairs})

    def between(self) -> list[tuple[str, str, int]]:
        """(training source, held-out source, training images), the most first."""
        counts = Counter((pair.train.source, pair.held_out.source) for pair in self.pairs)
        return [(*sources, count) for sources, count in counts.most_common()]

    def as_dict(self) -> Json:
        """All numbers and pairs, ready for JSON."""
        names = {"images": "of", "looked_at": "looked_at", "unreadable": "unreadable", "blank": "flat", "urls": "urls"}
        sides = {"train": self.train, "held_out": self.held_out}
        return {
            **{name: {s: getattr(side, ours) for s, side in sides.items()} for name, ours in names.items()},
            "searched": self.searched,
            "train_like_train": self.repeated,
            "train_like_held_out": len(self.pairs),
            "held_out_found": self.held_out_found,
            "between": [{"train": a, "held_out": b, "images": count} for a, b, count in self.between()],
            "pairs": [
                {**p._asdict(), "train": p.train._asdict(), "held_out": p.held_out._asdict(),
                 "likeness": round(p.likeness, 4)}
                for p in self.pairs
            ],
        }  # fmt: skip

    def left_out(self) -> list[str]:
        """Sentences on what was not compared."""
        found = []
        for what, side in (("training", self.train), ("held-out", self.held_out)):
            if side.looked_at < side.of:
                found.append(
                    f"Of {side.of:,} {what} images {side.looked_at:,}, drawn at random, were compared by look; "
                    "data.look_images: null compares all."
                )
            for count, why in (
                (side.urls, "given by URL, which is not fetched"),
                (side.flat, "blank or almost so"),
                (len(side.unreadable), f"that cannot be read; the first: {''.join(side.unreadable[:1])}"),
            ):
                if count:
                    who = counted(count, f"{what} image")
                    found.append(f"Not compared by look: {who} {why}".rstrip(".") + ".")
        if self.searched < 1:
            found.append(
                f"So many images look alike that for {self.searched:.0%} of them only, spread evenly, others were "
                "looked for."
            )
        return found


class _Side:
    """The different images of rows, of which some were looked at. The rows are walked through anew for each question.

    Args:
        rows: see `find_look_alikes`, as the others.
    """

    def __init__(self, rows: Iterable[Row], what: str, most: int | None, seed: int, tick: Tick) -> None:
        self._rows = rows
        self.keys: dict[bytes, None] = {}
        self.compared = Compared()
        for image, _ in self._walk():
            if image["bytes"] is None and is_url(image["path"]):
                self.compared.urls += 1
            else:
                self.keys[image_key(image)] = None
        of = self.compared.of = len(self.keys)
        chosen = np.arange(of)
        if most is not None and most < of:
            chosen = np.sort(np.random.default_rng([seed % 2**32, of]).choice(of, most, replace=False))
        self._chosen, self._in_order = chosen, list(self.keys)
        self.places: list[Place] = []
        found = read_looks(self._look_at(), len(chosen), lambda done, of: tick("looked at", done, of, what))
        self.looks, self._stamps = found.looks, found.stamps
        self.compared.looked_at, self.compared.unreadable = len(chosen), found.problems
        self.compared.flat = int(is_flat(found.looks[found.readable]).sum())

    def _walk(self) -> Iterator[tuple[ImageEntry, Row]]:
        """Every image with its row, but for frames of videos."""
        for row in self._rows:
            for image in unpacked(row)["images"]:
                if TIME not in image:
                    yield image, row

    def _pick(self, numbers: NDArray[np.int64]) -> Iterator[tuple[int, ImageEntry, Row]]:
        """Different images of these numbers, in order, with their rows."""
        wanted = {number: k for k, number in enumerate(self._chosen[numbers].tolist())}
        seen: set[bytes] = set()
        for image, row in self._walk():
            if not wanted:
                return
            if (image["bytes"] is None and is_url(image["path"])) or (key := image_key(image)) in seen:
                continue
            k = wanted.pop(len(seen), None)
            seen.add(key)
            if k is not None:
                yield int(numbers[k]), image, row

    def _look_at(self) -> Iterator[Entry]:
        for _, image, row in self._pick(np.arange(len(self._chosen))):
            self.places.append(Place(row["id"], row["source"], image["path"] if image["bytes"] is None else None))
            yield image, row["id"]

    def key_of(self, number: int) -> bytes:
        """What a row names the image of this number by; see `image_key`."""
        return self._in_order[self._chosen[number]]

    def digest(self, number: int) -> bytes | None:
        """A digest of the bytes of the image of this number; None where its file is not there any more."""
        path = self.places[number].path
        return self._stamps[number] if path is None else digest_of({"path": path, "bytes": None})

    def entries(self, numbers: Sequence[int]) -> dict[int, ImageEntry]:
        """Number → the image as its row has it."""
        return {number: image for number, image, _ in self._pick(np.unique(np.array(numbers, np.int64)))}


def find_look_alikes(
    train: Iterable[Row],
    held_out: Iterable[Row],
    *,
    most: int | None = None,
    seed: int = 0,
    shown: int = 0,
    tick: Tick = lambda doing, done, of, what: None,
) -> LookAlikes:
    """Looks for training images that look like held-out ones, and counts training images that look like each other.

    Args:
        train: Rows with `images`, `id` and `source`, iterated more than once.
        held_out: Likewise; none: only the training images are compared with each other.
        most: How many images of each side are looked at, drawn at random; None for all.
        seed: Draws them.
        shown: Of how many pairs the images are given.
        tick: Told now and then what is done, how many times, of how many, and what: ``looked at``, 256, 8000,
            ``training images``.
    """
    if most == 0:
        return LookAlikes()
    ours = _Side(train, "training images", most, seed, tick)
    theirs = _Side(held_out, "held-out images", most, seed, tick)
    near = near_pairs(ours.looks, theirs.looks, lambda done, of: tick("tried", done, of, "ways to compare"))
    same = ours.keys.keys() & theirs.keys.keys()
    pairs = []
    for pair in near.pairs:
        if ours.key_of(pair.first) in same:
            continue
        if pair.likeness >= SAME and not pair.mirrored:
            a, b = (side.digest(number) for side, number in ((ours, pair.first), (theirs, pair.second)))
            if a is not None and a == b:
                continue
        pairs.append(pair)
    pairs.sort(key=lambda pair: -pair.likeness)
    found = [LookAlike(ours.places[p.first], theirs.places[p.second], p.likeness, p.mirrored) for p in pairs]
    first = pairs[:shown]
    left, right = ours.entries([p.first for p in first]), theirs.entries([p.second for p in first])
    pictures = [(left[p.first], right[p.second]) for p in first]
    return LookAlikes(found, ours.compared, theirs.compared, repeated(ours.looks), near.compared, pictures)
