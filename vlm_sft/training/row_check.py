"""The rows of one source before the first step: every file looked for, rows measured, a sample of images decoded."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..base.errors import RowError, UserError
from ..base.interrupts import workers_end_with_errors
from ..base.names import Json, Row
from ..base.words import counted
from ..batch.encoding import rendered_ahead
from ..batch.pictures import is_odd
from ..cache import lengths
from ..data.image_files import missing_images
from ..data.ledger import EXAMPLES, SourceLedger
from ..reading.images import load_image

if TYPE_CHECKING:
    from datasets import Dataset

    from ..batch.collator import MultimodalCollator

CHUNK = 128  # rows measured at a time
ROWS_WORTH_A_WORKER = 512  # of fewer, a worker that is forked takes longer to start than to measure
ROWS_WORTH_A_START = 50_000  # one that is not forked loads torch and transformers first
MOST_WORKERS = 16
BINS = 32


class Rejected(NamedTuple):
    """A row that cannot be trained on: its number among the rows, the reason to count by, and the sentence."""

    number: int
    reason: str
    sentence: str


@dataclass
class Findings:
    """What was found out about rows of a source; plain, so that one process can tell the others.

    Attributes:
        rows: How many rows these are.
        measured: How many of them were measured.
        decoded: How many of these had their images decoded.
        lengths: Tokens of each measured row that can be trained on.
        turns: Turns that it lost to fit, for each of these rows.
        rejected: Rows that cannot be trained on, in order. Beyond a few of a reason the sentence is "".
        fronts: How many of its tokens there are up to the end of its last image, for each row that has a length.
    """

    rows: int = 0
    measured: int = 0
    decoded: int = 0
    lengths: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    fronts: list[int] = field(default_factory=list, compare=False)

    @classmethod
    def of_shares(cls, shares: Sequence[Findings]) -> Findings:
        """What is known of a source whose rows were shared, as if all had been looked over at once.

        Args:
            shares: What `look_over` found out about each share, in order.
        """
        whole = cls()
        for share in shares:
            whole.rows += share.rows
            whole.measured += share.measured
            whole.decoded += share.decoded
            whole.lengths += share.lengths
            whole.turns += share.turns
            whole.fronts += share.fronts
            whole.rejected += share.rejected
        whole.rejected = _with_few_sentences(whole.rejected)
        return whole

    def write_to(self, ledger: SourceLedger) -> None:
        """Adds these rows to a source's ledger."""
        ledger.read += self.rows
        ledger.measured += self.measured
        ledger.truncated += sum(turns > 0 for turns in self.turns)
        ledger.turns_lost += sum(self.turns)
        ledger.found += len(self.rejected)
        for row in self.rejected:
            ledger.reject(row.reason, row.sentence)


