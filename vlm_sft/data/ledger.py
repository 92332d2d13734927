"""What became of every row: per source how many were read, used, shortened, repeated and rejected, and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..base.errors import RowError, UserError
from ..base.names import Json, Values
from ..base.words import short

if TYPE_CHECKING:
    from rich.console import Console, Group

EXAMPLES = 3  # sentences kept of each reason
MOST_NAMES, OTHER_NAMES = 100, "(other keys)"
# A share of few rows says little: of a stream, rejected rows are compared with so many at least.
FEWEST_STREAMED = 1000


@dataclass
class SourceLedger:
    """The rows of one source.

    Attributes:
        read: Rows that the source gave, rejected ones included; of a stream, those that came so far.
        measured: Of these, the rows that were measured before the first step.
        used: Different rows in the mixture; of a stream, rows that were trained on, the same row maybe several times.
        repeated: How many times a row of it comes again in the mixture.
        truncated: Measured rows that lost turns to fit `sft.max_length`.
        turns_lost: How many turns these lost together.
        rejected: Reason → rows.
        examples: Reason → sentences on the first rows.
        found: Rows that were rejected because of their measure or their images before the first step.
        met: Id → reason of the rows that were rejected while training.
        streamed: Whether the rows come from a stream, whose end is not known.
        merged: Rows that were merged with others on their pictures (`merge_by_image`).
        conversations: Into how many conversations, or groups of questions, these were merged.
        unused: Key that means nothing in the source's format → rows that have it, with a value; of a stream, of its
            first rows.
    """

    read: int = 0
    measured: int = 0
    used: int = 0
    repeated: int = 0
    truncated: int = 0
    turns_lost: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    found: int = 0
    met: dict[str, str] = field(default_factory=dict)
    streamed: bool = False
    unused: dict[str, int] = field(default_factory=dict)
    merged: int = 0
    conversations: int = 0

    def leave(self, keys: Iterable[str]) -> None:
        """Counts keys that a row does not use, or key → rows; of more names than columns can be, the first are kept."""
        for key, rows in Counter(keys).items():
            name = key if key in self.unused or len(self.unused) < MOST_NAMES else OTHER_NAMES
            self.unused[name] = self.unused.get(name, 0) + rows

    def draw(self, drawn: np.ndarray, members: np.ndarray) -> None:
        """Counts what a mixture draws.

        Args:
            drawn: Numbers of the rows that it draws of this source, one that comes again each time.
            members: How many rows of the source each of its rows was merged of; 1 for most.
        """
        self.used = int(members[np.unique(drawn)].sum())
        self.repeated = int(members[drawn].sum()) - self.used
        self.conversations, self.merged = int((members > 1).sum()), int(members[members > 1].sum())

    def reject(self, reason: str, sentence: str) -> None:
        """Counts a row that is left out."""
        self.rejected[reason] = self.rejected.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if sentence and len(examples) < EXAMPLES:
            examples.append(sentence)

    @property
    def lost(self) -> int:
        """Rejected rows, whatever the reason."""
        return sum(self.rejected.values())

    @property
    def share(self) -> float:
        """Rejected rows by rows read; where a sample was measured, at least the share in the sample."""
        read = max(self.read, FEWEST_STREAMED if self.streamed else 0)
        return max(_by(self.lost, read), _by(self.found, self.measured))


@dataclass
class Ledger:
    """The sources of `data.train` or of `data.eval`.

    Attributes:
        max_rejected: Largest share of rejected rows of a source.
        sources: Name of a source → what became of its rows.
    """

    max_rejected: float = 0.0
    sources: dict[str, SourceLedger] = field(default_factory=dict)

    def source(self, name: str) -> SourceLedger:
        """The ledger of one source; a new one where there is none yet."""
        return self.sources.setdefault(name, SourceLedger())

    def rejecter(self, name: str) -> Callable[[RowError], None]:
        """What to call with the error of every row of a source that cannot be read."""

        def reject(error: RowError) -> None:
            source = self.source(name)
            source.read += 1
            source.reject(error.reason, str(error))

        return reject

    def meet(self, name: str, row: str, reason: str, sentence: str) -> None:
        """Counts a row that was rejected while training; a row that comes again is counted once."""
        source = self.source(name)
        if row not in source.met:
            source.met[row] = reason
            source.reject(reason, sentence)
        source.used -= source.streamed

    def see(self, name: str, rows: int) -> None:
        """Counts rows that came out of a stream, rejected ones included."""
        source = self.source(name)
        source.read += rows
        source.used += rows

    def problem(self, limit: str = "data.max_rejected") -> str | None:
        """One sentence on the first source of which more rows are rejected than allowed; None where there is none.

        Args:
            limit: What a user calls `max_rejected`: a key, or a command's option.
        """
        for name, source in self.sources.items():
            if source.lost and source.share > self.max_rejected:
                first = next((sentence for examples in source.examples.values() for sentence in examples), "")
                if source.lost == 1:
                    return first
                return (
                    f'{source.lost:,} of {source.read:,} rows of the source "{name}" cannot be used, more than '
                    f"{limit} ({self.max_rejected:g}) allows; the first: {first}"
                )
        return None

    def check(self, console: Console, title: str = "Rows", limit: str = "data.max_rejected") -> None:
        """Prints the table and stops the run where a source has more rejected rows than `max_rejected` allows.

        Args:
            console: Where to print.
            title: What the rows are called in the table.
            limit: See `problem`.

        Raises:
            UserError: It has; the message names the first row.
        """
        if (sentence := self.problem(limit)) is not None:
            console.print(ledger_table({title: self}))
            raise UserError(sentence)

    def as_dict(self) -> Json:
        """Plain dicts, lists and numbers, as `bundle.json` has them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Values) -> Ledger:
        """What `as_dict` gave."""
        sources = {name: SourceLedger(**source) for name, source in saved["sources"].items()}
        return cls(saved["max_rejected"], sources)


