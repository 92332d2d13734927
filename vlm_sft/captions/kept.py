"""The rows of captions that are kept, and a manifest that counts all of them: made, kept, dropped and why."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..base.errors import UserError
from ..base.names import Json
from ..base.whole_files import write_whole, written_beside
from ..base.words import language_of, reason_of
from ..data.ledger import Ledger
from ..prepare.convert import Images, images_folder
from ..prepare.filtering import Score
from ..reading.video import Films
from .capfilt import Wish
from .made import Caption, Made, Parts
from .wanted import Reject, Wanted, WantedPictures

BELOW = "below the threshold"
GIVEN = "given"
"""The `source` of a caption that a picture had already; that of another is its captioner."""


@dataclass
class Counts:
    """What became of pictures and captions.

    Attributes:
        pictures: Different ones that could be read.
        again: Rows whose picture came before.
        made: Captions that the captioner wrote.
        given: Captions that pictures had already.
        kept: Of both.
        dropped: Reason → captions.
        without: Pictures of which no caption is kept.
        languages: Language → captions that are kept.
        folders: Where pictures lie outside the folder of OUT.
    """

    pictures: int = 0
    again: int = 0
    made: int = 0
    given: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    without: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    folders: set[str] = field(default_factory=set)


class Row(NamedTuple):
    """A picture with what was made of it."""

    wanted: Wanted
    made: Made


class Finished:
    """Pictures with all that was made of them; pictures that cannot be read are counted in a ledger.

    Args:
        found: The pictures.
        parts: What was made of them.
        most: Largest share of pictures that may be left out.
    """

    def __init__(self, found: WantedPictures, parts: Parts, most: float) -> None:
        self.found, self.parts = found, parts
        self.name = Path(found.src).stem or found.src
        self.ledger = Ledger(most)
        counted = self.ledger.source(self.name)
        for row in self._rows(self.ledger.rejecter(self.name)):
            counted.read += 1
            if row.made.error is None:
                counted.used += 1
            else:
                counted.reject(row.made.reason or "error", row.made.error)

    def __iter__(self) -> Iterator[Row]:
        """Those that could be read."""
        return (row for row in self._rows(lambda error: None) if row.made.error is None)

    def _rows(self, reject: Reject) -> Iterator[Row]:
        for number, wanted in enumerate(self.found.through(reject)):
            made = self.parts.line(number)
            if made is None or made.id != wanted.id:
                is_there = "nothing" if made is None else repr(made.id)
                raise UserError(
                    f"{self.parts.folder} has {is_there} where {self.found.src} has {wanted.id!r}: its pictures are "
                    f"others than before; give another OUT, or remove the folder."
                )
            yield Row(wanted, made)

    def scores(self) -> list[Score]:
        """Those of all captions."""
        return [
            Score(row.made.id, caption.score, None)
            for row in self
            for caption in row.made.captions
            if caption.score is not None
        ]


def write_rows(finished: Finished, out: Path, wish: Wish, threshold: float | None) -> Counts:
    """Writes the captions that are kept, a row each: `id`, `image`, `caption`, `score` and `source`.

    Args:
        finished: The pictures.
        out: File to write, a `.jsonl`; `format: caption` reads it.
        wish: How they were made.
        threshold: Smallest score that is kept; None: all.

    Raises:
        UserError: OUT cannot be written, or nothing would be in it.
    """
    counts = Counts()
    try:
        with written_beside(out) as beside, Films() as films:
            images = Images(out, images_folder(beside), False, films)
            with beside.open("w", encoding="utf-8", errors="replace") as file:
                for row in finished:
                    for line in _lines(row, images, wish, threshold, counts):
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
            if not counts.kept:
                why = ", ".join(f"{reason}: {number:,}" for reason, number in counts.dropped.most_common())
                raise UserError(
                    f"No caption is kept ({why or 'none was made'}): lower --threshold, or ask another model."
                )
            if images.stage.exists():  # first, so that a file never names images that are not there
                os.replace(images.stage, images_folder(out))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({reason_of(error)}): correct it or make room.") from None
    return counts


def _lines(row: Row, images: Images, wish: Wish, threshold: float | None, counts: Counts) -> Iterator[Json]:
    counts.pictures += not row.wanted.again
    counts.again += row.wanted.again
    kept = 0
    for number, caption in enumerate(row.made.captions):
        counts.given += caption.given
        counts.made += not caption.given
        if why := _dropped(caption, threshold):
            counts.dropped[why] += 1
            continue
        kept += 1
        counts.languages[language_of(caption.text)] += 1
        name = images.name(row.wanted.image, row.made.id)
        if os.path.isabs(name):
            counts.folders.add(os.path.dirname(name))
        yield {
            "id": f"{row.made.id}#{number}",
            "image": name,
            "caption": caption.text,
            "score": caption.score,
            "source": GIVEN if caption.given else wish.captioner,
        }
    counts.kept += kept
    counts.without += not kept and not row.wanted.again


def _dropped(caption: Caption, threshold: float | None) -> str | None:
    if caption.dropped or threshold is None or caption.score is None:
        return caption.dropped
    return BELOW if caption.score < threshold else None


def manifest_of(out: Path) -> Path:
    """The manifest beside OUT."""
    return out.with_name(f"{out.name}.manifest.json")


def write_manifest(out: Path, wish: Wish, finished: Finished, counts: Counts, threshold: float | None) -> Json:
    """Writes beside OUT how its rows were made, and what became of every picture and caption; returns the same.

    Raises:
        UserError: It cannot be written.
    """
    path = manifest_of(out)
    ledger = finished.ledger.source(finished.name)
    said: Json = {
        **wish.about(finished.found),
        "threshold": threshold,
        "pictures": {
            "read": counts.pictures,
            "came_again": counts.again,
            "without_a_caption": counts.without,
            "rejected": ledger.rejected,
            "examples": ledger.examples,
        },
        "captions": {
            "made": counts.made,
            "given": counts.given,
            "kept": counts.kept,
            "languages": dict(counts.languages),
            "dropped": dict(counts.dropped),
        },
    }
    try:
        write_whole(path, (json.dumps(said, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({reason_of(error)}): make room, and run again.") from None
    return said
