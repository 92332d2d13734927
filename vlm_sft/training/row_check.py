"""The rows of one source before the first step: every file looked for, rows measured, a sample of images decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..base.errors import RowError
from ..data.image_files import missing_images
from ..data.ledger import EXAMPLES, SourceLedger
from ..reading.images import load_image

if TYPE_CHECKING:
    from datasets import Dataset

    from ..batch.collator import MultimodalCollator

CHUNK = 256  # rows measured at a time
WORTH_WORKERS = 4 * CHUNK  # starting workers takes longer than measuring fewer rows
BINS = 32


class Rejected(NamedTuple):
    """A row that cannot be trained on: its number among the rows, the reason to count by, and the sentence."""

    number: int
    reason: str
    sentence: str


@dataclass
class Findings:
    """What was found out about the rows of a source; plain, so that one process can tell the others.

    Attributes:
        rows: How many rows the source gives.
        measured: How many of them were measured.
        decoded: How many of these had their images decoded.
        lengths: Tokens of each measured row that can be trained on.
        turns: Turns that it lost to fit, for each of these rows.
        rejected: Rows that cannot be trained on, in order. Beyond a few of a reason the sentence is "".
    """

    rows: int = 0
    measured: int = 0
    decoded: int = 0
    lengths: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

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
    workers: int = 0,
    tick: Callable[..., None] = lambda *how_far: None,
) -> Findings:
    """Looks for the image files of all rows, measures rows and decodes images; nothing is raised for a wrong row.

    Args:
        rows: Rows `{"messages", "images", "source", "id"}` of one source, as `load_source` gives them.
        collator: Its `encode` measures; with images it is asked for the rows to be decoded.
        measure: How many rows to measure, drawn evenly and seeded; None for all.
        decode: How many of the measured rows have their images decoded; None for all.
        seed: Draws the sample.
        workers: Processes that share the work; 0 for this one alone.
        tick: Told now and then what is done, how many times, of how many, and what: ``measured``, 256, 8000, ``rows``.
    """
    picked = _sample(len(rows), measure, seed)
    decoded = picked[_sample(len(picked), decode, seed + 1)]
    findings = Findings(len(rows), len(picked), len(decoded))
    found = dict(_without_files(rows, tick))
    for number, length, turns, problem in _measured(rows, picked, set(decoded.tolist()), collator, workers, tick):
        if number in found:
            continue
        if problem is not None:
            found[number] = problem
        else:
            findings.lengths.append(length)
            findings.turns.append(turns)
    kept: dict[str, int] = {}
    for number in sorted(found):
        reason, sentence = found[number]
        kept[reason] = kept.get(reason, 0) + 1
        findings.rejected.append(Rejected(number, reason, sentence if kept[reason] <= EXAMPLES else ""))
    return findings


def summary(parts: Sequence[Findings], rows: int) -> dict[str, Any]:
    """What `bundle.json` says about the rows of a set.

    Args:
        parts: What was found out about each source.
        rows: Rows of the mixture.

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


def _sample(size: int, count: int | None, seed: int) -> np.ndarray:
    """Numbers below `size` in order: all, or one at random out of each of `count` equal stretches."""
    if count is None or count >= size:
        return np.arange(size)
    borders = np.linspace(0, size, count + 1).astype(np.int64)
    return np.random.default_rng([seed % 2**32, size]).integers(borders[:-1], borders[1:]) if count else borders[:0]


def _without_files(rows: Dataset, tick: Callable[..., None]) -> list[tuple[int, tuple[str, str]]]:
    """(number, (reason, sentence)) of the rows with an image whose file is missing or empty."""
    _, bad = missing_images(rows, lambda done, of: tick("looked for", done, of, "images"))
    found = []
    if bad:
        for number, images in enumerate(rows.select_columns(["images", "id"])):
            for image in images["images"]:
                if image["bytes"] is None and image["path"] in bad:
                    try:
                        load_image(image, where=f"row {images['id']}")
                    except RowError as error:
                        found.append((number, (error.reason, str(error))))
                        break
    return found


class _Picked:
    """Some rows of a dataset with their numbers and whether to decode their images, for a `DataLoader`."""

    def __init__(self, rows: Dataset, picked: np.ndarray, decoded: set[int]) -> None:
        self.rows, self.picked, self.decoded = rows, picked, decoded

    def __len__(self) -> int:
        return len(self.picked)

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any], bool]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, dict[str, Any], bool]]:
        numbers = self.picked[indices].tolist()
        rows = self.rows.__getitems__(numbers)
        return [(number, row, number in self.decoded) for number, row in zip(numbers, rows, strict=True)]


_Measure = tuple[int, int, int, tuple[str, str] | None]


def _measured(
    rows: Dataset,
    picked: np.ndarray,
    decoded: set[int],
    collator: MultimodalCollator,
    workers: int,
    tick: Callable[..., None],
) -> list[_Measure]:
    """(number, tokens, turns lost, reason and sentence where it is rejected) of each picked row."""
    import torch
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(
        _Picked(rows, picked, decoded),  # type: ignore[arg-type]
        batch_size=CHUNK,
        collate_fn=partial(_measure, collator),
        num_workers=workers if len(picked) > WORTH_WORKERS else 0,
        generator=torch.Generator(),  # the global one must not depend on whether rows were measured
    )
    done: list[_Measure] = []
    for part in loader:
        done += part
        tick("measured", len(done), len(picked), "rows")
    return done


def _measure(collator: MultimodalCollator, rows: Sequence[tuple[int, dict[str, Any], bool]]) -> list[_Measure]:
    measures: list[_Measure] = []
    for number, row, decode in rows:
        try:
            sample = collator.encode(row, with_images=decode)
        except RowError as error:
            measures.append((number, 0, 0, (error.reason, str(error))))
        else:
            measures.append((number, len(sample.chat.input_ids), sample.turns_lost, None))
    return measures