def ledger_table(ledgers: Mapping[str, Ledger]) -> Group:
    """For people: a table with a line for each source; below it the reasons of rejection with their first examples.

    Args:
        ledgers: `train`, `eval` or another name of a set → its ledger.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Rows by source", title_justify="left")
    for name in ("set", "source", "read", "used", "repeated", "shortened", "rejected"):
        table.add_column(name, justify="left" if name in ("set", "source") else "right", overflow="fold")
    reasons = []
    for title, ledger in ledgers.items():
        for name, source in ledger.sources.items():
            turns = f" (-{source.turns_lost:,} turns)" if source.turns_lost else ""
            lost = Text(f"{source.lost:,}", "red" if source.lost else "")
            counts = [f"{source.read:,}", f"{source.used:,}", f"{source.repeated:,}", f"{source.truncated:,}{turns}"]
            table.add_row(title, Text(name), *counts, lost)
            for reason, count in source.rejected.items():
                reasons.append(Text(f"{name}: {count:,} × {reason}", "bold"))
                reasons += [Text(f"  {sentence}") for sentence in source.examples.get(reason, [])]
            if source.merged:
                made = f"{source.merged:,} rows merged by image into {source.conversations:,}"
                reasons.append(Text(f"{name}: {made}"))
            if source.unused:
                reasons.append(Text(f"{name}: not used: {names_of(source.unused)}"))
    return Group(table, *reasons)


def names_of(unused: Mapping[str, int]) -> str:
    """Keys that are not used with their rows, for a sentence: `"score" in 12 rows, …`."""
    shown = [f'"{short(key)}" in {rows:,} {"row" if rows == 1 else "rows"}' for key, rows in list(unused.items())[:8]]
    return ", ".join([*shown, f"and {len(unused) - 8:,} more"] if len(unused) > 8 else shown)


def _by(part: int, whole: int) -> float:
    if not part:
        return 0.0
    return part / whole if whole else math.inf