def look_over(
    rows: Dataset,
    collator: MultimodalCollator,
    *,
    measure: int | None = None,
    decode: int | None = 0,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
    cores: int = 1,
    tick: Callable[[str, int, int, str], None] = lambda doing, done, of, what: None,
) -> Findings:
    """Looks for the image files of all rows, measures rows and decodes images; nothing is raised for a wrong row.

    Args:
        rows: Rows `{"messages", "images", "source", "id"}` of one source, as `load_source` gives them.
        collator: Its `encode` measures; with images it is asked for the rows to be decoded.
        measure: How many rows to measure, drawn evenly and seeded; None for all.
        decode: How many of the measured rows have their images decoded; None for all.
        seed: Draws the sample.
        share: k and K: the k-th of K stretches is looked over, of the rows that one process would look over.
        cores: How many may be used.
        tick: Told now and then what is done, how many times, of how many, and what: ``measured``, 256, 8000, ``rows``.

    Raises:
        UserError: Something is wrong that is not the row's own fault; that of the first such row.
    """
    picked = _sample(len(rows), measure, seed)
    decoded = picked[_sample(len(picked), decode, seed + 1)]
    start, end = (len(rows) * k // share[1] for k in (share[0], share[0] + 1))
    picked, decoded = (numbers[(numbers >= start) & (numbers < end)] for numbers in (picked, decoded))
    findings = Findings(end - start, len(picked), len(decoded))
    found = dict(_without_files(rows, start, end, tick))
    place = lengths.place_of(rows, picked, collator) if measure is None else None
    for measured in _measured_or_kept(place, rows, picked, decoded, collator, cores, tick):
        if measured.number in found:
            continue
        if measured.problem is not None:
            found[measured.number] = measured.problem
        else:
            findings.lengths.append(measured.tokens)
            findings.turns.append(measured.turns_lost)
            findings.fronts.append(measured.front)
    findings.rejected = _with_few_sentences([Rejected(number, *found[number]) for number in sorted(found)])
    return findings


def _with_few_sentences(rejected: Iterable[Rejected]) -> list[Rejected]:
    """Rejected rows, of which the first few of each reason keep their sentence: millions may be wrong alike."""
    told: Counter[str] = Counter()
    kept = []
    for row in rejected:
        told[row.reason] += 1
        kept.append(row if told[row.reason] <= EXAMPLES else row._replace(sentence=""))
    return kept


def summary(parts: Sequence[Findings], rows: int) -> Json:
    """What `bundle.json` says about the rows of a set.

    Returns:
        `rows` of the mixture, `read` from the sources, of these `measured` and `decoded`; of the measured ones
        `longest` and `mean_length` in tokens, `rows_shortened` and `turns_lost` to fit `max_length`, and `histogram`:
        `edges` of bins in tokens, `counts` of rows between them.
    """
    lengths = np.array([length for part in parts for length in part.lengths], dtype=np.int64)
    turns = [lost for part in parts for lost in part.turns]
    longest = int(lengths.max(initial=0))
    counts, edges = np.histogram(lengths, bins=min(BINS, longest + 1), range=(0, longest + 1))
    return {
        "rows": rows,
        "read": sum(part.rows for part in parts),
        "measured": sum(part.measured for part in parts),
        "decoded": sum(part.decoded for part in parts),
        "longest": longest,
        "mean_length": round(float(lengths.mean()), 1) if len(lengths) else 0.0,
        "rows_shortened": sum(lost > 0 for lost in turns),
        "turns_lost": sum(turns),
        "histogram": {"edges": [round(edge, 2) for edge in edges.tolist()], "counts": counts.tolist()},
    }


def describe_rows(counts: Json) -> str:
    """One sentence on the rows of a set."""
    rows = counted(counts["read"] if counts["rows"] is None else counts["rows"], "row")
    if counts["measured"] < counts["read"]:
        rows += f" (measured: a sample of {counts['measured']:,}, see data.measure_rows)"
    lost = f"; {counts['rows_shortened']:,} rows lost {counts['turns_lost']:,} turns to fit max_length"
    return (
        f"{rows}, {counts['mean_length']:g} tokens in the mean, {counts['longest']:,} at most"
        f"{lost if counts['turns_lost'] else ''}."
    )


def _sample(size: int, count: int | None, seed: int) -> np.ndarray:
    """Numbers below `size` in order: all, or one at random out of each of `count` equal stretches."""
    if count is None or count >= size:
        return np.arange(size)
    borders = np.linspace(0, size, count + 1).astype(np.int64)
    return np.random.default_rng([seed % 2**32, size]).integers(borders[:-1], borders[1:]) if count else borders[:0]


def _without_files(
    rows: Dataset, start: int, end: int, tick: Callable[[str, int, int, str], None]
) -> Iterator[tuple[int, tuple[str, str]]]:
    """(number, (reason, sentence)) of the rows from `start` to `end` with an image that is missing or empty."""
    if end - start < len(rows):
        rows = rows.select(range(start, end))
    _, bad = missing_images(rows, lambda done, of: tick("looked for", done, of, "images"))
    for number, row in enumerate(rows.select_columns(["images", "id"]) if bad else (), start=start):
        try:
            for image in row["images"]:
                if image["bytes"] is None and image["path"] in bad:
                    load_image(image, where=f"row {row['id']}")
        except RowError as error:
            yield number, (error.reason, str(error))


class _Picked:
    """Some rows of a dataset with their numbers and whether to decode their images, for a `DataLoader`."""

    def __init__(self, rows: Dataset, picked: np.ndarray, decoded: set[int]) -> None:
        self.rows, self.picked, self.decoded = rows, picked, decoded

    def __len__(self) -> int:
        return len(self.picked)

    def __getitem__(self, index: int) -> tuple[int, Row, bool]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Row, bool]]:
        numbers = self.picked[indices].tolist()
        rows = self.rows.__getitems__(numbers)
        return [(number, row, number in self.decoded) for number, row in zip(numbers, rows, strict=True)]


