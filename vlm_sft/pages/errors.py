"""The page of errors: scores, what is mixed up with what, and every wrong answer with its picture, the surest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.console import make_console, say
from ..base.errors import UserError
from ..base.names import Values
from ..base.whole_files import write_whole
from ..base.words import reason_of
from ..metrics.exact_match import normalise_answer
from ..metrics.intervals import mean_of
from ..reading.images import ImageLike, load_image
from .layout import render
from .pictures import thumbnail
from .records import Entry, Sheet

SHOWN = 2000  # questions on a page
RIGHT = 200  # how many of them are right and changed nothing
PICTURES, BYTES = 600, 12 * 2**20  # pictures of a page, and their bytes together
SIDE = 320
ANSWERS = 8  # rows and columns of a table of what is mixed up
SHORT = 32  # characters of an answer there; the whole stands in its title
SURE, UNSURE = 0.9, 0.5  # probabilities at which the colour of a piece changes
OTHERS = "…"
ORDERS = {
    "reference first": ("reference first", "参考在前"),
    "answer first": ("answer first", "回答在前"),
    "alone": ("alone", "单独"),
}  # of what a judge was shown

Images = Callable[[Entry], Sequence[ImageLike | None]]
"""The images of an entry, each as `load_image` takes it."""


@dataclass(frozen=True)
class KindRow:
    """A kind of questions: how many, mean score with its interval, mean with grey images, mean of the other bundle."""

    name: str
    questions: int
    mean: float
    low: float
    high: float
    blank: float | None
    other: float | None


@dataclass(frozen=True)
class Confusion:
    """Right answers in rows, given ones in columns, how often in cells; `marks` says which cells are right."""

    rows: list[str]
    columns: list[str]
    counts: list[list[int]]
    marks: list[list[bool]]
    most: int


@dataclass
class Shown:
    """An entry on the page, with its pictures: each as a `data:` address, as the number of one shown before, or None
    where it is left out."""

    entry: Entry
    pictures: list[str | int | None] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)


@dataclass
class Drawn:
    """What of the questions the page holds, and sentences on what it leaves out."""

    shown: list[Shown]
    left_out: list[str]


def error_page(
    title: str,
    sheets: Sequence[Sheet],
    other: str = "",
    images: Images | None = None,
    tables: Iterable[Values] = (),
) -> str:
    """The page as text.

    Args:
        title: Name of the bundle.
        sheets: Its benchmarks.
        other: Name of the bundle that they are compared with, or "".
        images: Gives the images of an entry; default the files that it names.
        tables: Further tables, each `{"title", "chinese", "columns", "rows", "notes"}`.
    """
    drawn = draw(sheets, images or files_of)
    return render(
        Path(__file__).with_name("errors.html.jinja"),
        Path(__file__).with_name("errors.js"),
        title=title,
        sheets=sheets,
        other=other,
        tables=list(tables),
        shown=drawn.shown,
        left_out=drawn.left_out,
        kinds={sheet.name: kinds_of(sheet.entries) for sheet in sheets},
        confusions={sheet.name: confusion_of(sheet.entries) for sheet in sheets},
        by_kind={sheet.name: confusions_by_kind(sheet.entries) for sheet in sheets},
        names=sorted({entry.kind for sheet in sheets for entry in sheet.entries if entry.kind}),
        sure_is_known=any(item.entry.sure is not None for item in drawn.shown),
        shade=shade,
        SURE=SURE,
        UNSURE=UNSURE,
        ORDERS=ORDERS,
        SHORT=SHORT,
    )


def write_page(path: Path, title: str, sheets: Sequence[Sheet], other: str, images: Images, **more: Any) -> None:
    """Writes `error_page` to a file and says where.

    Raises:
        UserError: It cannot be written.
    """
    try:
        # What is half a character becomes a question mark: no file can hold it.
        write_whole(path, error_page(title, sheets, other, images, **more).encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({reason_of(error)}): give another --output or make room.") from None
    say(make_console(stderr=False, quiet=False, soft_wrap=True), f"Where it is wrong: {path}.")


def shade(share: float) -> str:
    """The class of a piece of an answer by its probability."""
    return "sure" if share >= SURE else "so" if share >= UNSURE else "unsure"


def kinds_of(entries: Sequence[Entry]) -> list[KindRow]:
    """The kinds of questions, the worst first; none where all are of one."""
    by_kind: dict[str, list[Entry]] = {}
    for entry in entries:
        by_kind.setdefault(entry.kind, []).append(entry)
    rows = []
    for kind, own in by_kind.items():
        scores = [entry.score for entry in own if entry.score is not None]
        low, high = mean_of(scores).interval() if scores else (0.0, 0.0)
        blank = [entry.score_blank for entry in own if entry.score_blank is not None]
        others = [entry.other.score for entry in own if entry.other is not None and entry.other.score is not None]
        rows.append(KindRow(kind, len(own), _mean(scores) or 0.0, low, high, _mean(blank), _mean(others)))
    return sorted(rows, key=lambda row: row.mean) if len(rows) > 1 else []


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def confusion_of(entries: Sequence[Entry]) -> Confusion | None:
    """What is answered in place of what; None where no right answer comes twice (captions, long answers)."""
    pairs: Counter[tuple[str, str]] = Counter()
    right: set[tuple[str, str]] = set()
    for entry in entries:
        if not entry.answers or entry.error or entry.verdicts:  # an answer that is judged is no one answer
            continue
        wanted = normalise_answer(max(entry.answers, key=lambda text: entry.answers[text]))
        said = wanted if not entry.wrong else normalise_answer(entry.answer)
        pairs[wanted, said] += 1
        if not entry.wrong:
            right.add((wanted, said))
    wanted_counts = Counter[str]()
    for (wanted, _), count in pairs.items():
        wanted_counts[wanted] += count
    often = [answer for answer, count in wanted_counts.most_common(ANSWERS) if count > 1]
    if len(often) < 2:
        return None
    said_counts = Counter[str]()
    for (wanted, said), count in pairs.items():
        if wanted in often:
            said_counts[said] += count
    columns = [*often, *[said for said, _ in said_counts.most_common() if said not in often][: ANSWERS // 2], OTHERS]
    counts = [[0] * len(columns) for _ in often]
    for (wanted, said), count in pairs.items():
        if wanted in often:
            counts[often.index(wanted)][columns.index(said) if said in columns else -1] += count
    if not any(row[-1] for row in counts):
        columns, counts = columns[:-1], [row[:-1] for row in counts]
    marks = [[(wanted, said) in right for said in columns] for wanted in often]
    return Confusion(often, columns, counts, marks, max(max(row) for row in counts))


def confusions_by_kind(entries: Sequence[Entry]) -> dict[str, Confusion]:
    """What is answered in place of what, of each kind of questions for itself; none where all are of one kind."""
    by_kind: dict[str, list[Entry]] = {}
    for entry in entries:
        by_kind.setdefault(entry.kind, []).append(entry)
    found = {kind: confusion_of(own) for kind, own in sorted(by_kind.items())} if len(by_kind) > 1 else {}
    return {kind: confusion for kind, confusion in found.items() if confusion is not None}


def draw(sheets: Sequence[Sheet], images: Images) -> Drawn:
    """Chooses what the page shows: every wrong answer and every change, the surest first, and some that are right."""
    entries = [entry for sheet in sheets for entry in sheet.entries]
    entries.sort(key=lambda entry: -(-1.0 if entry.sure is None else entry.sure))
    telling = [entry for entry in entries if entry.wrong or entry.change or entry.blind]
    others = [entry for entry in entries if not (entry.wrong or entry.change or entry.blind)]
    kept = telling[:SHOWN] + others[: max(min(RIGHT, SHOWN - len(telling)), 0)]
    left_out = []
    if (missing := len(telling) - SHOWN) > 0:
        left_out.append(f"{missing:,} more wrong or changed answers, of which the model was less sure.")
    if (missing := len(others) - (len(kept) - min(len(telling), SHOWN))) > 0:
        left_out.append(f"{missing:,} right answers.")
    shown, skipped, gone = _with_pictures(kept, images)
    if skipped:
        left_out.append(f"{skipped:,} pictures: a page holds {PICTURES:,}, and {BYTES // 2**20} MB of them.")
    if gone:
        left_out.append(f"{gone:,} pictures that cannot be read any more.")
    return Drawn(shown, left_out)


def _with_pictures(entries: Sequence[Entry], images: Images) -> tuple[list[Shown], int, int]:
    """Entries with their pictures, each picture once; how many found no room, and how many cannot be read."""
    numbers: dict[str, int | None] = {}
    size = skipped = gone = 0
    shown = []
    for entry in entries:
        item = Shown(entry)
        for name, image in zip(entry.images, images(entry), strict=False):
            number: int | None = None
            if name in numbers:
                number = numbers[name]
                item.pictures.append(number)
            elif sum(found is not None for found in numbers.values()) >= PICTURES or size >= BYTES:
                skipped += 1
                item.pictures.append(None)
            else:
                address = _address(image, entry.id)
                gone += address is None
                number = None if address is None else len(numbers)
                numbers[name] = number
                size += len(address or "")
                item.pictures.append(address)
            item.numbers.append(-1 if number is None else number)
        shown.append(item)
    return shown, skipped, gone


def _address(image: ImageLike | None, where: str) -> str | None:
    if image is None:
        return None
    try:
        return thumbnail(load_image(image, where=where), side=SIDE).data_uri
    except UserError:
        return None


def files_of(entry: Entry) -> Sequence[ImageLike | None]:
    """The files that an entry names; None for a picture that lies inside a table."""
    return [None if name.startswith("sha256:") else {"path": name, "bytes": None} for name in entry.images]
