"""Records of a benchmark's questions: written as they come, found again after a kill, put in order and scored.

While a benchmark goes on, each process adds to a file of its own, `gqa.1f0c….part-0.jsonl`, whose name says of what:
the bundle, the task, its rows and how they are asked. Only what was asked in the same way is gone on with.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.errors import UserError
from ..base.limits import bounded
from ..base.names import MANIFEST, Json, Record, Values
from ..base.whole_files import IrregularError, file_digest, read_bytes, write_whole
from ..base.words import reason_of
from ..metrics.measures import MEASURES, Answered, Measured
from ..pages.records import is_confidence, read_records
from .asking import about
from .contamination import is_seen
from .task_rows import Asked
from .tasks import Task

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = 1
SAID = ("answer", "answer_blank", "confidence", "options", "options_blank", "error")
"""What of a record the model said."""
LONGEST = 1e9  # seconds that asking may have taken, and any number of a record


def fingerprint(bundle: Path, asked: Sequence[Asked], how: Values) -> str:
    """What decides over the records: the bundle's weights, every question with its answers, and how it is asked."""
    digest = hashlib.sha256(json.dumps([FORMAT, how], sort_keys=True, default=str).encode())
    for path in (bundle / MANIFEST, *sorted(bundle.glob("*.safetensors"))):
        digest.update(path.name.encode() + file_digest(path))
    for one in asked:
        values = [one.id, one.text, one.names(), one.answers, one.choices, one.kind, one.group]
        digest.update(json.dumps(values, ensure_ascii=True).encode())
    return digest.hexdigest()