class _Measured(NamedTuple):
    """A row by its number: its tokens, the turns it lost and where its images end, or why it is rejected."""

    number: int
    tokens: int = 0
    turns_lost: int = 0
    front: int = 0
    problem: tuple[str, str] | None = None


def _measured_or_kept(
    place: Path | None,
    rows: Dataset,
    picked: np.ndarray,
    decoded: np.ndarray,
    collator: MultimodalCollator,
    cores: int,
    tick: Callable[[str, int, int, str], None],
) -> list[_Measured]:
    """As `_measured`; of rows whose lengths are kept at a place, those alone are looked at whose images are decoded."""
    kept = lengths.load(place) if place else None
    seen = set(decoded.tolist())
    fresh = _measured(rows, decoded if kept else picked, seen, collator, cores, tick)
    if kept:
        again = {each.number: each for each in fresh}
        known = zip(picked.tolist(), kept, strict=True)
        return [again.get(number) or _Measured(number, *own[:3], _problem(*own[3:])) for number, own in known]
    # What is wrong with a picture may be mended in its file, and is no matter of lengths.
    if place and not any(each.problem for each in fresh if each.number in seen):
        lengths.save(place, [(*each[1:4], *(each.problem or (None, None))) for each in fresh])
    return fresh


def _problem(reason: str | None, sentence: str | None) -> tuple[str, str] | None:
    return None if reason is None or sentence is None else (reason, sentence)


@workers_end_with_errors()
def _measured(
    rows: Dataset,
    picked: np.ndarray,
    decoded: set[int],
    collator: MultimodalCollator,
    cores: int,
    tick: Callable[[str, int, int, str], None],
) -> list[_Measured]:
    """The measure of each picked row, in order."""
    import torch
    from torch.utils.data import DataLoader

    workers = min(cores, len(picked) // ROWS_WORTH_A_WORKER, MOST_WORKERS)
    # Asking settles the method for the process, so it is asked only where it matters.
    if workers > 1 and multiprocessing.get_start_method() != "fork":
        workers = min(workers, len(picked) // ROWS_WORTH_A_START)
    loader: DataLoader[Any] = DataLoader(
        _Picked(rows, picked, decoded),  # type: ignore[arg-type]
        batch_size=CHUNK,
        collate_fn=partial(_measure, collator),
        num_workers=workers if workers > 1 else 0,
        generator=torch.Generator(),  # the global one must not depend on whether rows were measured
    )
    done: list[_Measured] = []
    for part in loader:
        for each in part:
            if isinstance(each, UserError):
                raise each
            done.append(each)
        tick("measured", len(done), len(picked), "rows")
    return done


def _measure(collator: MultimodalCollator, rows: Sequence[tuple[int, Row, bool]]) -> list[_Measured | UserError]:
    """Measures rows up to the first one with an error that is not its own.

    That is returned, because a `DataLoader` puts the worker's traceback into what it raises.
    """
    measures: list[_Measured | UserError] = []
    for (number, _, decode), row in zip(rows, rendered_ahead(collator, (row for _, row, _ in rows)), strict=True):
        try:
            sample = collator.sample(row, with_images=decode)
            if any(map(is_odd, sample.images)):  # a picture of a usual shape is taken, and reading it takes long
                collator.check(sample)
        except RowError as error:
            measures.append(_Measured(number, problem=(error.reason, str(error))))
        except UserError as error:
            return [*measures, UserError(str(error))]
        else:
            tokens, places = len(sample.chat.input_ids), sample.chat.places
            front = tokens - places[::-1].index(1) if 1 in places else 0
            measures.append(_Measured(number, tokens, sample.turns_lost, front))
    return measures
