"""Rows that are read while training: nothing is held but a shuffle buffer, and the first batch is there at once.

The stream is endless; `sft.max_steps` ends the run. Processes and data-loader workers share the rows of every source
between them: of K of them, the k-th takes every K-th row, in the order of the files, again and again.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasets import Features, IterableDataset, Value

from ..base.errors import RowError, UserError, raise_it
from ..base.names import Row
from ..rows.messages import IN_EXTRAS, each_once, packed
from .dataset import ROW_FEATURES
from .source import name_of, source_rows

if TYPE_CHECKING:
    from ..recipe.sections import Source

STREAM_FEATURES = Features(
    {**ROW_FEATURES, IN_EXTRAS: Value("string"), "rejected": {"reason": Value("string"), "sentence": Value("string")}}
)


def stream_mixture(
    sources: Sequence[Source],
    *,
    seed: int = 0,
    buffer: int = 1000,
    shards: int = 1,
    keep_rejected: bool = False,
) -> IterableDataset:
    """An endless stream of the rows of several sources, mixed by their weights and shuffled within a buffer.

    The order depends on the arguments, and on how many processes and workers share the shards; nothing else.

    Args:
        sources: recipe sources with names that differ; each row comes from one of them with the probability of its
            weight by the sum of all.
        seed: decides the order.
        buffer: rows among which the next is drawn; 1 keeps the order of the files.
        shards: into how many parts the rows of each source are dealt: processes times data-loader workers.
        keep_rejected: a row that cannot be read comes through without messages, and `rejected` says why; else it is an
            error.

    Returns:
        Rows ``{"messages", "images", "source", "id", "extras", "rejected"}``; `extras` as `messages.packed` gives it;
        `rejected` is None for a good row.
    """
    stream = _Stream(tuple(sources), seed, buffer, shards, keep_rejected)
    return IterableDataset.from_generator(stream, STREAM_FEATURES, gen_kwargs={"shards": list(range(shards))})


def too_few_rows(source: Source, shards: int) -> UserError:
    """The error of a source with fewer rows than processes and workers that share them: some would wait for ever."""
    return UserError(
        f'The source "{name_of(source)}" has too few rows to be dealt to {shards} processes and workers: '
        "start fewer, or set data.streaming to false."
    )


@dataclass(frozen=True)
class _Stream:
    """The generator of some of the shards."""

    sources: tuple[Source, ...]
    seed: int
    buffer: int
    of: int
    keep_rejected: bool

    def __call__(self, shards: list[int]) -> Iterator[Row]:
        chance = random.Random(f"{self.seed}/{self.of}/{shards}")
        streams = [self._endless(source, set(shards)) for source in self.sources]
        weights = [source.weight for source in self.sources]
        mixed = (next(chance.choices(streams, weights)[0]) for _ in itertools.count())
        held = [next(mixed) for _ in range(self.buffer)]
        for row in mixed:
            place = chance.randrange(self.buffer)
            row, held[place] = held[place], row
            yield row

    def _endless(self, source: Source, shards: set[int]) -> Iterator[Row]:
        while True:
            mine = 0
            for number, row in enumerate(self._rows(source)):
                if number % self.of in shards:
                    mine += 1
                    yield row
            if not mine:
                raise too_few_rows(source, self.of)

    def _rows(self, source: Source) -> Iterator[Row]:
        """One pass; a rejected row stands where the file has it."""
        rejected: list[RowError] = []
        reject = rejected.append if self.keep_rejected else raise_it
        for row in map(each_once, source_rows(source, seed=self.seed, reject=reject, stream=True)):
            yield from self._marked(source, rejected)
            yield {**row, IN_EXTRAS: packed(row), "rejected": None}
        yield from self._marked(source, rejected)

    @staticmethod
    def _marked(source: Source, rejected: list[RowError]) -> Iterator[Row]:
        while rejected:
            error = rejected.pop(0)
            why = {"reason": error.reason, "sentence": str(error)}
            yield {"messages": [], "images": [], "source": name_of(source), "id": error.where, "rejected": why}


def first_rows(rows: Iterable[Row], count: int) -> list[Row]:
    """The first good rows of a dataset or a stream."""
    return list(itertools.islice((row for row in rows if row.get("rejected") is None), count))