class Records:
    """The records of one benchmark.

    Args:
        folder: Where they lie.
        name: Of the benchmark.
        mark: Its fingerprint.
    """

    def __init__(self, folder: Path, name: str, mark: str) -> None:
        self.folder, self.name, self.mark = folder, name, mark
        self.path = folder / f"{name}.jsonl"
        self.summary = folder / f"{name}.json"

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"{escape(self.name)}.{self.mark[:12]}.part-*.jsonl"))

    def finished(self) -> Json:
        """What cannot be found again when the same was asked before: its `seconds` and `contamination`.

        Nothing where it was not asked before. The file may be a stranger's: scores are never read from it, they are
        made of the answers anew.
        """
        try:
            found = json.loads(bounded(read_bytes(self.summary)))
        except (OSError, ValueError, RecursionError, IrregularError):
            return {}
        if not isinstance(found, dict) or found.get("fingerprint") != self.mark or not self.path.is_file():
            return {}
        seconds, seen = found.get("seconds"), found.get("contamination")
        known = isinstance(seconds, int | float) and 0 <= seconds < LONGEST
        return {"seconds": seconds if known else 0.0, "contamination": seen if is_seen(seen) else None}

    def done(self, asked: Sequence[Asked]) -> set[str]:
        """Ids of these questions that were answered before: all of them, or those before a kill."""
        return {record["id"] for record in self._answered(asked)}

    def _answered(self, asked: Sequence[Asked]) -> Iterator[Record]:
        """Answers to these questions; what a file says of the questions themselves is not looked at.

        A line that is no answer to one of them is passed over, and its question is asked again.
        """
        known = {one.id: one for one in asked}
        for path in ([self.path] if self.finished() else []) + self._parts():
            for record in read_records(path, unfinished=True):
                one = known.get(record["id"])
                if one is not None and is_answer(record, one):
                    said = {name: record[name] for name in SAID if name in record}
                    yield {**about(one), "answer": "", "answer_blank": None, "confidence": None, **said}

    @contextmanager
    def adding(self, process: int) -> Iterator[Any]:
        """Gives a function that adds records; when it returns, they are on the disk.

        Raises:
            UserError: The folder cannot be written.
        """
        path = self.folder / f"{self.name}.{self.mark[:12]}.part-{process}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = b"".join(map(dump, read_records(path, unfinished=True))) if path.exists() else b""
            write_whole(path, kept)  # without the half of a record that a kill leaves
            stream = path.open("ab")
        except OSError as error:
            raise self._failed(error) from None

        def write(records: Sequence[Record]) -> None:
            try:
                stream.write(b"".join(map(dump, records)))
                stream.flush()
                os.fsync(stream.fileno())
            except OSError as error:
                raise self._failed(error) from None

        with stream:
            yield write

    def collect(self, asked: Sequence[Asked]) -> list[Record]:
        """All records in the order of the questions."""
        found = {record["id"]: record for record in self._answered(asked)}
        return [found[one.id] for one in asked]

    def finish(self, records: Sequence[Record], summary: Json) -> None:
        """Writes the records in order and what was found, and takes the parts away."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, b"".join(map(dump, records)))
            write_whole(self.summary, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
            for path in self._parts():
                path.unlink()
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self.folder} cannot be written ({reason_of(error)}): give another --output or make room.")


def is_answer(record: Values, asked: Asked) -> bool:
    """Whether a line holds what a model can have said to a question, in the types that are written of it."""
    blank, error = record.get("answer_blank"), record.get("error", "")
    options = [record.get("options"), record.get("options_blank")]
    fitting = all(one is None or _are_logs(one, asked.choices) for one in options)
    chosen = options[0] is not None and isinstance(blank, str) and blank in asked.choices
    whole = fitting and (options[1] is None or chosen) and (options[0] is None or record["answer"] in asked.choices)
    return (
        whole and isinstance(blank, str | None) and isinstance(error, str) and is_confidence(record.get("confidence"))
    )


def _are_logs(options: object, choices: Mapping[str, str]) -> bool:
    """Whether it is `options` of a record: letter to the logarithm of a probability and a number of tokens."""
    if not isinstance(options, dict) or options.keys() != choices.keys() or not options:
        return False
    pairs = [pair for pair in options.values() if isinstance(pair, list) and len(pair) == 2]
    numbers = [number for pair in pairs for number in pair]
    sane = all(isinstance(number, int | float) and abs(number) < LONGEST for number in numbers)
    return sane and len(pairs) == len(options)


def dump(record: Record) -> bytes:
    """A record as a line."""
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # there is half a character in it, which JSON can only escape
        return (json.dumps(record) + "\n").encode()


def score(task: Task, records: Sequence[Record]) -> tuple[Measured, Measured | None]:
    """Scores answers, and those without the pictures; the score of each goes into its record.

    A question without pictures, or that could not be asked, keeps its answer, so that both are over the same questions.
    """
    measured = measure(task, records)
    blank = measure(task, records, blank=True) if any(r["answer_blank"] is not None for r in records) else None
    for number, record in enumerate(records):
        record["score"] = 0.0 if "error" in record else _share(measured.each[number])
        was_asked = blank is not None and record["answer_blank"] is not None
        record["score_blank"] = _share(blank.each[number]) if blank is not None and was_asked else None
    return measured, blank


def measure(task: Task, records: Sequence[Record], blank: bool = False) -> Measured:
    """What the benchmark's metric finds; where texts of options were compared, also with those compared by token and by
    character."""

    def found(best: Callable[[str, list[float]], float] | None = None) -> Measured:
        return MEASURES[task.metric]([answered(record, *_said(record, blank, best)) for record in records])

    measured = found()
    if any(record.get("options") for record in records):
        for name, best in NORMALISED.items():
            measured.totals.update({f"{score}_{name}": total for score, total in found(best).totals.items()})
    return measured


NORMALISED: dict[str, Callable[[str, list[float]], float]] = {
    "per_token": lambda text, found: found[0] / max(found[1], 1),
    "per_character": lambda text, found: found[0] / max(len(text), 1),  # as in lm-eval's acc_norm
}
"""How else options are compared than by the likelihood of the whole: text, its log and its tokens → what is most."""


def _said(record: Record, blank: bool, best: Callable[[str, list[float]], float] | None) -> tuple[str, bool]:
    """What was answered, and whether to grey images; see `score`."""
    blank = blank and record["answer_blank"] is not None
    options = record.get("options_blank" if blank else "options")
    if best is None or not options:
        return record["answer_blank" if blank else "answer"], blank
    return max(options, key=lambda option: best(record["choices"][option], options[option])), blank


def _share(score: float) -> float | None:
    """A score as it is written; null where nobody gave one."""
    return None if math.isnan(score) else round(score, 6)


def answered(record: Record, answer: str, blank: bool = False) -> Answered:
    """A record as measures take it, with one of its answers, and what a judge says of that."""
    kind, group = record["kind"] or "", record["group"] or record["id"]
    found = record.get("verdicts_blank" if blank else "verdicts") or ()
    verdicts = [None if each["answer"] is None else (each["reference"], each["answer"]) for each in found]
    return Answered(answer, record["answers"], record["choices"] or {}, kind, group, verdicts)


def totals_of(measured: Measured) -> dict[str, dict[str, float]]:
    """Every score of a measure with its interval."""
    found = {}
    for name, total in measured.totals.items():
        low, high = total.interval()
        found[name] = {"value": round(total.score(), 6), "low": round(low, 6), "high": round(high, 6)}
    return found


def by_kind(task: Task, records: Sequence[Record]) -> dict[str, Json]:
    """How many questions of each kind there are, the first score of it with its interval, and all `scores`."""
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kinds.setdefault(record["kind"] or "", []).append(record)
    if len(kinds) < 2:
        return {}
    found = {}
    for kind, some in sorted(kinds.items()):
        scores = totals_of(measure(task, some))
        name = next(iter(scores))
        found[kind] = {"questions": len(some), "metric": name, **scores[name], "scores": scores}
    return found


def print_table(found: Mapping[str, Values], console: Console) -> None:
    """Prints every score of benchmarks with its interval and that without pictures."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("benchmark", "score", box=SIMPLE_HEAD, show_edge=False)
    for name in ("value", "95 % interval", "image blanked", "questions"):
        table.add_column(name, justify="right")
    for name, one in found.items():
        for metric, score_of in one["scores"].items():
            blank = (one["scores_blank"] or {}).get(metric)
            table.add_row(
                name, metric.replace("_", " "), _number(score_of["value"]),
                f"{_number(score_of['low'])} – {_number(score_of['high'])}",
                _number(blank["value"]) if blank else "", f"{one['questions']:,}",
            )  # fmt: skip
    console.print(table)


def _number(value: float) -> str:
    return f"{value:.1%}" if abs(value) <= 1 else f"{value:,.2f}"
