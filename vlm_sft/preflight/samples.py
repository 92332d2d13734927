"""Rows before training: a part of the mixture, their lengths, what the tokenizer makes of them, some samples."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

from ..base.errors import RowError
from ..base.names import IGNORED, Row
from ..base.progress import steps
from ..base.words import language_of
from ..batch.box_text import file_size, write_boxes
from ..batch.encoding import rendered_ahead
from ..batch.token_view import TokenGroup, token_groups
from ..batch.tokenizer_coverage import coverage_of
from ..data.image_files import shared_images
from ..data.mixture import SHARES
from ..data.streaming import first_rows
from ..pages.pictures import Picture, thumbnail
from ..rows.box import to_unit
from ..rows.boxes import AS_WRITTEN
from ..rows.messages import answers_of, unpacked
from .checks import Evidence, Finding, check

if TYPE_CHECKING:
    from datasets import IterableDataset

    from ..batch.collator import MultimodalCollator
    from ..batch.processor import VLMProcessor
    from ..data.ledger import Ledger
    from ..recipe.sections import Data, Source

LOOKED_AT = 20_000  # rows whose text is read
GLANCED_AT = 1_000  # rows whose text is read at the start of a training
MEASURED = 2_000  # of these, rows whose whole length is counted, and answers given to the tokenizer
SHOWN = 8  # samples that are shown


@dataclass(frozen=True)
class Shown:
    """A sample as the page shows it.

    Attributes:
        id: The row's id.
        source: Its source.
        tokens: How many it has.
        learned: How many of them are in the loss.
        turns_lost: Turns it lost to fit.
        images: Its images, small.
        groups: Its tokens, as they are shown.
        problem: Why it cannot be trained on, or "".
        questions: How many questions share its images, of which none sees another; 0 where none are shared.
        prefix: Tokens that these share.
    """

    id: str
    source: str
    tokens: int = 0
    learned: int = 0
    turns_lost: int = 0
    images: list[Picture] = field(default_factory=list)
    groups: list[TokenGroup] = field(default_factory=list)
    problem: str = ""
    questions: int = 0
    prefix: int = 0


@dataclass(frozen=True)
class Share:
    """A source or a language in the mixture: its share as planned and as drawn, and how many rows were drawn."""

    name: str
    planned: float | None
    drawn: float
    rows: int


def sample_rows(rows: Dataset | IterableDataset, count: int = LOOKED_AT) -> list[Row]:
    """Different rows of a mixture, evenly spread; of a stream, the first ones.

    Args:
        rows: What `load_rows` gave; a row that the mixture repeats is there once.
        count: How many at most.
    """
    if not isinstance(rows, Dataset):
        return _once(first_rows(rows, count))
    places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64))
    return _once(rows.select(places))


def _once(rows: Iterable[Row]) -> list[Row]:
    return list({row["id"]: unpacked(row) for row in steps(rows, "read", "rows")}.values())


def look_at(
    evidence: Evidence,
    collator: MultimodalCollator,
    train: Dataset | IterableDataset,
    held_out: Iterable[Dataset],
    sources: Sequence[Source] = (),
) -> None:
    """Fills in what rows tell: texts, coverage, leaks between the training rows and each data set held out."""
    processor = collator.processor
    read_texts(evidence, processor, sample_rows(train), sources)
    others = [row for rows in held_out for row in rows.select_columns(["images", "id"])]
    if others:
        every = train.select_columns(["images", "id"]) if isinstance(train, Dataset) else evidence.rows
        evidence.leaks = shared_images(every, others)


def read_texts(evidence: Evidence, processor: VLMProcessor, rows: list[Row], sources: Sequence[Source] = ()) -> None:
    """Fills in what the texts of some rows tell; `sources` are theirs."""
    evidence.box_notation = processor.box_notation
    evidence.as_written = frozenset(str(source.name) for source in sources if source.boxes == AS_WRITTEN)
    evidence.template, evidence.ends_with = str(processor.chat_template), processor.end_of_answer.strip(" ")
    evidence.rows = rows
    some = steps(evenly(rows, MEASURED), "shown to the tokenizer", "rows", min(len(rows), MEASURED))
    answers = (text for row in some for text in answers_of(row))
    evidence.coverage = coverage_of(answers, processor.tokenizer) if processor.cuts_answers else {}


def glance(train: Dataset | IterableDataset, processor: VLMProcessor, sources: Sequence[Source] = ()) -> list[Finding]:
    """What the texts of a few rows tell: the part of preflight that every training begins with.

    Args:
        train: Training rows; of a stream nothing is read.
        processor: A `VLMProcessor`.
        sources: Of the training rows.
    """
    evidence = Evidence()
    if isinstance(train, Dataset):
        read_texts(evidence, processor, sample_rows(train, GLANCED_AT), sources)
    return check(evidence)


def evenly(rows: Sequence[Row], count: int) -> Iterator[Row]:
    """So many rows from everywhere, the same each time; even steps would show one kind of rows that take turns."""
    places = random.Random(0).sample(range(len(rows)), min(count, len(rows)))
    return (rows[place] for place in sorted(places))


def whole_lengths(rows: Sequence[Row], collator: MultimodalCollator) -> list[int]:
    """Tokens of rows as they would be if nothing were cut."""
    whole = copy.copy(collator)
    whole.max_length = None
    lengths = []
    for row in steps(rendered_ahead(whole, evenly(rows, MEASURED)), "measured", "rows", min(len(rows), MEASURED)):
        try:
            lengths.append(len(whole.encode(row, with_images=False).chat.input_ids))
        except RowError:
            continue  # the ledger has this row
    return lengths


def show_samples(rows: Sequence[Row], collator: MultimodalCollator, count: int = SHOWN) -> list[Shown]:
    """Some rows, of each source in turn, as the collator makes samples of them."""
    by_source: dict[str, list[Row]] = {}
    for row in rows:
        by_source.setdefault(row["source"], []).append(row)
    each = -(-count // max(len(by_source), 1))
    picked = [row for own in by_source.values() for row in evenly(own, each)]
    return [show(row, collator) for row in steps(picked[:count], "shown", "rows")]


def show(row: Row, collator: MultimodalCollator) -> Shown:
    """One row as a sample, with its tokens and small images."""
    row, where = unpacked(row), f"row {row['id']}"
    try:
        sample = collator.sample(row)  # questions that share an image are one, and see it and themselves alone
        messages = write_boxes(collator.processor, row["messages"], row["images"], where, collator.fetch)
        boxes = boxes_on(row, where, collator.fetch)
    except RowError as error:
        return Shown(row["id"], row["source"], problem=str(error))
    labels = sample.chat.labels
    return Shown(
        row["id"],
        row["source"],
        tokens=len(labels),
        learned=sum(label != IGNORED for label in labels),
        turns_lost=sample.turns_lost,
        images=[thumbnail(image, boxes.get(number, ())) for number, image in enumerate(sample.images)],
        groups=token_groups(sample, messages, collator.processor),
        questions=max(len(sample.chat.heads) - 1, 0),
        prefix=sample.chat.lengths[0] if sample.chat.heads else 0,
    )


def boxes_on(
    row: Row, where: str, fetch: Callable[[str], str] | None = None
) -> dict[int, list[tuple[list[float], str, str]]]:
    """The boxes of a row by the number of their image: in 0 to 1 of it, with their words and what the row says of them.

    Args:
        row: With its `extras` where they belong.
        where: It in words.
        fetch: See `load_image`.
    """
    found: dict[int, list[tuple[list[float], str, str]]] = {}
    for message in row["messages"]:
        label = ""
        for part in message["content"]:
            if part["type"] == "box":
                box = to_unit(part, file_size(row["images"][part["image"]], where, fetch), where)
                title = f"{part['key']}: {part['box']} ({part['scale']})"
                found.setdefault(part["image"], []).append((box, label, title))
            else:
                label = part["text"] if part["type"] == "ref" else ""
    return found


def shares_of_sources(data: Data, ledger: Ledger, rows: Sequence[Row]) -> list[Share]:
    """Each source as `data.sampling` plans it and as it was drawn.

    Args:
        data: The recipe's `data`; with `languages` a source's share follows from theirs, and nothing is planned.
        ledger: Of the training rows.
        rows: What was looked at: of a stream, what was drawn of it.
    """
    names = [str(source.name) for source in data.train]
    if data.streaming:
        drawn = Counter(row["source"] for row in rows)
        weights = [source.weight for source in data.train]
    else:
        entries = {name: ledger.source(name) for name in names}
        drawn = Counter({name: entry.used + entry.repeated for name, entry in entries.items()})
        sizes = [(ledger.source(s.name or "").read - ledger.source(s.name or "").lost) * s.repeat for s in data.train]
        f = SHARES[data.sampling]
        weights = [source.weight * f(size) for source, size in zip(data.train, sizes, strict=True)]
    planned = [None if data.languages else weight / max(sum(weights), 1e-9) for weight in weights]
    return [
        Share(name, share, drawn[name] / max(drawn.total(), 1), drawn[name])
        for name, share in zip(names, planned, strict=True)
    ]


def shares_of_languages(data: Data, rows: Sequence[Row]) -> list[Share]:
    """Each language as `data.languages` plans it and as the answers that were looked at have it."""
    drawn = Counter(language_of("".join(answers_of(row))) for row in rows)
    planned = {name: share / sum(data.languages.values()) for name, share in data.languages.items()}
    return [
        Share(name, planned.get(name), drawn[name] / max(drawn.total(), 1), drawn[name])
        for name in sorted({*drawn, *planned})
    ]
