"""What is in the rows of sources, in numbers: `vlm-sft data stats`."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import RowError
from ..base.names import ImageEntry, Json, Row
from ..base.words import language_of
from ..data.look_alikes import LookAlikes
from ..reading.image_refs import TIME, image_key, is_url
from ..reading.images import image_size
from ..reading.video import Films
from ..rows.messages import answers_of, row_key

if TYPE_CHECKING:
    from rich.table import Table

COMMONEST = 5
OPENED = 2000  # images of which the size is looked up; reading headers of a million takes hours on a network disk


@dataclass
class DataStats:
    """Counts over rows; `add` takes one at a time and keeps no text but answers, so memory grows by bytes a row.

    Attributes:
        rows: Rows by source.
        text_only: Rows without an image.
        images: Images, each time that one is used; frames of videos are images.
        frames: Of these, frames of videos.
        images_in_a_row: Number of images → rows.
        languages: Language → answers, as `words.language_of` tells it.
        answers: Hash of an answer → how often it is given.
        repeated_rows: Rows whose text and images came before.
        sizes: (width, height) of the first `OPENED` different images.
        unreadable: Ids of rows with an image among those that cannot be opened.
        look_alikes: Images that look like others; None where nobody looked.
    """

    rows: Counter[str] = field(default_factory=Counter)
    text_only: int = 0
    images: int = 0
    frames: int = 0
    images_in_a_row: Counter[int] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    repeated_rows: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    look_alikes: LookAlikes | None = None
    _lengths: array[int] = field(default_factory=lambda: array("l"))
    _turns: array[int] = field(default_factory=lambda: array("l"))
    _rows_seen: set[bytes] = field(default_factory=set)
    _images_seen: set[bytes] = field(default_factory=set)
    _videos_seen: set[bytes] = field(default_factory=set)

    def add(self, row: Row) -> None:
        """Counts a row `{"messages", "images", "source", "id"}`."""
        self.rows[row["source"]] += 1
        self.images_in_a_row[len(row["images"])] += 1
        self.images += len(row["images"])
        self.text_only += not row["images"]
        frames = [image for image in row["images"] if TIME in image]
        self.frames += len(frames)
        self._videos_seen |= {image_key({**image, TIME: 0}) for image in frames}
        answers = answers_of(row)
        self._turns.append(len(answers))
        for answer in answers:
            self.languages[language_of(answer)] += 1
            self.answers[answer] += 1
            self._lengths.append(len(answer))
        self.repeated_rows += (whole := row_key(row)) in self._rows_seen
        self._rows_seen.add(whole)
        with Films() as films:
            for image in row["images"]:
                if (key := image_key(image)) not in self._images_seen:
                    self._images_seen.add(key)
                    self._look_at(image, row["id"], films)

    def _look_at(self, image: ImageEntry, row: str, films: Films) -> None:
        if len(self.sizes) + len(self.unreadable) >= OPENED or (image["bytes"] is None and is_url(image["path"])):
            return
        try:
            self.sizes.append(image_size(image, where=row, films=films))
        except RowError:
            self.unreadable.append(row)

    def as_dict(self) -> Json:
        """All numbers, ready for JSON."""
        total = self.rows.total()
        return {
            "rows": total,
            "rows_by_source": dict(self.rows),
            "text_only": self.text_only,
            "repeated_rows": self.repeated_rows,
            "images": self.images,
            "different_images": len(self._images_seen),
            "frames": self.frames,
            "different_videos": len(self._videos_seen),
            "images_in_a_row": {str(n): rows for n, rows in sorted(self.images_in_a_row.items())},
            "image_width": spread([width for width, _ in self.sizes]),
            "image_height": spread([height for _, height in self.sizes]),
            "images_opened": len(self.sizes) + len(self.unreadable),
            "unreadable": self.unreadable,
            "look_alikes": None if self.look_alikes is None else self.look_alikes.as_dict(),
            "answers": self.answers.total(),
            "different_answers": len(self.answers),
            "answers_in_a_row": spread(self._turns),
            "answer_length": spread(self._lengths),
            "languages": dict(self.languages.most_common()),
            "commonest_answers": dict(self.answers.most_common(COMMONEST)),
        }


def spread(values: Sequence[int]) -> dict[str, float]:
    """Smallest, median, 95 % and largest of numbers; nothing of none."""
    if not len(values):
        return {}
    low, middle, high, top = np.percentile(np.asarray(values), (0, 50, 95, 100))
    return {"min": float(low), "median": float(middle), "p95": float(high), "max": float(top)}


def stats_table(found: Json) -> Table:
    """`DataStats.as_dict()` for a person."""
    from rich.table import Table
    from rich.text import Text

    rows, answers = found["rows"], found["answers"]
    table = Table(title=f"{rows:,} rows", title_justify="left", show_header=False)
    for source, count in found["rows_by_source"].items():
        table.add_row(Text(f"from {source}"), _share(count, rows))
    table.add_row("without an image", _share(found["text_only"], rows))
    table.add_row("repeated, word for word", _share(found["repeated_rows"], rows))
    table.add_row("images", f"{found['images']:,}, {found['different_images']:,} of them different")
    if found["frames"]:
        table.add_row("of these, frames of videos", f"{found['frames']:,}, of {found['different_videos']:,} videos")
    table.add_row("images in a row", ", ".join(f"{n}: {_share(k, rows)}" for n, k in found["images_in_a_row"].items()))
    if found["image_width"]:
        looked = f"of {found['images_opened']:,} opened"
        table.add_row(f"width in pixels, {looked}", _line(found["image_width"]))
        table.add_row(f"height in pixels, {looked}", _line(found["image_height"]))
    if found["unreadable"]:
        unreadable = f"{len(found['unreadable']):,}, the first in {found['unreadable'][0]}"
        table.add_row("images that cannot be opened", Text(unreadable, "red"))
    if found["look_alikes"]:
        _add_look_alikes(table, found["look_alikes"])
    table.add_row("answers", f"{answers:,}, {found['different_answers']:,} of them different")
    table.add_row("answers in a row", _line(found["answers_in_a_row"]))
    table.add_row("characters of an answer", _line(found["answer_length"]))
    table.add_row("languages", ", ".join(f"{name}: {_share(n, answers)}" for name, n in found["languages"].items()))
    for answer, count in found["commonest_answers"].items():
        shown = answer if len(answer) <= 40 else f"{answer[:39]}…"
        table.add_row(Text(f"answer {shown!r}"), _share(count, answers))
    return table


def _add_look_alikes(table: Table, found: Json) -> None:
    """Rows on `LookAlikes.as_dict()`: how many images look like others, and the first pairs."""
    from rich.text import Text

    looked = found["looked_at"]
    alike = f"{_share(found['train_like_train'], looked['train'])} of {looked['train']:,} looked at"
    table.add_row("images that look like another", alike)
    if not looked["held_out"]:
        return
    theirs = f"{_share(found['held_out_found'], looked['held_out'])} held-out images"
    table.add_row("that look like held-out ones", f"{_share(found['train_like_held_out'], looked['train'])}, {theirs}")
    for each in found["between"]:
        table.add_row(Text(f"from {each['train']} in {each['held_out']}"), f"{each['images']:,}")
    for pair in found["pairs"][:COMMONEST]:
        places = (f"{p['row']} ({p['path']})" if p["path"] else p["row"] for p in (pair["train"], pair["held_out"]))
        table.add_row(f"{pair['likeness']:.2f}{' mirrored' if pair['mirrored'] else ''}", Text(" ≈ ".join(places)))


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / max(whole, 1):.1%})"


def _line(values: dict[str, float]) -> str:
    return f"{values['min']:g} – {values['max']:g}, median {values['median']:g}, 95 % up to {values['p95']:g}"
