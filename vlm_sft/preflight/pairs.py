"""Training images that look like held-out ones, for the page: found among all rows, the first pairs side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from datasets import Dataset

from ..base.errors import RowError
from ..base.names import ImageEntry, Row
from ..base.progress import Steps
from ..data.look_alikes import LookAlike, LookAlikes, find_look_alikes
from ..pages.pictures import Picture, thumbnail
from ..reading.images import load_image
from ..rows.messages import IN_EXTRAS

PAIRS = 24  # pairs that are shown
SIDE = 144  # pixels of the longer side
_COLUMNS = ("images", "id", "source", IN_EXTRAS)


@dataclass(frozen=True)
class ShownPair:
    """Two images that look alike, small; None for one that is not there any more."""

    pair: LookAlike
    train: Picture | None
    held_out: Picture | None


def compare_looks(train: Iterable[Row], held_out: Sequence[Dataset], most: int | None, seed: int) -> LookAlikes | None:
    """Looks for training images that look like held-out ones; None where nothing is held out or `most` is 0.

    Args:
        train: Training rows; of a stream, the first ones.
        held_out: Evaluation and test rows, each a dataset.
        most: How many images of each side are compared, drawn at random; None for all.
        seed: Draws them.
    """
    if not held_out or most == 0:
        return None
    with Steps("looked at") as told:
        return find_look_alikes(_Images(train), _Images(*held_out), most=most, seed=seed, tick=told.tell, shown=PAIRS)


class _Images:
    """Rows without their texts, walked through as often as asked."""

    def __init__(self, *rows: Iterable[Row]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Row]:
        for rows in self._rows:
            if isinstance(rows, Dataset):
                rows = rows.select_columns([name for name in _COLUMNS if name in rows.column_names])
            yield from rows


def show_pairs(found: LookAlikes | None) -> list[ShownPair]:
    """The first pairs of images, to be seen side by side."""
    if found is None:
        return []
    return [ShownPair(pair, *map(_small, images)) for pair, images in zip(found.pairs, found.pictures, strict=False)]


def _small(image: ImageEntry) -> Picture | None:
    try:
        return thumbnail(load_image(image, side=SIDE), side=SIDE)
    except RowError:  # it was read a moment ago, so this is hardly ever so
        return None
