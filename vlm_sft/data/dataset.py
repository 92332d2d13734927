"""Sources → one dataset of rows ``{"messages", "images", "source", "id"}``, the contract of everything behind it.

Rows know messages, not tokens, and images stay paths or encoded bytes until a data-loader worker decodes them.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher

from ..base.errors import RowError, UserError, raise_it
from ..base.interrupts import shield_worker, workers_end_with_errors
from ..base.names import Row
from ..base.processes import cores_for_each
from ..reading.locations import text_files
from ..rows.merging import merge_key, merged
from ..rows.messages import IN_EXTRAS, each_once, packed, unpacked
from .mixture import SHARES, order_of
from .row_cache import LANGUAGE, Keeper, keeper_of
from .source import blocks_of, check_source, name_of, numbered_rows, rows_with_language

if TYPE_CHECKING:
    from ..recipe.sections import Source

# Stated, not inferred: the first rows may all lack an image, a path or bytes.
ROW_FEATURES = Features(
    {
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List({"path": Value("string"), "bytes": Value("binary")}),
        "source": Value("string"),
        "id": Value("string"),
    }
)
_CHUNK_ROWS, _CHUNK_BYTES = 1000, 2**28  # an Arrow chunk of `binary` may not pass 2 GiB
ROWS_WORTH_A_WORKER, MOST_WORKERS = 25_000, 16  # fewer rows are read before a second process has begun
MOST_HELD = 2**30  # bytes of documents whose rows are held for all processes that read them
DOCUMENT = ".json"


def load_source(source: Source, *, seed: int = 0, reject: Callable[[RowError], None] = raise_it) -> Dataset:
    """Read one source into memory; its images are named or embedded, never decoded.

    Args:
        source: where the rows lie and what they mean; a `recipe.Source`.
        seed: draws the prompts of captions. The draw of a row depends on seed, source name and row number only.
        reject: told of every row that is wrong by itself, which is then left out; by default it stops the run.

    Returns:
        Rows in the order of the file with the columns ``messages`` (list of ``{"role", "content"}``, content a list of
        ``{"type", "text"}``), ``images`` (list of ``{"path", "bytes"}``, paths absolute), ``source`` and ``id``
        (``source/own id`` or ``source/row number``, with ``#k`` for the k-th caption of a row).

    Raises:
        UserError: the source or a row of it is not what the recipe says.
    """
    return read_source(source, seed=seed, reject=reject).rows


class SourceRows(NamedTuple):
    """The rows of one source, and the language of each where it was asked for."""

    rows: Dataset
    languages: list[str]

    def without(self, rejected: Collection[int]) -> SourceRows:
        """What is left without the rows of these numbers."""
        if not rejected:
            return self
        kept = [number for number in range(len(self.rows)) if number not in rejected]
        return SourceRows(self.rows.select(kept), [self.languages[number] for number in kept] if self.languages else [])


def read_source(
    source: Source,
    *,
    seed: int = 0,
    reject: Callable[[RowError], None] = raise_it,
    languages: bool = False,
    tell: Callable[[int, int | None], None] = lambda done, of: None,
    unused: Callable[[Mapping[str, int]], None] = lambda counts: None,
) -> SourceRows:
    """As `load_source`, with the language of each row if `languages`.

    Args:
        source: as `load_source`, like the others.
        languages: whether the languages are looked for.
        tell: told now and then how many rows were read, and of about how many; None where nobody knows.
        unused: told how many rows have each key that means nothing in the source's format.
    """
    check_source(source)
    keeper = keeper_of(source, seed=seed, languages=languages)
    kept = keeper.load() if keeper is not None else None
    if kept is None:
        rejected: list[RowError] = []
        guesses = (None if keeper is None else keeper.about_rows(), source.max_rows)
        of = min((count for count in guesses if count is not None), default=None)

        def keep_and_reject(error: RowError) -> None:
            rejected.append(error)
            reject(error)

        counts: Counter[str] = Counter()
        workers = 0 if keeper is None or source.max_rows is not None else _workers(keeper, of)
        table = _read(
            source, seed, languages, keep_and_reject, lambda done: tell(done, of), counts.update, workers=workers
        )
        unused(counts)
        kept = keeper.save(table, rejected, counts) if keeper is not None else None
    else:
        unused(kept.unused)
        for error in kept.rejected:
            reject(error)
    if kept is not None:
        rows = kept.rows
    else:
        # Given here because the default hashes the whole table.
        fingerprint = Hasher.hash([name_of(source), source.path, source.format, seed, len(table), table.nbytes])
        rows = Dataset(table, fingerprint=fingerprint)
    of_rows = rows.data.column(LANGUAGE).to_pylist() if languages else []
    return SourceRows(rows.remove_columns(LANGUAGE) if languages else rows, of_rows)


def _read(
    source: Source,
    seed: int,
    languages: bool,
    reject: Callable[[RowError], None],
    tell: Callable[[int], None],
    unused: Callable[[Iterable[str]], None],
    workers: int = 0,
) -> pa.Table:
    """The rows of a source, with a column of their languages if `languages`; `workers` processes share the work."""
    found: list[str] = []

    def rows() -> Iterator[Row]:
        for row, language in rows_with_language(source, seed=seed, reject=reject, languages=languages, unused=unused):
            if languages:
                found.append(sys.intern(language))
            yield row

    if workers > 1:
        table = _read_by(workers, source, seed, languages, reject, tell, unused, found)
    else:
        table = _table(rows(), tell)
    if len(table) == 0:
        raise UserError(f"The source {source.path} holds no rows: add some or remove the source.")
    return table.append_column(LANGUAGE, pa.array(found, pa.string())) if languages else table


def _workers(keeper: Keeper, rows: int | None) -> int:
    """How many processes read a source of about so many rows."""
    count = min((rows or 0) // ROWS_WORTH_A_WORKER, cores_for_each(), MOST_WORKERS)
    if count < 2 or multiprocessing.get_start_method() != "fork":  # which settles it, so it is not asked for nothing
        return 0
    held = sum(file.stat().st_size for file in keeper.files if file.suffix.lower() == DOCUMENT)
    return count if held <= MOST_HELD else 0


@workers_end_with_errors()
def _read_by(
    workers: int,
    source: Source,
    seed: int,
    languages: bool,
    reject: Callable[[RowError], None],
    tell: Callable[[int], None],
    unused: Callable[[Iterable[str]], None],
    found: list[str],
) -> pa.Table:
    """The rows of a source, its blocks read by forked processes in turn; their languages go into `found`."""
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    # A document is parsed once, before the processes part; lines are read by each, which is the least of the work.
    files = text_files(source.path, source.split) or []
    held = list(numbered_rows(source)) if any(file.suffix.lower() == DOCUMENT for file in files) else None

    class Blocks(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            shield_worker()
            gc.disable()  # see `_uncollected`
            info = get_worker_info()
            share = (info.id, info.num_workers)
            numbered = numbered_rows(source) if held is None else held
            try:
                for block in blocks_of(source, numbered, _CHUNK_ROWS, share, seed=seed, languages=languages):
                    rejected = [(str(error), error.where, error.reason) for error in block.rejected]
                    rows = _table(row for row, _ in block.rows)
                    yield rows, rejected, block.unused, [language for _, language in block.rows]
            except UserError as error:  # which a loader would raise with a traceback in it
                yield UserError(str(error))

    tables = [_table(iter(()))]
    for block in DataLoader(Blocks(), batch_size=None, num_workers=workers, collate_fn=lambda block: block):
        if isinstance(block, UserError):
            raise block
        table, rejected, keys, languages_of = block
        tables.append(table)
        for text, where, reason in rejected:
            reject(RowError(text, where=where, reason=reason))
        unused(keys)
        found += map(sys.intern, languages_of)
        tell(sum(map(len, tables)))
    return pa.concat_tables(tables, promote_options="default")


def _table(rows: Iterator[Row], tell: Callable[[int], None] = lambda done: None) -> pa.Table:
    """Rows as a table; with a column for what some of them say beyond its features."""
    extras: list[str | None] = []

    def stored() -> Iterator[Row]:
        for row in map(each_once, rows):
            extras.append(packed(row))
            yield row

    with _uncollected():
        table = pa.Table.from_batches(list(_batches(stored(), tell)), schema=ROW_FEATURES.arrow_schema)
    if any(extra is not None for extra in extras):
        table = table.append_column(IN_EXTRAS, pa.array(extras, pa.string()))
    return table


def merge_keys(part: SourceRows, independent: bool) -> list[bytes | None]:
    """What `merge_key` says of each row."""
    languages = part.languages or itertools.repeat("")
    return [merge_key(unpacked(row), independent, own) for row, own in zip(part.rows, languages, strict=False)]


def merged_rows(rows: Dataset, groups: Sequence[Sequence[int]], independent: bool) -> Dataset:
    """The rows of each group of numbers as one row, in memory; see `rows.merging`."""

    def made() -> Iterator[Row]:
        for group in groups:
            yield merged([unpacked(row) for row in rows.__getitems__(list(group))], independent)

    fingerprint = Hasher.hash([rows._fingerprint, groups, independent])  # the default hashes the whole table
    return Dataset(_table(made()), fingerprint=fingerprint)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector: rows hold no cycles, and it would look at all of a document again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def load_mixture(
    sources: Sequence[Source],
    sampling: str = "proportional",
    *,
    languages: Mapping[str, float] | None = None,
    seed: int = 0,
    reject: Callable[[RowError], None] = raise_it,
) -> Dataset:
    """Read several sources and mix them; what is drawn and in which order depends on the arguments alone.

    Source d takes part with the probability p_d: ``proportional`` weight_d * S_d, ``sqrt`` weight_d * sqrt(S_d)
    (InstructBLIP, arXiv:2305.06500), ``weights`` weight_d, each divided by the sum over all sources; S_d is the number
    of rows times `repeat`. The mixture is as long as all S_d together. Where p_d asks for fewer rows than a source has,
    each row is there at most once; where it asks for more, the source is repeated in whole passes and a part of one.

    Args:
        sources: recipe sources with names that differ.
        sampling: ``proportional``, ``sqrt`` or ``weights``.
        languages: language to its share of all rows; within each the sources are mixed as `sampling` says, S_d being
            what they have in that language. Empty: languages are not looked at.
        seed: decides what is drawn and in which order. Sources in proportion to their size are concatenated unshuffled:
            shuffling is the trainer's.
        reject: as `load_source`.

    Raises:
        UserError: as `load_source`; names that are not unique; a share so small that it gives no row; a language that
            no row has, or rows in a language that has no share.
    """
    if sampling not in SHARES:
        raise UserError(f'sampling is "{sampling}": it must be one of {", ".join(SHARES)}.')
    if not sources:
        raise UserError("A mixture needs at least one source: add one under `data`.")
    names = [name_of(source) for source in sources]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise UserError(f'Two sources are called "{double}": give each its own `name`.')
    parts = [read_source(source, seed=seed, reject=reject, languages=bool(languages)) for source in sources]
    return mix(parts, sources, sampling, languages=languages, seed=seed)[0]


def mix(
    parts: Sequence[SourceRows],
    sources: Sequence[Source],
    sampling: str,
    *,
    languages: Mapping[str, float] | None = None,
    seed: int = 0,
) -> tuple[Dataset, np.ndarray]:
    """Mixes the rows of several sources; the other arguments are those of `load_mixture`.

    Args:
        parts: rows of each source, maybe fewer than it has; with their languages where `languages` has shares.

    Returns:
        The mixture, and for each of its rows the number in the concatenation of `parts`.
    """
    together = concatenate_datasets([part.rows for part in parts]) if len(parts) > 1 else parts[0].rows
    order = order_of(sources, parts, sampling, dict(languages or {}), seed)
    return (together, np.arange(len(together))) if order is None else (together.select(order), order)


def _batches(rows: Iterator[Row], tell: Callable[[int], None]) -> Iterator[pa.RecordBatch]:
    schema = ROW_FEATURES.arrow_schema
    chunk: list[Row] = []
    size = done = 0
    for row in rows:
        chunk.append(row)
        size += sum(len(image["bytes"] or b"") for image in row["images"])
        if len(chunk) >= _CHUNK_ROWS or size >= _CHUNK_BYTES:
            yield pa.RecordBatch.from_pylist(chunk, schema=schema)
            done += len(chunk)
            tell(done)
            chunk, size = [], 0
    if chunk:
        yield pa.RecordBatch.from_pylist(chunk, schema=schema)
    tell(done + len(chunk))
